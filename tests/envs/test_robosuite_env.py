"""robosuite's own tasks behind our environment."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from spatial_forcing.data.reader import Dataset
from spatial_forcing.data.record import RecordConfig, record
from spatial_forcing.envs import list_tasks, make_env
from spatial_forcing.envs.base import EVALUATION_SEEDS
from spatial_forcing.envs.camera import project
from spatial_forcing.envs.robosuite_tasks import TASKS
from spatial_forcing.errors import ConfigError, DataError, EnvironmentSetupError
from spatial_forcing.protocols import Env, ExpertEnv
from tests.envs.moments import check_drawn_later

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("robosuite") is None, reason="robosuite is not installed (see docs/robosuite.md)"
)
STILL = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)


@pytest.fixture(scope="module")
def envs():
    """Environments by task, made when they are asked for and closed at the end."""
    made = {}

    def get(task):
        if task not in made:
            made[task] = make_env(task, image_size=48)
        return made[task]

    yield get
    for env in made.values():
        env.close()


def play(env, seed, steps=8):
    observation, _ = env.reset(seed=seed)
    rng = np.random.default_rng(0)
    states = [observation["state"]]
    for _ in range(steps):
        states.append(env.step(rng.uniform(-1, 1, 7).astype(np.float32))[0]["state"])
    return np.stack(states), {name: place.copy() for name, place in env.objects().items()}


@pytest.mark.parametrize("task", TASKS)
def test_protocol_and_shapes(envs, task):
    env = envs(task)
    assert isinstance(env, Env)
    assert isinstance(env, ExpertEnv)
    observation, info = env.reset(seed=3)
    assert info == {"success": False, "seed": 3}
    assert observation["task"] == TASKS[task].instruction == env.instruction
    assert observation["state"].shape == (9,)
    assert observation["state"].dtype == np.float32
    assert np.linalg.norm(observation["state"][3:7]) == pytest.approx(1, abs=1e-4)
    assert {c: i.shape for c, i in observation["images"].items()} == {
        "agentview": (48, 48, 3), "robot0_eye_in_hand": (48, 48, 3),
    }  # fmt: skip
    assert all(image.std() > 10 for image in observation["images"].values())
    depth = env.depth("agentview")
    assert depth.shape == (48, 48)
    assert 0.2 < depth.min() < depth.max() < 10
    _, reward, terminated, truncated, info = env.step(STILL)
    assert (reward, terminated, truncated, info) == (0.0, False, False, {"success": False})
    assert task in list_tasks("robosuite")


@pytest.mark.parametrize("task", ["robosuite-stack", "robosuite-can", "robosuite-door"])
def test_an_episode_is_determined_by_its_seed_alone(envs, task):
    env = envs(task)
    first = play(env, EVALUATION_SEEDS[2])
    closed = STILL.copy()
    closed[-1] = 1
    env.reset(seed=11)
    env.step(closed)  # the gripper's last command must not reach the next episode
    np.random.seed(123)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    states, places = play(env, EVALUATION_SEEDS[2])
    np.testing.assert_array_equal(states, first[0])
    assert all(np.array_equal(place, first[1][name]) for name, place in places.items())
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert env.reset(options={"init_state": 2})[1]["seed"] == EVALUATION_SEEDS[2]
    assert not np.array_equal(play(env, 7)[0], first[0])


def test_actions_move_the_hand_along_the_axes_and_close_the_fingers(envs):
    env = envs("robosuite-lift")
    for axis in range(3):
        env.reset(seed=0)
        start = env.hand()[0]
        action = STILL.copy()
        action[axis] = 1.0
        for _ in range(5):
            env.step(action)
        moved = env.hand()[0] - start
        assert moved[axis] > 0.03
        assert np.abs(np.delete(moved, axis)).max() < 0.02
    env.reset(seed=0)
    wide = np.ptp(env.hand()[1])
    for _ in range(10):
        env.step(np.array([0, 0, 0, 0, 0, 0, 1], np.float32))
    assert np.ptp(env.hand()[1]) < wide / 2


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.expert])
def test_the_expert_solves_the_task(envs, task):
    env = envs(task)
    for seed in (0, 1):
        env.reset(seed=seed)
        expert = env.expert()
        for _step in range(env.horizon):
            _, reward, terminated, _, info = env.step(expert.action(env))
            if terminated:
                break
        assert info["success"]
        assert reward > 0


def test_depth_agrees_with_the_geometry(envs):
    """The cube is where its position projects to, at that distance."""
    env = envs("robosuite-lift")
    env.reset(seed=0)
    (x, y), distance = project(env.objects()["cube"], *env.camera_parameters("agentview"))
    assert abs(env.depth("agentview")[int(y), int(x)] - distance) < 0.04


def test_nothing_is_rendered_until_it_is_read(envs, monkeypatch):
    env = make_env("robosuite-lift", image_size=16)
    try:
        made = []
        monkeypatch.setattr("spatial_forcing.envs.simulated.FastRenderer", lambda *a: made.append(a))
        stale, _ = env.reset(seed=0)
        env.step(STILL)
        with pytest.raises(DataError, match="image 'agentview'"):
            stale["images"]["agentview"]
        assert made == []
    finally:
        env.close()
        env.close()


def test_wrong_values_are_named(envs):
    with pytest.raises(ConfigError, match=r"robosuite-square .*robosuite-lift"):
        envs("robosuite-square").expert()
    with pytest.raises(ConfigError, match="robosuite-lift"):
        envs("robosuite-lift").target()
    with pytest.raises(ConfigError, match="Did you mean 'robosuite-lift'"):
        make_env("robosuite-lfit")
    with pytest.raises(ConfigError, match="Did you mean 'agentview'"):
        make_env("robosuite-lift", cameras=("agentvew",))
    env = make_env("robosuite-lift", image_size=16, horizon=2)
    try:
        env.reset(seed=0)
        assert [env.step(STILL)[3] for _ in range(2)] == [False, True]
        with pytest.raises(ConfigError, match=r"2 steps.*reset\(\)"):
            env.step(STILL)
    finally:
        env.close()


def test_without_robosuite_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "robosuite", None)
    with pytest.raises(EnvironmentSetupError, match=r"robosuite==1\.4\.0"):
        make_env("robosuite-lift")


def test_demonstrations_are_recorded_of_what_the_expert_solves(tmp_path):
    with pytest.warns(UserWarning, match=r"robosuite-square.*robosuite-door"):
        config = RecordConfig(tmp_path / "all", env="robosuite")
    assert config.tasks == ("robosuite-lift", "robosuite-stack", "robosuite-can")
    record(RecordConfig(tmp_path / "one", tasks=("robosuite-lift",), episodes_per_task=1, image_size=32))
    dataset = Dataset.open(tmp_path / "one")
    assert dataset.cameras == ("agentview", "robot0_eye_in_hand")
    assert dataset.state.shape[1:] == (9,)
    assert dataset.action.shape[1:] == (7,)
    assert dataset.episodes[0].task == "lift the red cube"


def test_moments_drawn_later_look_as_they_did(envs):
    check_drawn_later(envs("robosuite-lift"))
