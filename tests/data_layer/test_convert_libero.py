"""LIBERO's HDF5 files into a dataset."""

from __future__ import annotations

import io
import json
import struct

import numpy as np
import pytest
from PIL import Image

from spatial_forcing.data import Dataset
from spatial_forcing.data.convert import libero
from spatial_forcing.data.convert.libero import LiberoConverter, moves
from spatial_forcing.data.convert.run import LOG_FILE, convert
from spatial_forcing.envs import make_env
from spatial_forcing.envs.libero_setup import task_entry
from spatial_forcing.errors import ConfigError, DataError
from tests.envs.libero_case import needs_libero, use_assets

h5py = pytest.importorskip("h5py", reason="h5py comes with the extra [libero]")
pytest.importorskip("tfrecord", reason="tfrecord comes with the extra [libero]")
TASK = "put_the_bowl_on_the_plate"


def write(folder, lengths=(6, 4), edit=None):
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / f"{TASK}_demo.hdf5", "w") as file:
        for number, length in enumerate(lengths):
            group = file.create_group(f"data/demo_{number}")
            actions = rng.uniform(-1, 1, (length, 7))
            actions[:, -1] = -1
            actions[2, :-1] = 0  # rests, gripper as before: nothing happens
            actions[3, :-1] = 0
            actions[3:, -1] = 1  # rests, but closes the gripper
            group["actions"] = actions
            group["states"] = rng.normal(size=(length, 20))
            group["obs/ee_states"] = rng.normal(size=(length, 6))
            group["obs/gripper_states"] = rng.normal(size=(length, 2))
            for key in ("agentview_rgb", "eye_in_hand_rgb"):
                group[f"obs/{key}"] = rng.integers(0, 255, (length, 16, 16, 3), dtype=np.uint8)
            if edit:
                edit(group)
    return folder


def converted(tmp_path, **settings):
    config = LiberoConverter(write(tmp_path / "raw"), tmp_path / "out", **settings)
    return Dataset.open(convert(config, progress=False))


def test_frames_without_motion_are_dropped(tmp_path):
    dataset = converted(tmp_path)
    assert [e.stop - e.start for e in dataset.episodes] == [5, 3]
    assert dataset.episodes[0].task == "put the bowl on the plate"
    assert dataset.fps == 20
    with h5py.File(tmp_path / "raw" / f"{TASK}_demo.hdf5") as file:
        group = file["data/demo_0"]
        kept = [0, 1, 3, 4, 5]
        np.testing.assert_allclose(dataset.action[:5], np.asarray(group["actions"])[kept], atol=1e-6)
        state = np.concatenate([group["obs/ee_states"], group["obs/gripper_states"]], 1)[kept]
        np.testing.assert_allclose(dataset.state[:5], state, atol=1e-6)


@pytest.mark.parametrize(("orientation", "turn"), [("openvla", np.s_[::-1, ::-1]), ("upright", np.s_[::-1])])
def test_images_are_oriented(tmp_path, orientation, turn):
    dataset = converted(tmp_path, orientation=orientation, keep_no_ops=True)
    assert len(dataset) == 10
    with h5py.File(tmp_path / "raw" / f"{TASK}_demo.hdf5") as file:
        stored = np.asarray(file["data/demo_1/obs/agentview_rgb"])[2]
    image = np.asarray(dataset.image(6 + 2, "agentview"))
    assert np.array_equal(image, stored[turn])


def test_the_first_frame_at_rest_is_dropped_but_a_gripper_change_is_kept():
    actions = np.zeros((4, 7), np.float32)
    actions[:, -1] = [-1, -1, 1, 1]
    actions[1, 0] = 0.5
    assert moves(actions).tolist() == [False, True, True, False]


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"\*_demo\.hdf5.*\*\.tfrecord"):
        convert(LiberoConverter(tmp_path, tmp_path / "a"))
    raw = write(tmp_path / "raw", edit=lambda group: group.pop("obs/ee_states"))
    with pytest.raises(DataError, match=r"demo_0: 'obs/ee_states' is missing"):
        convert(LiberoConverter(raw, tmp_path / "b"))
    (raw / f"{TASK}_demo.hdf5").write_bytes(b"not hdf5")
    with pytest.raises(DataError, match="cannot be read as HDF5"):
        convert(LiberoConverter(raw, tmp_path / "c"))


def write_played(folder, env):
    """The expert's episode in the official layout, a second that breaks off; returns its first frame."""
    observation, _ = env.reset(seed=0)
    first = {camera: np.array(image) for camera, image in observation["images"].items()}
    expert, done, rows = env.expert(), False, []
    while not done:
        action = expert.action(env)
        rows.append((action, env.simulator_state(), observation["state"]))
        observation, _, done, truncated, _ = env.step(action)
        assert not truncated
    actions, simulator, states = (np.stack(column) for column in zip(*rows, strict=True))
    with h5py.File(folder / f"{task_entry(env.task)}_demo.hdf5", "w") as file:
        for number, length in enumerate((len(rows), 12)):
            group = file.create_group(f"data/demo_{number}")
            group["actions"], group["states"] = actions[:length], simulator[:length]
            group["obs/ee_states"], group["obs/gripper_states"] = states[:length, :6], states[:length, 6:]
            for key in ("agentview_rgb", "eye_in_hand_rgb"):
                group[f"obs/{key}"] = np.zeros((length, 8, 8, 3), np.uint8)
    return first, actions, states


