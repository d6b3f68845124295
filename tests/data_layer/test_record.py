import json
from dataclasses import replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest

from spatial_forcing.data import Dataset, record
from spatial_forcing.data.check import check
from spatial_forcing.data.record import SEED_STRIDE, RecordConfig
from spatial_forcing.data.writer import DatasetWriter
from spatial_forcing.envs.base import DEMONSTRATION_SEEDS
from spatial_forcing.errors import ConfigError, DataError, EnvironmentSetupError


class CountingEnv:
    """Succeeds after `3 + seed % 4` steps; the episodes of the seeds in `hopeless` never do."""

    metadata: ClassVar = {"render_fps": 10}
    cameras = ("front",)

    def __init__(self, task, *, cameras, image_size, horizon, hopeless=()):
        self.task, self.size, self.horizon, self.hopeless = task, image_size, horizon, hopeless
        self.action_space = np.zeros(2)

    def reset(self, *, seed=None, options=None):
        self.seed, self.steps = seed, 0
        return self._observe(), {"success": False}

    def step(self, action):
        self.steps += 1
        success = self.seed not in self.hopeless and self.steps == 3 + self.seed % 4
        return self._observe(), 0.0, False, self.steps >= self.horizon, {"success": success}

    def _observe(self):
        image = np.full((self.size, self.size, 3), (self.seed * 7 + self.steps) % 256, np.uint8)
        state = np.array([self.seed, self.steps], np.float32)
        return {"images": {"front": image}, "state": state, "task": f"do {self.task}"}

    def expert(self):
        return self

    def action(self, env):
        return np.array([5.0, -0.25], np.float32)

    def depth(self, camera):
        return np.full((self.size, self.size), 1.5, np.float32)

    def camera_parameters(self, camera):
        return np.diag([4.0, 4.0, 1.0]), np.eye(4) * (1 + self.steps)

    def close(self):
        self.steps = -1


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "make_env", CountingEnv)
    return partial(
        RecordConfig,
        root=tmp_path / "d",
        tasks=("reach-v3", "push-v3"),
        episodes_per_task=2,
        cameras=("front",),
        image_size=8,
        settle_steps=2,
        horizon=20,
        workers=1,
        progress=False,
    )


def test_records_every_task_until_a_little_after_success(config):
    dataset = Dataset.open(record.record(config()))
    assert [e.task for e in dataset.episodes] == ["do reach-v3"] * 2 + ["do push-v3"] * 2
    assert [e.length for e in dataset.episodes] == [3 + 2, 4 + 2, 3 + 2, 4 + 2]
    assert dataset.state[:5, 1].tolist() == [0, 1, 2, 3, 4]
    assert dataset.action[0].tolist() == [1, -0.25]  # clipped to [-1, 1]
    assert check(dataset.root) == []


def test_noise_pushes_the_robot_and_stores_what_the_expert_wanted(config, monkeypatch):
    executed = []

    class Noted(CountingEnv):
        def action(self, env):
            return np.array([0.2, -0.25], np.float32)

        def step(self, action):
            executed.append(action.copy())
            return super().step(action)

    monkeypatch.setattr(record, "make_env", Noted)
    dataset = Dataset.open(record.record(config(noise=0.5)))
    np.testing.assert_allclose(dataset.action, np.tile([0.2, -0.25], (len(dataset), 1)), atol=1e-6)
    pushed = np.array(executed)
    assert pushed.dtype == np.float32
    assert np.abs(pushed[:, 0] - 0.2).min() > 0
    np.testing.assert_allclose(pushed[:, 1], -0.25)  # the gripper's is left alone
    executed.clear()
    record.record(config(noise=0.5, root=dataset.root.parent / "again"))
    np.testing.assert_array_equal(pushed, np.array(executed))


def test_disturbances_are_correlated_and_as_large_as_asked():
    series = np.array(
        [
            [next(pushes)[0] for _ in range(50)]
            for pushes in (record.disturbances(0.6, 3, seed) for seed in range(400))
        ]
    )
    # The share of an episode is uniform: the mean square is a third of the largest.
    assert np.sqrt(3 * (series**2).mean()) == pytest.approx(0.6, rel=0.1)
    neighbours = (series[:, 1:] * series[:, :-1]).mean() / (series**2).mean()
    assert neighbours == pytest.approx(record.CORRELATION, abs=0.05)
    assert abs(series.mean()) < 0.03
    assert not np.any(next(record.disturbances(0.0, 3, 0)))


def test_failed_attempts_are_repeated_with_the_next_seed_and_counted(config, monkeypatch):
    monkeypatch.setattr(record, "make_env", partial(CountingEnv, hopeless=(1, 1 + SEED_STRIDE)))
    root = record.record(config(tasks=("reach-v3",)))
    log = json.loads((root / "meta/recording.json").read_text())
    assert log["seeds"] == {"0": 0, "1": 1 + 2 * SEED_STRIDE}
    assert log["failures"] == {"reach-v3": 2}
    assert len(Dataset.open(root).episodes) == 2


