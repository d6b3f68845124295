"""Meta-World environments: contract, determinism, geometry, visible goals, errors."""

import functools
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from spatial_forcing.envs import DEMONSTRATION_SEEDS, EVALUATION_SEEDS, list_tasks, make_env
from spatial_forcing.envs.camera import backproject, project
from spatial_forcing.envs.metaworld import CORNER2_POSITION, MetaWorldEnv
from spatial_forcing.envs.metaworld_tasks import INSTRUCTIONS, OBJECT_FAMILIES, object_family
from spatial_forcing.errors import ConfigError, DataError, EnvironmentSetupError
from spatial_forcing.protocols import Env
from spatial_forcing.training import METAWORLD_TASKS
from tests.envs.moments import check_drawn_later

pytest.importorskip("metaworld")

ZERO = np.zeros(4, np.float32)


@pytest.fixture(scope="module")
def reach():
    env = make_env("reach-v3", image_size=64, horizon=60)
    yield env
    env.close()


def play(env, seed, steps=5):
    """Full states of an expert's first steps, and the last images."""
    expert = env.expert()
    observation, _ = env.reset(seed=seed)
    states = [env.privileged_state(), env.goal_position()]
    for _ in range(steps):
        observation, *_ = env.step(expert.action(env))
        states.append(env.privileged_state())
    return np.concatenate(states), np.stack([observation["images"][c] for c in env.cameras])


def test_observation_and_protocol(reach):
    assert isinstance(reach, Env)
    assert reach.task == "reach-v3"
    observation, info = reach.reset(seed=1)
    assert info == {"success": False, "seed": 1}
    assert list(observation["images"]) == ["corner2", "gripperPOV"] == list(reach.cameras)
    for image in observation["images"].values():
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8
        assert image.std() > 5
    assert observation["state"].shape == (4,)
    assert observation["state"].dtype == np.float32
    assert observation["task"] == INSTRUCTIONS["reach-v3"]
    plain = {**observation, "images": dict(observation["images"])}
    assert reach.observation_space.contains(plain)


def test_the_state_tells_nothing_about_objects_and_goals(reach):
    """Same hand, other scene: the state must not differ."""
    first, _ = reach.reset(seed=1)
    goal = reach.goal_position()
    second, _ = reach.reset(seed=2)
    assert np.abs(reach.goal_position() - goal).max() > 0.01
    np.testing.assert_allclose(first["state"], second["state"], atol=1e-3)
    np.testing.assert_allclose(second["state"], reach.privileged_state()[:4], rtol=1e-6)


QUICK = ("push-v3", "basketball-v3", "drawer-open-v3", "shelf-place-v3")
SLOW = [pytest.param(task, marks=pytest.mark.slow) for task in INSTRUCTIONS if task not in QUICK]


@pytest.mark.parametrize("task", [*QUICK, *SLOW])
def test_a_seed_determines_the_episode_whatever_came_before(task):
    fresh, used = (make_env(task, image_size=64) for _ in range(2))
    play(used, seed=8, steps=20)
    (states, images), (again, images_again) = play(fresh, 7), play(used, 7)
    np.testing.assert_array_equal(states, again)
    np.testing.assert_array_equal(images, images_again)
    other, _ = play(used, 9)
    assert np.abs(other - states).max() > 1e-3
    fresh.close()
    used.close()


def test_resets_without_seed_differ_and_can_be_repeated(reach):
    reach.reset(seed=3)
    _, first = reach.reset()
    goal = reach.goal_position()
    _, second = reach.reset()
    assert first["seed"] != second["seed"]
    reach.reset(seed=first["seed"])
    np.testing.assert_array_equal(reach.goal_position(), goal)
    reach.reset(seed=3)
    assert reach.reset()[1]["seed"] == first["seed"]


def test_init_states_are_evaluation_seeds_and_disjoint_from_demonstrations(reach):
    _, info = reach.reset(options={"init_state": 4})
    assert info["seed"] == EVALUATION_SEEDS[4]
    assert not set(EVALUATION_SEEDS[:10]) & set(DEMONSTRATION_SEEDS)
    assert DEMONSTRATION_SEEDS.stop <= EVALUATION_SEEDS.start
    with pytest.raises(ConfigError, match="Did you mean 'init_state'"):
        reach.reset(options={"init_stat": 4})
    with pytest.raises(ConfigError, match="init_state is -1"):
        reach.reset(options={"init_state": -1})