@needs_libero
def test_demonstrations_are_played_again_in_the_simulator(tmp_path, monkeypatch):
    use_assets(monkeypatch, tmp_path / "config")
    (raw := tmp_path / "raw").mkdir()
    env = make_env("libero_spatial-0", image_size=48)
    first, actions, states = write_played(raw, env)
    env.close()
    convert(LiberoConverter(raw, tmp_path / "out", rerender=True, image_size=48), progress=False)
    dataset = Dataset.open(tmp_path / "out")
    assert len(dataset.episodes) == 1  # the one that breaks off never succeeds
    assert dataset.episodes[0].task.startswith("pick up the black bowl between")
    assert list(json.loads((tmp_path / "out" / LOG_FILE).read_text())["skipped"].values()) == [
        "failed when played again"
    ]
    length = len(dataset)
    assert abs(length - len(actions)) <= 3  # success may come a step earlier or later
    np.testing.assert_allclose(dataset.action[: length - 3], actions[: length - 3], atol=1e-6)
    np.testing.assert_allclose(dataset.state[: length - 3, :3], states[: length - 3, :3], atol=0.02)
    for camera, image in first.items():
        assert np.abs(dataset.image(0, camera).astype(float) - image).mean() < 3
        assert np.abs(dataset.image(0, camera)[::-1].astype(float) - image).mean() > 10


def write_rlds(folder, steps=4, edit=None):
    """A TFDS shard: length, checksum (not read), content, checksum."""
    from tfrecord.example_pb2 import Example

    rng = np.random.default_rng(1)
    images = rng.integers(0, 255, (2, steps, 8, 8, 3), dtype=np.uint8)
    actions = rng.uniform(0.1, 1, (steps, 7)).astype(np.float32)
    example = Example()
    feature = example.features.feature
    for key, stack in zip(("image", "wrist_image"), images, strict=True):
        encoded = []
        for image in stack:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            encoded.append(buffer.getvalue())
        feature[f"steps/observation/{key}"].bytes_list.value.extend(encoded)
    feature["steps/action"].float_list.value.extend(actions.ravel())
    feature["steps/observation/state"].float_list.value.extend(rng.normal(size=steps * 8))
    feature["steps/language_instruction"].bytes_list.value.extend([b"turn on the stove"] * steps)
    if edit:
        edit(feature)
    content = example.SerializeToString()
    shard = folder / "libero_goal" / "1.0.0" / "libero-train.tfrecord-00000-of-00001"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(struct.pack("<Q", len(content)) + b"0000" + content + b"0000")
    return images, actions, shard


def test_rlds_shards_are_read_without_tensorflow(tmp_path):
    images, actions, _ = write_rlds(tmp_path / "raw")
    convert(LiberoConverter(tmp_path / "raw", tmp_path / "out"))
    dataset = Dataset.open(tmp_path / "out")
    assert [episode.task for episode in dataset.episodes] == ["turn on the stove"]
    np.testing.assert_allclose(dataset.action, actions, atol=1e-6)
    assert np.array_equal(dataset.image(2, "robot0_eye_in_hand"), images[1, 2])
    convert(LiberoConverter(tmp_path / "raw", tmp_path / "upright", orientation="upright"))
    assert np.array_equal(Dataset.open(tmp_path / "upright").image(2, "agentview"), images[0, 2, :, ::-1])
    with pytest.raises(ConfigError, match=r"TFRecords.*HDF5"):
        convert(LiberoConverter(tmp_path / "raw", tmp_path / "again", rerender=True))


def test_damaged_rlds_shards_are_named(tmp_path):
    *_, shard = write_rlds(tmp_path / "a", edit=lambda feature: feature.pop("steps/action"))
    with pytest.raises(DataError, match="record 0: steps/action missing"):
        convert(LiberoConverter(tmp_path / "a", tmp_path / "out"))
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"libero-train\.tfrecord-00000-of-00001"):
        convert(LiberoConverter(tmp_path / "a", tmp_path / "out"))


def test_going_through_a_shard_reads_each_episode_once(tmp_path, monkeypatch):
    read = []

    def noted(path):
        for number in range(5):
            read.append(number)
            yield f"episode {number}"

    monkeypatch.setattr(libero, "read_episodes", noted)
    shard = libero._Shard(tmp_path)
    assert [shard.episode(i) for i in (0, 1, 3, 4)] == [f"episode {i}" for i in (0, 1, 3, 4)]
    assert read == [0, 1, 2, 3, 4]
    assert shard.episode(1) == "episode 1"  # going back begins again
    assert read == [0, 1, 2, 3, 4, 0, 1]