class LaterEnv(CountingEnv):
    """Draws later; counts what it drew."""

    drawn: ClassVar[list] = []

    def _observe(self):
        return super()._observe() | {"images": None}

    def moment(self):
        return self.seed, self.steps

    def draw(self, moment):
        self.drawn.append(moment)
        seed, steps = moment
        image = np.full((self.size, self.size, 3), (seed * 7 + steps) % 256, np.uint8)
        return {"front": (image, np.full((self.size, self.size), 1.5, np.float32))}


def test_attempts_that_fail_are_never_drawn(config, monkeypatch):
    settings = config(depth=True, workers=1)
    first = DEMONSTRATION_SEEDS[0]
    monkeypatch.setattr(record, "make_env", partial(CountingEnv, hopeless=(first,)))
    inline = Dataset.open(record.record(settings))
    monkeypatch.setattr(record, "make_env", partial(LaterEnv, hopeless=(first,)))
    LaterEnv.drawn.clear()
    later = Dataset.open(record.record(replace(settings, root=settings.root.parent / "later")))
    assert first not in {seed for seed, _ in LaterEnv.drawn}
    assert len(LaterEnv.drawn) == len(later) == len(inline)
    for episode in range(len(inline.episodes)):
        assert later.content_hash(episode, geometry=True) == inline.content_hash(episode, geometry=True)


def test_a_task_that_the_expert_cannot_solve_is_named(config, monkeypatch):
    seeds = tuple(range(0, 20 * SEED_STRIDE, SEED_STRIDE))
    monkeypatch.setattr(record, "make_env", partial(CountingEnv, hopeless=seeds))
    with pytest.raises(DataError, match=r"expert of reach-v3 failed 10 times .* episode 0"):
        record.record(config())


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_an_interrupted_recording_resumes_to_the_same_dataset(config, tmp_path, monkeypatch, stop_at):
    whole = Dataset.open(record.record(config(root=tmp_path / "whole")))
    original = record.demonstrate

    def interrupted(settings, info, env, slot):
        if (env.task == "push-v3") * 2 + slot == stop_at:
            raise KeyboardInterrupt
        return original(settings, info, env, slot)

    with monkeypatch.context() as patch:
        patch.setattr(record, "demonstrate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            record.record(config())
    resumed = Dataset.open(record.record(config()))
    assert np.array_equal(resumed.state, whole.state)
    assert [resumed.content_hash(e) for e in range(4)] == [whole.content_hash(e) for e in range(4)]
    logs = [json.loads((d.root / "meta/recording.json").read_text()) for d in (resumed, whole)]
    assert logs[0] == logs[1]


def test_a_recording_that_was_never_packed_is_finished(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "finalize", lambda writer: None)
        record.record(config())
    with monkeypatch.context() as patch:
        patch.setattr(record, "demonstrate", lambda *args: pytest.fail("nothing is left to record"))
        root = record.record(config(workers=2))
    assert len(Dataset.open(root).episodes) == 4
    assert check(root) == []


def test_a_finished_recording_is_returned_and_another_is_refused(config, monkeypatch):
    record.record(config())
    monkeypatch.setattr(record, "make_env", None)  # would fail if it recorded anything
    record.record(config(workers=2))
    with pytest.raises(ConfigError, match="image_size: there 8, asked for 16"):
        record.record(config(image_size=16))


def test_another_folder_is_not_touched(config, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"/d is not empty"):
        record.record(config())
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["notes.txt"]


def test_depth_and_poses(config):
    dataset = Dataset.open(record.record(config(depth=True)))
    assert dataset.depth(0, "front") == pytest.approx(1.5)
    assert dataset.intrinsics("front")[0, 0] == 4
    assert dataset.extrinsics(2, "front") == pytest.approx(np.eye(4) * 3)


def test_too_little_disk_is_said_first(config):
    with pytest.raises(EnvironmentSetupError, match=r"needs [\d,]+ MiB in .*/d"):
        record.record(config(image_size=100_000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("reech-v3",)}, "Did you mean 'reach-v3'"),
        ({"tasks": ()}, "at least one task"),
        ({"episodes_per_task": 0}, "at least 1"),
        ({"first_seed": SEED_STRIDE}, "together"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, change, message):
    with pytest.raises(ConfigError, match=message):
        config(**change)


def test_seeds_stay_within_the_demonstrations():
    assert (record.MAX_ATTEMPTS - 1) * SEED_STRIDE + SEED_STRIDE - 1 in DEMONSTRATION_SEEDS


def test_metaworld_does_not_depend_on_the_number_of_workers(tmp_path):
    pytest.importorskip("metaworld")
    recorded = []
    for workers in (1, 2):
        settings = RecordConfig(
            tmp_path / str(workers),
            ("reach-v3",),
            episodes_per_task=2,
            image_size=32,
            depth=True,
            workers=workers,
            progress=False,
        )
        recorded.append(Dataset.open(record.record(settings)))
    one, two = recorded
    assert np.array_equal(one.state, two.state)
    assert [one.content_hash(e) for e in range(2)] == [two.content_hash(e) for e in range(2)]
    assert one.state.shape[1] == 4
    assert one.cameras == ("corner2", "gripperPOV")
    assert 0.1 < one.depth(0, "corner2").min() < 3
    assert not np.array_equal(one.extrinsics(0, "gripperPOV"), one.extrinsics(20, "gripperPOV"))