@pytest.mark.parametrize("task", ["reach-v3", "drawer-open-v3", "button-press-topdown-v3", "plate-slide-v3"])
def test_the_expert_succeeds_within_its_action_range(task):
    env = make_env(task, image_size=16)
    expert = env.expert()
    env.reset(seed=0)
    truncated, info = False, {"success": False}
    while not (truncated or info["success"]):
        action = expert.action(env)
        assert action.dtype == np.float32
        assert np.abs(action).max() <= 1
        _, _, terminated, truncated, info = env.step(action)
        assert not terminated
        assert type(info["success"]) is bool
    assert info["success"]
    env.close()


GOAL_MARGIN = 0.06
"""Metres that a goal may lie behind the visible surface and still be seen: it may be inside its object."""


def goal_visible(env, camera):
    """Whether the goal lies inside this camera's image and nothing stands in front of it."""
    (x, y), distance = project(env.goal_position(), *env.camera_parameters(camera))
    depth = env.depth(camera)
    if not (distance > 0 and 0 <= x < depth.shape[1] and 0 <= y < depth.shape[0]):
        return False
    return bool(depth[int(y), int(x)] > distance - GOAL_MARGIN)


@pytest.mark.parametrize("task", METAWORLD_TASKS)
def test_goals_are_visible_over_the_corner(task):
    env = make_env(task, image_size=64)
    seen = []
    for seed in range(4):
        env.reset(seed=seed)
        seen.append(goal_visible(env, "corner2"))
    assert all(seen)
    env.close()


def test_the_goal_marker_is_drawn_where_the_goal_is(reach):
    for seed in range(3):
        observation, _ = reach.reset(seed=seed)
        (x, y), _ = project(reach.goal_position(), *reach.camera_parameters("corner2"))
        r, g, b = observation["images"]["corner2"][int(y), int(x)].astype(int)
        assert r > 120
        assert max(g, b) < 60


@pytest.mark.parametrize(("task", "marker"), [("door-lock-v3", "goal_lock"), ("sweep-v3", "goal")])
def test_markers_stay_at_the_goal(task, marker):
    """In these tasks the simulator's own marker would stand elsewhere."""
    env = make_env(task, image_size=16)
    env.reset(seed=0)
    for _ in range(2):
        np.testing.assert_allclose(env._sim.data.site(marker).xpos, env.goal_position(), atol=1e-9)
        env.step(ZERO)
    env.close()


def test_a_goal_behind_something_or_outside_is_not_visible(reach):
    reach.reset(seed=0)
    target = reach._sim._target_pos.copy()
    try:
        reach._sim._target_pos = target - [0, 0, 0.5]  # under the table
        assert not goal_visible(reach, "corner2")
        reach._sim._target_pos = np.array([10.0, 0, 0])
        assert not goal_visible(reach, "corner2")
    finally:
        reach._sim._target_pos = target


@pytest.mark.parametrize("camera", ["corner2", "gripperPOV"])
def test_depth_and_parameters_match_the_delivered_image(reach, camera):
    """The hand is seen at its place by both cameras, and back-projected pixels lie on known geometry."""
    reach.reset(seed=0)
    K, pose = reach.camera_parameters(camera)
    depth = reach.depth(camera)
    assert depth.dtype == np.float32
    assert depth.shape == (64, 64)
    points = backproject(depth, K, pose)
    table = np.abs(points[..., 2]) < 0.01
    assert table.mean() > 0.15
    assert np.median(np.abs(points[table][:, 2])) < 2e-3
    if camera == "corner2":
        np.testing.assert_allclose(pose[:3, 3], CORNER2_POSITION)
        # Upright: the world's up points up in the image (y runs down).
        assert pose[2, 1] < -0.5
        hand = reach.privileged_state()[:3]
        assert np.linalg.norm(points - hand, axis=-1).min() < 0.05


def test_images_are_rendered_only_when_read_and_kept(reach):
    observation, _ = reach.reset(seed=0)
    assert reach._frames == {}
    image = observation["images"]["corner2"]
    assert list(reach._frames) == ["corner2"]
    following, *_ = reach.step(np.array([1, 1, 1, 1], np.float32))
    assert observation["images"]["corner2"] is image
    with pytest.raises(DataError, match=r"image 'gripperPOV'"):
        observation["images"]["gripperPOV"]
    following["images"]["corner2"]
    with pytest.raises(ConfigError, match="Did you mean 'corner2'"):
        following["images"]["corner"]


