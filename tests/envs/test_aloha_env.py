from __future__ import annotations

import sys

import numpy as np
import pytest

from spatial_forcing.envs import EVALUATION_SEEDS, list_tasks, make_env
from spatial_forcing.envs.aloha import CAMERAS, INSTRUCTIONS, JOINTS
from spatial_forcing.errors import ConfigError, DataError, EnvironmentSetupError
from spatial_forcing.protocols import Env

TASK = "aloha-transfer-cube"


@pytest.fixture(scope="module")
def env():
    env = make_env(TASK, image_size=(48, 64), horizon=40)
    yield env
    env.close()


def wave(step):
    """A smooth joint trajectory around the start pose."""
    start = np.array([0, -0.96, 1.16, 0, -0.3, 0, 0.5] * 2, np.float32)
    return start + 0.2 * np.sin(0.3 * step + np.arange(14)).astype(np.float32)


def play(env, seed, steps=20):
    observation, _ = env.reset(seed=seed)
    states = [observation["state"]]
    for step in range(steps):
        observation, *_ = env.step(wave(step))
        states.append(observation["state"])
    return np.stack(states), {c: observation["images"][c] for c in env.cameras}


def test_the_suite_knows_its_tasks():
    assert set(list_tasks("aloha")) == set(INSTRUCTIONS)


def test_observation_and_spaces(env):
    assert isinstance(env, Env)
    assert env.cameras == CAMERAS
    observation, info = env.reset(seed=3)
    assert info == {"success": False, "seed": 3}
    assert observation["state"].shape == env.action_space.shape == (len(JOINTS),) == (14,)
    assert observation["task"] == INSTRUCTIONS[TASK]
    images = [observation["images"][camera] for camera in env.cameras]
    assert all(image.shape == (48, 64, 3) and image.dtype == np.uint8 for image in images)
    assert all(image.std() > 5 for image in images)
    assert len({image.tobytes() for image in images}) == 3
    assert env.observation_space.contains({**observation, "images": dict(observation["images"])})


@pytest.mark.parametrize("task", sorted(INSTRUCTIONS))
def test_a_seed_determines_the_episode(task):
    env = make_env(task, image_size=32, cameras=("top",))
    first, images = play(env, 7)
    play(env, 8, 5)
    again, same = play(env, 7)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(images["top"], same["top"])
    _, changed = play(env, 8)
    assert not np.array_equal(images["top"], changed["top"])
    by_index, _ = env.reset(options={"init_state": 5})
    by_seed, _ = env.reset(seed=EVALUATION_SEEDS[5])
    np.testing.assert_array_equal(by_index["state"], by_seed["state"])
    env.close()
    env.close()


def test_physics_equal_gym_alohas_own(env, monkeypatch):
    """Same states and rewards as the published environment, which renders 480 x 640 at every step."""
    from gym_aloha.env import AlohaEnv as Published
    from gym_aloha.tasks.sim import BimanualViperXTask

    def without_images(self, physics):
        return {"qpos": self.get_qpos(physics), "images": {"top": np.zeros(0)}}

    monkeypatch.setattr(BimanualViperXTask, "get_observation", without_images)
    theirs = Published("transfer_cube", obs_type="pixels_agent_pos")
    mine, _ = env.reset(seed=11)
    published, _ = theirs.reset(seed=11)
    for step in range(20):
        np.testing.assert_array_equal(mine["state"], published["agent_pos"].astype(np.float32))
        mine, reward, *_ = env.step(wave(step))
        published, their_reward, *_ = theirs.step(wave(step))
        assert reward == their_reward


def test_joints_go_where_the_action_says(env):
    observation, _ = env.reset(seed=0)
    target = observation["state"].copy()
    target[[0, 7]] += 0.3
    for _ in range(30):
        observation, *_ = env.step(target)
    np.testing.assert_allclose(observation["state"][[0, 7]], target[[0, 7]], atol=0.02)


def test_limits_horizon_and_bad_actions(env):
    env.reset(seed=0)
    with pytest.raises(DataError, match="expected 14 finite"):
        env.step(np.zeros(7, np.float32))
    with pytest.raises(DataError, match="expected 14 finite"):
        env.step(np.full(14, np.nan, np.float32))
    assert env.action_space.low[[6, 13]].tolist() == [0, 0]
    assert env.action_space.high[[6, 13]].tolist() == [1, 1]
    truncated = False
    for step in range(40):
        assert not truncated
        _, _, terminated, truncated, info = env.step(wave(step) * 100)  # clipped
        assert not terminated
    assert truncated
    assert info["success"] is False
    with pytest.raises(ConfigError, match="was truncated after 40 steps"):
        env.step(wave(0))


def test_success_is_gym_alohas_reward_of_four(env, monkeypatch):
    env.reset(seed=0)
    monkeypatch.setattr(type(env._sim.task), "get_reward", lambda self, physics: 4)
    assert env.step(wave(0))[4] == {"success": True}


def test_images_are_those_of_their_moment(env):
    observation, _ = env.reset(seed=0)
    env.step(wave(0))
    with pytest.raises(DataError, match=r"image 'top'"):
        observation["images"]["top"]


def test_camera_parameters(env):
    env.reset(seed=0)
    K, pose = env.camera_parameters("top")
    assert K[0, 2] == 32
    np.testing.assert_allclose(pose[:3, 3], [0, 0.6, 0.8], atol=1e-9)
    assert pose[2, 2] < -0.9  # looks down
    with pytest.raises(ConfigError, match="Did you mean 'top'"):
        env.camera_parameters("topp")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cameras": ("cam_high",)}, "unknown camera of aloha-transfer-cube 'cam_high'"),
        ({"cameras": ("top", "top")}, "different names"),
        ({"horizon": 0}, "horizon is 0"),
        ({"image_size": 0}, "image_size is .0, 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_env(TASK, **settings)


def test_options_are_checked(env):
    with pytest.raises(ConfigError, match="init_state is -1"):
        env.reset(options={"init_state": -1})
    with pytest.raises(ConfigError, match="unknown reset option 'state'"):
        env.reset(options={"state": 1})
    assert env.reset()[1]["seed"] != env.reset()[1]["seed"]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gym_aloha.constants", None)
    with pytest.raises(EnvironmentSetupError, match=r"pip install \"spatial-forcing\[aloha\]\""):
        make_env(TASK)
