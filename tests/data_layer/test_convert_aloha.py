"""ALOHA / AgileX recordings to LeRobot v3.0."""

from __future__ import annotations

import io
import json

import h5py
import numpy as np
import pytest
from PIL import Image

from spatial_forcing import cli
from spatial_forcing.data import Dataset
from spatial_forcing.data.check import check
from spatial_forcing.data.convert.aloha import AlohaConverter
from spatial_forcing.data.convert.hdf5 import episode_files
from spatial_forcing.data.convert.run import convert
from spatial_forcing.envs.aloha import JOINTS
from spatial_forcing.errors import ConfigError, DataError

SIZE = (24, 32)
CAMERAS = ("cam_high", "cam_left_wrist")


def picture(frame, camera):
    """Smooth and mostly red, so that a swapped channel shows and JPEG keeps it."""
    y, x = np.mgrid[0 : SIZE[0], 0 : SIZE[1]]
    return np.stack([180 + x + frame, 2 * y + 10 * CAMERAS.index(camera), 20 + 0 * x], -1).astype(np.uint8)


def encoded(image, kind="JPEG"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=kind, quality=95)
    return buffer.getvalue()


def write_episode(path, length=6, storage="raw", task=None, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = np.arange(length, dtype=np.float32)[:, None]
    arrays = {
        "observations/qpos": steps + np.arange(14, dtype=np.float32) / 100,
        "observations/qvel": np.zeros((length, 14)),
        "action": steps + 1 + np.arange(14, dtype=np.float32) / 100,
    } | changes
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            file.create_dataset(name, data=value)
        for camera in CAMERAS:
            frames = [picture(i, camera) for i in range(length)]
            name = f"observations/images/{camera}"
            if storage == "raw":
                file.create_dataset(name, data=np.stack(frames))
                continue
            images = [encoded(frame) for frame in frames]
            longest = max(map(len, images))
            if storage == "padded":
                rows = [np.frombuffer(image.ljust(longest, b"\0"), np.uint8) for image in images]
                file.create_dataset(name, data=np.stack(rows))
            elif storage == "strings":
                file.create_dataset(name, data=np.array(images, f"S{longest}"))
            else:
                array = file.create_dataset(name, (length,), h5py.vlen_dtype(np.uint8))
                for i, image in enumerate(images):
                    array[i] = np.frombuffer(image, np.uint8)
        if task:
            file.attrs["task"] = task
    return path


@pytest.fixture
def source(tmp_path):
    for number, length in enumerate((6, 8)):
        write_episode(tmp_path / "raw" / f"episode_{number}.hdf5", length)
    return tmp_path / "raw"


def converted(source, **options):
    output = source.parent / "out"
    return Dataset.open(
        convert(AlohaConverter(source, output, **{"task": "lift the pot", **options}), progress=False)
    )


@pytest.mark.parametrize("storage", ["raw", "padded", "strings", "vlen"])
def test_every_way_of_storing_images(tmp_path, storage):
    write_episode(tmp_path / "raw" / "episode_0.hdf5", 5, storage)
    dataset = converted(tmp_path / "raw", video=False)
    assert dataset.cameras == CAMERAS
    tolerance = 0 if storage == "raw" else 12
    for camera in CAMERAS:
        for frame in range(5):
            stored = dataset.image(frame, camera).astype(int)
            np.testing.assert_allclose(stored, picture(frame, camera).astype(int), atol=tolerance)


def test_numbers_names_tasks_and_statistics(source):
    dataset = converted(source)
    assert [episode.length for episode in dataset.episodes] == [6, 8]
    assert {episode.task for episode in dataset.episodes} == {"lift the pot"}
    assert dataset.fps == 50
    assert tuple(dataset.info.features["action"]["names"]) == JOINTS
    assert dataset.info.robot_type == "aloha"
    np.testing.assert_allclose(dataset.state[:6, 3], np.arange(6) + 0.03, rtol=1e-6)
    np.testing.assert_allclose(dataset.action, dataset.state + 1, rtol=1e-6)
    np.testing.assert_allclose(dataset.statistics()["action"]["max"], 8 + np.arange(14) / 100, rtol=1e-6)
    assert check(source.parent / "out") == []


def test_cameras_can_be_chosen_renamed_and_resized(source):
    dataset = converted(source, cameras={"cam_high": "top"}, image_size=(12, 16), fps=30, video=False)
    assert dataset.cameras == ("top",)
    assert dataset.image(0, "top").shape == (12, 16, 3)
    assert dataset.fps == 30


def test_red_and_blue_can_be_exchanged(source):
    image = converted(source, swap_colours=True, video=False).image(0, "cam_high")
    np.testing.assert_array_equal(image, picture(0, "cam_high")[..., ::-1])


def test_episodes_come_in_natural_order(tmp_path):
    for name in ("b/episode_2.hdf5", "b/episode_10.hdf5", "a/episode_3.h5", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [str(path.relative_to(tmp_path)) for path in episode_files(tmp_path)[0]]
    assert names == ["a/episode_3.h5", "b/episode_2.hdf5", "b/episode_10.hdf5"]


@pytest.mark.parametrize("place", ["attribute", "array", "json", "list"])
def test_the_instruction_is_found(tmp_path, place):
    folder = tmp_path / "raw"
    extra = {"instruction": "stack the cups"} if place == "array" else {}
    write_episode(
        folder / "day1" / "episode_0.hdf5",
        3,
        task="stack the cups" if place == "attribute" else None,
        **extra,
    )
    if place == "json":
        (folder / "instructions.json").write_text(json.dumps({"instruction": "stack the cups"}))
    if place == "list":
        (folder / "day1" / "instructions.json").write_text(
            json.dumps({"instructions": ["stack the cups", "x"]})
        )
    assert converted(folder, task=None).episodes[0].task == "stack the cups"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"action": np.ones((5, 14))},
            r"episode episode_1.hdf5: its arrays have different lengths: .*'action': 5",
        ),
        (
            {"observations/qpos": np.full((6, 14), np.nan)},
            r"episode_1.hdf5: frame 0: observation.state is not finite",
        ),
        (
            {"observations/qpos": np.arange(42.0).reshape(6, 7)},
            r"episode_1.hdf5: frame 0: observation.state has shape \(7,\)",
        ),
    ],
)
def test_damaged_episodes_are_named_and_those_before_kept(source, changes, message):
    write_episode(source / "episode_1.hdf5", 6, **changes)
    with pytest.raises(DataError, match=message):
        converted(source)
    write_episode(source / "episode_1.hdf5", 6)
    assert len(converted(source).episodes) == 2