def test_observations_and_factories_can_be_pickled(reach):
    observation, _ = reach.reset(seed=0)
    copy = pickle.loads(pickle.dumps(observation))
    assert type(copy["images"]) is dict
    for camera in reach.cameras:
        np.testing.assert_array_equal(copy["images"][camera], observation["images"][camera])
    factory = pickle.loads(pickle.dumps(functools.partial(make_env, "reach-v3", image_size=16)))
    env = factory()
    assert env.reset(seed=0)[0]["images"]["corner2"].shape == (16, 16, 3)
    env.close()
    env.close()


def test_actions_are_checked_and_clipped(reach):
    reach.reset(seed=0)
    for bad in (np.full(4, np.nan, np.float32), np.zeros(3, np.float32), np.array([0, 0, 0, np.inf])):
        with pytest.raises(DataError, match="4 finite numbers"):
            reach.step(bad)
    big = reach.step(np.full(4, 100, np.float32))[0]["state"]
    reach.reset(seed=0)
    np.testing.assert_array_equal(reach.step(np.ones(4, np.float32))[0]["state"], big)


def test_the_horizon_truncates_and_steps_out_of_an_episode_are_refused():
    env = make_env("reach-v3", image_size=16, horizon=2)
    with pytest.raises(ConfigError, match=r"reach-v3 .*reset\(\)"):
        env.step(ZERO)
    env.reset(seed=0)
    assert env.step(ZERO)[3] is False
    assert env.step(ZERO)[3] is True
    with pytest.raises(ConfigError, match="truncated after 2 steps"):
        env.step(ZERO)
    env.close()


@pytest.mark.parametrize(
    ("task", "kwargs", "message"),
    [
        ("reech-v3", {}, "Did you mean 'reach-v3'"),
        ("reach-v3", {"cameras": ["corner2", "wrist"]}, "unknown camera of reach-v3 'wrist'"),
        ("reach-v3", {"cameras": []}, "one or more"),
        ("reach-v3", {"cameras": ["corner2", "corner2"]}, "different names"),
        ("reach-v3", {"horizon": 501}, "horizon is 501"),
        ("reach-v3", {"image_size": 0}, "image_size is .0, 0"),
        ("reach-v3", {"img_size": 64}, "Did you mean 'image_size'"),
    ],
)
def test_bad_settings_are_refused(task, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        make_env(task, **kwargs)


def test_an_unknown_suite_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'metaworld'"):
        list_tasks("meta-world")


def test_a_missing_simulator_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    with pytest.raises(EnvironmentSetupError, match=r'pip install "spatial-forcing\[metaworld\]"'):
        MetaWorldEnv("reach-v3")


def test_the_tables_cover_exactly_the_simulators_tasks():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert set(INSTRUCTIONS) == set(ALL_V3_ENVIRONMENTS) == set(list_tasks("metaworld"))
    assert len(set(INSTRUCTIONS.values())) == 50
    members = [task for family in OBJECT_FAMILIES.values() for task in family]
    assert sorted(members) == sorted(INSTRUCTIONS)
    with pytest.raises(ConfigError, match="Did you mean 'reach-v3'"):
        object_family("reach-v2")


def meshes(task):
    """Mesh files of the task's scene, robot and table aside, read from the simulator's own XML."""
    import mujoco
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    scene = mujoco.MjSpec.from_file(str(ALL_V3_ENVIRONMENTS[task].model_name.fget(None)))
    files = {"/".join(Path(mesh.file).parts[-2:]) for mesh in scene.meshes}
    return {file for file in files if file.split("/")[0] not in ("xyz_base", "table")}


def test_families_are_the_tasks_that_share_meshes():
    mesh_of = {task: meshes(task) for task in INSTRUCTIONS}
    shared = {name: set().union(*(mesh_of[t] for t in tasks)) for name, tasks in OBJECT_FAMILIES.items()}
    for name, tasks in OBJECT_FAMILIES.items():
        assert all(mesh_of[task] for task in tasks)
        others = set().union(*(files for other, files in shared.items() if other != name))
        assert not shared[name] & others, name
        if len(tasks) > 1:
            assert all(any(mesh_of[a] & mesh_of[b] for b in tasks if b != a) for a in tasks), name


def test_moments_drawn_later_look_as_they_did(reach):
    check_drawn_later(reach)
