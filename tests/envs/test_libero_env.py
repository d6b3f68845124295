"""LIBERO's simulator behind our environment, on the assets at hand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from spatial_forcing.envs import make_env
from spatial_forcing.envs.base import EVALUATION_SEEDS
from spatial_forcing.envs.libero_conventions import NO_OP
from spatial_forcing.envs.simulated import FILM_SIZE
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.protocols import Env, FilmedEnv
from tests.envs.libero_case import needs_libero, use_assets
from tests.envs.moments import check_drawn_later

pytestmark = needs_libero
TASK = "libero_spatial-0"


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        use_assets(patch, tmp_path_factory.mktemp("libero"))
        yield


@pytest.fixture(scope="module")
def env(setup):
    env = make_env(TASK, image_size=64)
    yield env
    env.close()


def play(env, seed, steps=6):
    observation, _ = env.reset(seed=seed)
    rng = np.random.default_rng(0)
    states = [observation["state"]]
    for _ in range(steps):
        states.append(env.step(rng.uniform(-1, 1, 7).astype(np.float32))[0]["state"])
    return np.stack(states), env.simulator_state()


def test_protocol_and_shapes(env):
    assert isinstance(env, Env)
    observation, info = env.reset(options={"init_state": 0})
    assert observation["task"].startswith("pick up the black bowl between")
    assert observation["state"].shape == (8,)
    assert {c: i.shape for c, i in observation["images"].items()} == dict.fromkeys(env.cameras, (64, 64, 3))
    assert all(image.std() > 10 for image in observation["images"].values())
    assert info == {"success": False, "seed": EVALUATION_SEEDS[0], "init_state": 0}
    assert env.horizon == 220
    observation, reward, terminated, truncated, info = env.step(NO_OP)
    assert (reward, terminated, truncated, info["success"]) == (0.0, False, False, False)


def test_an_episode_is_determined_by_its_seed_alone(env):
    """Evaluation and demonstration seeds, after whatever was played before."""
    first = {seed: play(env, seed) for seed in (EVALUATION_SEEDS[2], 7)}
    play(env, 11)
    np.random.seed(123)  # noqa: NPY002
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    for seed in (7, EVALUATION_SEEDS[2]):
        states, simulator = play(env, seed)
        np.testing.assert_array_equal(states, first[seed][0])
        np.testing.assert_array_equal(simulator, first[seed][1])
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert not np.array_equal(first[7][0], first[EVALUATION_SEEDS[2]][0])


def test_a_soft_reset_places_everything_like_a_new_environment(setup):
    """On a task whose bowl is placed on a fixture that is placed itself."""
    env = make_env("libero_spatial-9", image_size=32)
    try:
        fresh = env._model.body_pos.copy(), env._data.qpos.copy()
        env._begin(5)
        env._begin(0)
        np.testing.assert_allclose(env._model.body_pos, fresh[0], atol=1e-9)
        np.testing.assert_allclose(env._data.qpos, fresh[1], atol=1e-6)
        env.reset(seed=3)
        assert env.objects()["akita_black_bowl_1"][2] > 1.0
    finally:
        env.close()


def test_official_states_are_the_start(env):
    env.reset(options={"init_state": 3})
    objects = env.objects()
    wanted = env._inits[3]
    moved = np.abs(env.simulator_state()[1:] - wanted[1:])
    assert moved.max() < 0.2
    env.reset(options={"init_state": 4})
    assert any(not np.allclose(objects[name], place, atol=1e-4) for name, place in env.objects().items())
    assert env.reset(seed=EVALUATION_SEEDS[53])[1]["init_state"] == 3
    with pytest.raises(ConfigError, match="0 to 49"):
        env.reset(options={"init_state": 50})


def test_official_starts_throw_nothing_about(env):
    """Official states hold bowl and plate inside each other (2 and 18 most); they part without a jump."""
    for index in (0, 2, 18):
        env.reset(options={"init_state": index})
        heights = {name: place[2] for name, place in env.objects().items() if name.endswith(("_1", "_2"))}
        on_table = {name: z for name, z in heights.items() if name.startswith(("akita", "plate", "glazed"))}
        assert len(on_table) == 4
        assert 0.88 < min(on_table.values()) <= max(on_table.values()) < 0.92


def test_a_film_is_sharper_than_the_observation_and_shows_the_same(env):
    """Small views are drawn again at 160 pixels, in the same orientation; an observation stays as it is."""
    assert isinstance(env, FilmedEnv)
    observation, _ = env.reset(options={"init_state": 0})
    before = {camera: np.array(image) for camera, image in observation["images"].items()}
    film = env.film()
    assert {camera: picture.shape for camera, picture in film.items()} == dict.fromkeys(
        env.cameras, (FILM_SIZE, FILM_SIZE, 3)
    )
    for camera, seen in before.items():
        np.testing.assert_array_equal(observation["images"][camera], seen)
        small = np.asarray(Image.fromarray(film[camera]).resize((64, 64), Image.Resampling.BOX), float)
        assert np.corrcoef(small.ravel(), seen.ravel())[0, 1] > 0.9, camera


def test_nothing_is_rendered_until_it_is_read(setup, monkeypatch):
    import spatial_forcing.envs.simulated as module

    env = make_env(TASK, image_size=32)
    made = []
    monkeypatch.setattr(module, "FastRenderer", lambda *args: made.append(args))
    try:
        stale, _ = env.reset(seed=1)
        env.step(NO_OP)
        with pytest.raises(DataError, match=r"image 'agentview'"):
            stale["images"]["agentview"]
    finally:
        env.close()
    assert made == []


def test_depth_agrees_with_the_geometry(env):
    """Points of the table's plane, back-projected from the depth map, have the table's height."""
    env.reset(options={"init_state": 0})
    depth = env.depth("agentview")
    K, pose = env.camera_parameters("agentview")
    row, column = 40, 8
    ray = np.linalg.inv(K) @ [column + 0.5, row + 0.5, 1.0]
    point = pose[:3, :3] @ (ray * depth[row, column]) + pose[:3, 3]
    plate = env.objects()["plate_1"]
    assert 0.0 < depth.min() < depth.max()
    assert abs(point[2] - plate[2]) < 0.15


def test_actions_are_checked(env):
    env.reset(seed=0)
    with pytest.raises(DataError, match="7 finite numbers"):
        env.step(np.zeros(4, np.float32))
    with pytest.raises(DataError, match="7 finite numbers"):
        env.step(np.full(7, np.nan, np.float32))


def test_the_expert_solves_the_task(env):
    wins = 0
    for seed in range(3):
        env.reset(seed=seed)
        expert = env.expert()
        for _ in range(env.horizon):
            _, _, terminated, truncated, info = env.step(expert.action(env))
            if terminated or truncated:
                break
        wins += bool(info["success"])
    assert wins >= 2


def test_the_expert_lifts_a_flat_box_and_opens_its_fingers_in_passing(setup):
    """A hand that rests before it opens its fingers teaches a policy without memory to rest."""
    from spatial_forcing.envs.libero_expert import LiberoExpert
    from spatial_forcing.envs.pick_and_place import OPEN

    env = make_env("libero_object-6", image_size=32)
    try:
        env.reset(seed=100)
        expert, actions, done = LiberoExpert("libero_object-6"), [], False
        while not done:
            actions.append(expert.action(env))
            _, _, terminated, truncated, info = env.step(actions[-1])
            done = terminated or truncated
    finally:
        env.close()
    assert info["success"]
    held = max(i for i, action in enumerate(actions) if action[-1] != OPEN)
    assert actions[held][2] < -0.3


def test_tasks_without_an_expert_say_so(setup):
    from spatial_forcing.envs.libero_expert import LiberoExpert

    with pytest.raises(ConfigError, match=r"libero_goal-0 .* libero_spatial and libero_object"):
        LiberoExpert("libero_goal-0")
    with pytest.raises(ConfigError, match=r"libero_spatial-4 is not solved .* drawer"):
        LiberoExpert("libero_spatial-4")


def test_perturbed_scenes_look_different(env, setup):
    plain = np.asarray(env.reset(options={"init_state": 0})[0]["images"]["agentview"], float)
    other = make_env(TASK, image_size=64, perturbation="camera,light,noise=0.5")
    try:
        observation, _ = other.reset(options={"init_state": 0})
        perturbed = np.asarray(observation["images"]["agentview"], float)
        np.testing.assert_array_equal(observation["state"], env._observe()["state"])
    finally:
        other.close()
    assert np.abs(perturbed - plain).mean() > 5


@pytest.mark.slow
@pytest.mark.parametrize("task", ["libero_object-4", "libero_goal-0", "libero_10-3"])
def test_other_suites_start_from_their_official_states(setup, task):
    env = make_env(task, image_size=32)
    try:
        observation, _ = env.reset(options={"init_state": 7})
        assert all(image.std() > 10 for image in observation["images"].values())
        # A goal names objects, or regions of fixtures such as wooden_cabinet_1_middle_region.
        things = (*env.objects(), "wooden_cabinet_1", "white_cabinet_1")
        assert env.objects_of_interest()
        assert all(name.startswith(things) for name in env.objects_of_interest())
        for _ in range(3):
            _, _, terminated, _, info = env.step(NO_OP)
        assert not terminated
        assert not info["success"]
    finally:
        env.close()


def test_moments_drawn_later_look_as_they_did(env):
    check_drawn_later(env)