def test_a_broken_picture_a_truncated_file_and_a_missing_array(source):
    write_episode(source / "episode_1.hdf5", 6, "padded")
    with h5py.File(source / "episode_1.hdf5", "r+") as file:
        file["observations/images/cam_high"][3] = 7
    with pytest.raises(
        DataError, match=r"episode_1.hdf5: frame 3 of /observations/images/cam_high is not an image"
    ):
        converted(source)
    with h5py.File(source / "episode_1.hdf5", "r+") as file:
        del file["action"]
    with pytest.raises(DataError, match=r"no array 'action'; it holds observations, .*qpos"):
        converted(source)
    data = (source / "episode_0.hdf5").read_bytes()
    (source / "episode_1.hdf5").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"episode_1.hdf5 cannot be read as HDF5"):
        converted(source)


def test_wrong_settings_are_named(source, tmp_path):
    with pytest.raises(ConfigError, match=r"Did you mean 'cam_high'"):
        converted(source, cameras={"cam_hihg": "top"})
    with pytest.raises(DataError, match="it does not say what the task is; give --task"):
        converted(source, task=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.hdf5 file"):
        episode_files(tmp_path / "empty")
    with pytest.raises(DataError, match=r"/none is"):
        episode_files(tmp_path / "none")
    with pytest.raises(ConfigError, match="fps is 0"):
        AlohaConverter(source, tmp_path, fps=0)


def test_suspicious_episodes_are_reported_but_kept(tmp_path):
    folder = tmp_path / "raw"
    for number in range(3):
        write_episode(folder / f"episode_{number}.hdf5", 20)
    write_episode(folder / "episode_3.hdf5", 3)
    with h5py.File(write_episode(folder / "episode_4.hdf5", 20), "r+") as file:
        file["observations/images/cam_high"][:] = picture(0, "cam_high")
    with pytest.warns(UserWarning) as caught:  # noqa: PT030
        assert len(converted(folder).episodes) == 5
    told = " | ".join(str(warning.message) for warning in caught)
    assert "episode_3.hdf5: has 3 frames, the median is 20" in told
    assert "episode_4.hdf5: camera 'cam_high' repeats its picture in 19 of 20 steps" in told
    assert "episode_1" not in told


def test_the_command(source, capsys):
    out = source.parent / "cli"
    cli.run(
        ["data", "convert", "aloha", "--source", str(source), "--output", str(out), "--task", "lift the pot"]
    )
    assert "2 episodes, 14 frames" in capsys.readouterr().out
    cli.run(["data", "check", str(out)])
