"""LeRobot v2.0 and v2.1 datasets with videos: frames, rows, and what copying packets cannot do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from spatial_forcing.data import Dataset
from spatial_forcing.data.check import check
from spatial_forcing.data.convert.lerobot_v2 import LeRobotV2Converter
from spatial_forcing.data.convert.run import convert, read_log
from spatial_forcing.errors import ConfigError, DataError
from tests.data_layer.recordings import write_v2

FPS, KEY = 10, "observation.images.top"
LENGTHS = (12, 7, 9)


def picture(episode, frame, size=(64, 48)):
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    base = [x * 3 + 9 * frame, y * 2 + 40 * episode, (x + y) + 5 * frame]
    return (np.stack(base, -1) % 256).astype(np.uint8)


def write_video(path, episode, frames, codec="libx264", rate=FPS, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width = picture(0, 0).shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(episode, frame), format="rgb24")))
        container.mux(stream.encode(None))


def decoded(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def video_of(root, episode):
    return root / f"videos/chunk-000/{KEY}/episode_{episode:06d}.mp4"


def dataset_v2(root, lengths=LENGTHS, videos=None, version="v2.1", **options):
    """`videos`: for each episode keyword arguments of `write_video`."""
    root.mkdir()
    write_v2(root, lengths, images=False, version=version)
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    info["features"][KEY] = {
        "dtype": "video", "shape": [64, 48, 3], "names": ["height", "width", "channel"],
        "info": {"video.fps": FPS, "video.codec": "h264"},
    }  # fmt: skip
    path.write_text(json.dumps(info))
    for episode, length in enumerate(lengths):
        given = {"frames": length, **options, **((videos or {}).get(episode, {}))}
        write_video(video_of(root, episode), episode, **given)
    return root


def converted(root, output=None) -> Dataset:
    return Dataset.open(convert(LeRobotV2Converter(root, output or root.parent / "out"), progress=False))


def files(dataset):
    return sorted(str(path.relative_to(dataset.root)) for path in (dataset.root / "videos").rglob("*.mp4"))


def assert_same_frames(dataset, root, lengths=LENGTHS, tolerance=0):
    for episode, length in zip(dataset.episodes, lengths, strict=True):
        frames = decoded(video_of(root, episode.index))
        for i in reversed(range(length)):  # backwards, so that every frame is sought
            found = dataset.image(episode.start + i, "top").astype(int)
            assert np.abs(found - frames[i]).max() <= tolerance, (episode.index, i)


# x265's vector code writes past its buffers at this size (glibc: "corrupted size vs. prev_size"): asm=0.
CODECS = {
    "h264 with B frames": {"codec": "libx264", "bf": 3, "g": 12},
    "h264 of LeRobot": {"codec": "libx264", "g": 2, "crf": 30},
    "hevc": {"codec": "libx265", "g": 4, "x265-params": "log-level=none:asm=0"},
    "av1": {"codec": "libsvtav1", "g": 2, "crf": 30},
    "mpeg4": {"codec": "mpeg4", "g": 5},
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_packets_are_copied_and_frames_stay_the_same(tmp_path, codec, version):
    root = dataset_v2(tmp_path / "raw", version=version, **CODECS[codec])
    dataset = converted(root)
    assert_same_frames(dataset, root)
    assert files(dataset) == [f"videos/{KEY}/chunk-000/file-000.mp4"]
    with av.open(str(dataset.root / files(dataset)[0])) as container:
        kinds = {"libx264": "h264", "libx265": "hevc", "libsvtav1": "av1", "mpeg4": "mpeg4"}
        assert kinds[CODECS[codec]["codec"]] in (container.streams.video[0].codec.canonical_name,)
    assert all(problem.note for problem in check(dataset.root))


def test_rows_tasks_and_further_features_arrive(tmp_path, caplog):
    root = dataset_v2(tmp_path / "raw")
    dataset = converted(root)
    source = [pq.read_table(path) for path in sorted((root / "data").rglob("*.parquet"))]
    for column, found in (("observation.state", dataset.state), ("action", dataset.action)):
        wanted = np.concatenate([np.stack(table[column].to_pylist()) for table in source])
        np.testing.assert_array_equal(found, wanted.astype(np.float32))
    assert [episode.task for episode in dataset.episodes] == ["task 0", "task 1", "task 0"]
    assert dataset.fps == FPS
    assert dataset.info.robot_type == "so100"
    table = pq.read_table(dataset.root / "data/chunk-000/file-000.parquet")
    done = [i for i, value in enumerate(table["next.done"].to_pylist()) if value]
    assert done == [11, 18, 27]
    assert "note (string)" in read_log(dataset.root)["unused"]
    assert caplog.text.count("note (string)") == 1


def test_other_encodings_get_a_file_of_their_own(tmp_path):
    """Packets of different encodings cannot follow each other in one file."""
    root = dataset_v2(tmp_path / "raw", videos={1: {"codec": "mpeg4"}})
    dataset = converted(root)
    assert len(files(dataset)) == 3
    assert_same_frames(dataset, root)


@pytest.mark.parametrize("bf", [0, 3])
def test_frames_behind_the_last_row_are_cut_off(tmp_path, bf):
    """By packets where no earlier frame needs them, else by encoding again."""
    root = dataset_v2(tmp_path / "raw", videos={1: {"frames": 10}}, bf=bf, g=30)
    dataset = converted(root)
    assert_same_frames(dataset, root, tolerance=0 if bf == 0 else 24)
    assert all(problem.note for problem in check(dataset.root))


def test_videos_that_do_not_fit_the_rows_are_refused_and_those_before_kept(tmp_path):
    root = dataset_v2(tmp_path / "raw", videos={1: {"frames": 6}})
    with pytest.raises(DataError, match=r"episode 1: .*episode_000001\.mp4.*0\.6"):
        converted(root)
    write_video(video_of(root, 1), 1, 7)
    assert_same_frames(converted(root), root)


def edit(path: Path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: edit(root / "meta/info.json", lambda c: c.update(codebase_version="v3.0")), r"'v3\.0'"),
        (lambda root: (root / "meta/info.json").unlink(), r"info\.json"),
        (lambda root: (root / "meta/tasks.jsonl").write_text('{"task_index": 0}\n'), r"tasks\.jsonl, line 1"),
        (lambda root: (root / "meta/episodes.jsonl").write_text(""), "no episode"),
        (
            lambda root: (root / "data/chunk-000/episode_000002.parquet").unlink(),
            r"episode 2.*episode_000002",
        ),
        (
            lambda root: edit(root / "meta/info.json", lambda c: c.update(data_path="../x-{episode_index}")),
            r"\.\./x-0",
        ),
        (
            lambda root: edit(root / "meta/info.json", lambda c: c.update(data_path="data/{nothing}")),
            "data_path.*nothing",
        ),
        (
            lambda root: (root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "a"}\n'),
            r"episode 1: .*task index 1",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path, spoil, message):
    root = dataset_v2(tmp_path / "raw")
    spoil(root)
    with pytest.raises(DataError, match=message):
        converted(root)


def test_another_sources_output_is_left_alone(tmp_path):
    root = dataset_v2(tmp_path / "raw")
    first = converted(root, tmp_path / "out")
    shutil.copytree(root, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"/out holds .*source: there '.*/raw'"):
        converted(tmp_path / "other", tmp_path / "out")
    assert len(Dataset.open(first.root)) == sum(LENGTHS)
