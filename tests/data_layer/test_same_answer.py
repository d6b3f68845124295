"""Damaged and odd datasets: `data check`, opening, training and `cache build` give the same answer.

Each case is either read rightly by all of them or refused by name by all of them.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from spatial_forcing import cli
from spatial_forcing.data import Dataset
from spatial_forcing.data.check import check
from spatial_forcing.data.info import parse_keys
from spatial_forcing.data.recompute import recompute_stats
from spatial_forcing.data.video import join_videos
from spatial_forcing.errors import SpatialForcingError
from spatial_forcing.forcing import ForcingConfig
from spatial_forcing.students import NanoConfig, load_student
from spatial_forcing.teachers.cache import CachedTeacher
from spatial_forcing.teachers.cache.build import build_cache
from spatial_forcing.teachers.cache.source import dataset_source
from spatial_forcing.training import OptimConfig, TrainConfig, train
from tests.fakes import FakeTeacher

DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
FRONT = "observation.images.front"
VIDEO = f"videos/{FRONT}/chunk-000/file-000.mp4"
FPS = 20
STUDENT = NanoConfig(
    ("front", "wrist"), image_size=16, patch_size=8, width=32, depth=1, heads=2, chunk=2, action_dim=2
)


# ---- ways to spoil a dataset


def edit_info(**changes):
    def spoil(root, build):
        path = root / "meta/info.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def edit_feature(key, **changes):
    def spoil(root, build):
        path = root / "meta/info.json"
        content = json.loads(path.read_text())
        content["features"].setdefault(key, {}).update(changes)
        path.write_text(json.dumps(content))

    return spoil


def rename_feature(old, *new):
    """Under another name, or split into several features of equal width."""

    def spoil(root, build):
        path = root / "meta/info.json"
        content = json.loads(path.read_text())
        feature = content["features"].pop(old)
        statistics = json.loads((root / "meta/stats.json").read_text())
        for name in new:
            content["features"][name] = {**feature}
            statistics[name] = statistics[old]
            if len(new) > 1:
                content["features"][name]["shape"] = [feature["shape"][0] // len(new)]
        path.write_text(json.dumps(content))
        (root / "meta/stats.json").write_text(json.dumps(statistics))
        table = pq.read_table(root / DATA)
        values = table[old].to_pylist()
        table = table.drop_columns([old])
        for i, name in enumerate(new):
            width = len(values[0]) // len(new) if isinstance(values[0], list) else None
            part = [row[i * width : (i + 1) * width] if len(new) > 1 else row for row in values]
            table = table.append_column(name, pa.array(part))
        write_table(root, table.replace_schema_metadata(None))

    return spoil


def write_table(root, table):
    with pq.ParquetWriter(root / DATA, table.schema) as writer:
        for start, stop in itertools.pairwise([0, 6, 15, 19]):
            writer.write_table(table.slice(start, stop - start))


def put(name, change):
    """`change` the list of a column's values."""

    def spoil(root, build):
        table = pq.read_table(root / DATA)
        values = table[name].to_pylist()
        change(values)
        field = table.schema.field(name)
        at = table.column_names.index(name)
        write_table(root, table.set_column(at, field, pa.array(values, field.type)))

    return spoil


def set_rows(name, rows):
    def change(values):
        for row, value in rows.items():
            values[row] = value

    return put(name, change)


def edit_episodes(change):
    def spoil(root, build):
        rows = pq.read_table(root / EPISODES).to_pylist()
        rows = change(rows) or rows
        pq.write_table(pa.Table.from_pylist(rows), root / EPISODES)

    return spoil


def shift_spans(*episodes, frames=1, ends=("from", "to")):
    def change(rows):
        for number in episodes:
            for end in ends:
                rows[number][f"videos/{FRONT}/{end}_timestamp"] += frames / FPS

    return edit_episodes(change)


def short_video(root, build):
    """The file lacks a frame of episode 1, so that everything behind it comes a frame early."""
    parts = []
    for episode, length in enumerate((6, 8, 4)):
        other = build.new_writer(root.parent / f"part{episode}", video=True)
        build.add_episode(other, episode, length)
        other.finalize()
        parts.append(root.parent / f"part{episode}" / VIDEO)
    join_videos(parts, (6, 8, 4), FPS, root / VIDEO)


def reencode(mode):
    def change(values):
        for row, cell in enumerate(values):
            with Image.open(io.BytesIO(cell["bytes"])) as image:
                changed = image.convert("L" if mode == "I;16" else mode)
            if mode == "I;16":
                changed = Image.fromarray(np.asarray(changed).astype(np.uint16) * 200)
            buffer = io.BytesIO()
            changed.save(buffer, format="PNG")
            values[row] = {"bytes": buffer.getvalue(), "path": None}

    return put(FRONT, change)


def link_data_elsewhere(root, build):
    elsewhere = root.parent / "elsewhere.parquet"
    (root / DATA).rename(elsewhere)
    (root / DATA).symlink_to(elsewhere)


def hub_snapshot(root, build):
    """As `snapshot_download` leaves it in the hub's cache: links to blobs beside the snapshots."""
    repository = root.parent / "datasets--someone--demo"
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(root.rglob("*.parquet"))):
        blob = repository / "blobs" / str(number)
        path.rename(blob)
        path.symlink_to(blob)
    (repository / "snapshots").mkdir()
    root.rename(repository / "snapshots" / "main")
    root.symlink_to(repository / "snapshots" / "main")


def renumber_tasks(root, build):
    """Task indices 3 and 8 instead of 0 and 1."""
    path = root / "meta/tasks.parquet"
    table = pq.read_table(path)
    new = pa.array([3, 8], pa.int64())
    at = table.column_names.index("task_index")
    pq.write_table(table.set_column(at, "task_index", new), path)
    put("task_index", lambda values: values.__setitem__(slice(None), [[3, 8][v] for v in values]))(
        root, build
    )


def wrong_stats(root, build):
    path = root / "meta/stats.json"
    content = json.loads(path.read_text())
    content["action"]["max"][1] *= 50
    path.write_text(json.dumps(content))


def more_columns(root, build):
    table = pq.read_table(root / DATA)
    rows = table.num_rows
    extra = {
        "next.done": ("bool", [False] * rows),
        "note": ("string", ["x"] * rows),
        "step": ("int64", list(range(rows))),
        "points": ("float32", [[1.0] * (i % 3) for i in range(rows)]),
    }
    for name, (dtype, values) in extra.items():
        edit_feature(name, dtype=dtype, shape=[1], names=None)(root, build)
        table = table.append_column(name, pa.array(values))
    write_table(root, table.replace_schema_metadata(None))


# ---- the table


@dataclass(frozen=True)
class Case:
    """`spoil` a dataset; `refused` is a pattern of every answer, None where it is read.

    `told` is a pattern of what `check` says of a dataset that is read, None: nothing. `settings` go into
    training and the cache, `differs` names cameras that are not as they were.
    """

    name: str
    spoil: Callable[[Path, Any], None]
    refused: str | None = None
    told: str | None = None
    video: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    differs: tuple[str, ...] = ()


NAN = float("nan")
CASES = [
    Case("untouched", lambda root, build: None),
    Case("untouched video", lambda root, build: None, video=True),
    # shapes of images
    Case("channels first, no names", edit_feature(FRONT, shape=[3, 24, 32], names=None)),
    Case("channels first, no names, video", edit_feature(FRONT, shape=[3, 24, 32], names=None), video=True),
    Case("channels last, no names", edit_feature(FRONT, shape=[24, 32, 3], names=None)),
    Case(
        "channels in the middle, named",
        edit_feature(FRONT, shape=[24, 3, 32], names=["height", "channels", "width"]),
    ),
    Case("ambiguous", edit_feature(FRONT, shape=[3, 32, 3], names=None), rf"{FRONT}.*\[3, 32, 3\]"),
    Case("no channels", edit_feature(FRONT, shape=[24, 32, 5], names=None), rf"{FRONT}.*\[24, 32, 5\]"),
    Case(
        "names against shape",
        edit_feature(FRONT, shape=[24, 32, 3], names=["channels", "height", "width"]),
        rf"{FRONT}.*\[24, 32, 3\]",
    ),
    Case("another size", edit_feature(FRONT, shape=[32, 24, 3]), r"\(24, 32\).*\(32, 24\)|\(24, 32, 3\)"),
    Case("grey images", reencode("L"), differs=("front",)),
    Case("images with transparency", reencode("RGBA")),
    Case("16 bits a pixel", reencode("I;16"), r"I;16"),
    Case(
        "two features of one camera's name",
        edit_feature("observation.front", dtype="image", shape=[24, 32, 3], names=None),
        "front",
    ),
    # videos
    Case("a video without a frame", short_video, r"18 frames for 19 rows", video=True),
    Case("span of the middle shifted", shift_spans(1), r"episode 1.*frame 7.*6", video=True),
    Case("span of the last shifted", shift_spans(2), r"episode 2.*frame 16.*15", video=True),
    Case("all spans shifted", shift_spans(0, 1, 2), r"episode 0.*frame 1.*0", video=True),
    Case("spans overlap", shift_spans(1, frames=-2), r"episode 1.*frame 4.*6.*overlap", video=True),
    Case(
        "a span too short",
        shift_spans(1, frames=-3, ends=("to",)),
        r"6 frames of video for 9 rows",
        video=True,
    ),
    Case(
        "a span of another file",
        edit_episodes(lambda rows: [r.update({f"videos/{FRONT}/file_index": 4}) for r in rows] and None),
        r"file-004\.mp4",
        video=True,
    ),
    Case(
        "no span",
        edit_episodes(
            lambda rows: [r.update({f"videos/{FRONT}/from_timestamp": None}) for r in rows] and None
        ),
        rf"no video of {FRONT}",
        video=True,
    ),
    # time
    Case("timestamps off", set_rows("timestamp", {8: 0.104}), told=r"note: episode 1.*frame 2.*0\.104"),
    Case(
        "timestamps off, video", set_rows("timestamp", {8: 0.104}), r"episode 1.*frame 2.*0\.104", video=True
    ),
    Case("timestamps going back", set_rows("timestamp", {8: 0.01}), r"episode 1.*frame 2"),
    Case("timestamps not finite", set_rows("timestamp", {8: NAN}), r"episode 1.*frame 2"),
    # numbers
    Case("statistics of other rows", wrong_stats, told=r"stats\.json.*max of action.*dimension 1"),
    Case("no statistics", lambda root, build: (root / "meta/stats.json").unlink(), told=r"stats\.json"),
    Case(
        "NaN in an episode that is left out",
        set_rows("action", {8: [0.0, NAN]}),
        told=r"episode 1.*action.*first frame 2",
        settings={"episodes": (0, 2)},
    ),
    Case(
        "NaN in an episode that is used",
        set_rows("action", {8: [0.0, NAN]}),
        told=r"episode 1.*action.*first frame 2",
        settings={"episodes": (0, 1), "train": r"action.*frame 2 of episode 1"},
    ),
    Case(
        "a broken image in an episode that is left out",
        set_rows(FRONT, {8: {"bytes": b"no image", "path": None}}),
        told=rf"episode 1.*{FRONT}.*frame 2",
        settings={"episodes": (0, 2)},
    ),
    Case(
        "a broken first image of the first episode, left out",
        set_rows(FRONT, {0: {"bytes": b"no image", "path": None}}),
        told=rf"episode 0.*{FRONT}.*frame 0",
        settings={"episodes": (1, 2)},
    ),
    Case("features that nothing reads", more_columns, told=r"note: .*next\.done \(bool\).*points"),
    # tables
    Case("task indices with gaps", renumber_tasks),
    Case("a task that is not there", set_rows("task_index", {8: 5}), r"episode 1.*frame 2.*5"),
    Case("an episode deleted", edit_episodes(lambda rows: [rows[0], rows[2]]), r"gap \(1\)"),
    Case(
        "an episode deleted, also from info.json",
        lambda root, build: (
            edit_episodes(lambda rows: [rows[0], rows[2]])(root, build),
            edit_info(total_episodes=2, total_frames=10)(root, build),
        ),
        r"gap \(1\)",
    ),
    Case(
        "an episode listed twice",
        edit_episodes(lambda rows: [*rows, rows[1]]),
        r"\[1\] are listed twice|3 episodes",
    ),
    Case("an index that jumps", set_rows("index", {4: 40}), r"episode 0.*frame 4 holds 40, expected 4"),
    Case("rows of another episode", set_rows("episode_index", {10: 2}), r"frame 4 holds 2, expected 1"),
    Case(
        "a column of the episode table",
        lambda root, build: pq.write_table(
            pq.read_table(root / EPISODES).drop_columns(["dataset_to_index"]), root / EPISODES
        ),
        "dataset_to_index",
    ),
    # files
    Case(
        "data_path with ..",
        edit_info(data_path="../dataset/data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"),
        None,
    ),
    Case(
        "data_path leaves",
        edit_info(data_path="../data-{chunk_index}-{file_index}.parquet"),
        r"\.\./data-0-0",
    ),
    Case("data_path absolute", edit_info(data_path="/etc/{chunk_index}-{file_index}"), r"/etc/0-0"),
    Case(
        "data_path with other fields",
        edit_info(data_path="data/{episode_index}.parquet"),
        "data_path.*episode_index",
    ),
    Case(
        "video_path leaves",
        edit_info(video_path="../{video_key}-{file_index}.mp4"),
        rf"\.\./{FRONT}-0",
        video=True,
    ),
    Case("a link out of the folder", link_data_elsewhere, r"file-000\.parquet.*elsewhere\.parquet"),
    Case("a snapshot of the hub", hub_snapshot),
    Case(
        "a slash in a feature's name",
        edit_feature("../../etc", dtype="image", shape=[24, 32, 3]),
        r"\.\./\.\./etc",
    ),
    # names
    Case(
        "other names, mapped",
        lambda root, build: (
            rename_feature("action", "actions")(root, build),
            rename_feature("observation.state", "arm", "gripper")(root, build),
            rename_feature(FRONT, "image")(root, build),
        ),
        settings={"keys": ("action=actions", "observation.state=arm+gripper", f"{FRONT}=image")},
        told=None,
    ),
    Case(
        "other names",
        rename_feature("action", "actions"),
        told=r"no 'action'.*action=actions",
        settings={"train": r"no 'action'.*action=actions"},
    ),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name.replace(" ", "-"))
def spoiled(request, tmp_path, build):
    """(case, folder of the spoiled dataset, the same dataset as it was)."""
    case = request.param
    root = build.write_dataset(tmp_path / "dataset", video=case.video)
    sound = Dataset.open(build.write_dataset(tmp_path / "sound", video=case.video))
    case.spoil(root, build)
    return case, root, sound


def assert_scaled_by(student, rows):
    middle = torch.from_numpy((rows.min(0) + rows.max(0)) / 2)
    torch.testing.assert_close(student.action_norm.offset, middle)


def config(root, output, case):
    settings = {k: v for k, v in case.settings.items() if k in ("episodes", "keys")}
    return TrainConfig(
        dataset=root,
        output=output,
        student=STUDENT,
        forcing=ForcingConfig(alpha=0.0),
        optim=OptimConfig(),
        steps=1,
        batch_size=2,
        trackers=(),
        progress=False,
        cpu=True,
        **settings,
    )


def cache(root, folder, case):
    keys = parse_keys(case.settings.get("keys", ()))
    episodes = case.settings.get("episodes")
    dataset = Dataset.open(root, keys=keys)
    build_cache(FakeTeacher(), dataset_source(dataset, episodes=episodes), folder, progress=False)
    return dataset


def test_every_reader_gives_the_same_answer(spoiled, tmp_path):
    case, root, sound = spoiled
    keys = case.settings.get("keys", ())
    found = check(root, keys=parse_keys(keys))
    told = "\n".join(map(str, found))
    if case.refused is not None:
        assert re.search(case.refused, told), told
        assert any(not problem.note for problem in found)
        attempts = {
            "open": lambda: Dataset.open(root),
            "train": lambda: train(config(root, tmp_path / "run", case)),
            "cache": lambda: cache(root, tmp_path / "cache", case),
        }
        for name, attempt in attempts.items():
            with pytest.raises(SpatialForcingError) as caught:
                attempt()
            assert re.search(case.refused, str(caught.value)), (name, str(caught.value))
            assert str(root) in str(caught.value), name
        assert not (tmp_path / "cache").exists()
        return
    assert bool(told) == (case.told is not None), told
    assert case.told is None or re.search(case.told, told), told
    dataset = cache(root, tmp_path / "cache", case)
    used = case.settings.get("episodes", range(3))
    frames = np.concatenate([np.arange(e.start, e.stop) for e in (sound.episodes[n] for n in used)])
    assert CachedTeacher(tmp_path / "cache").holds(frames).all()
    if "train" in case.settings:
        with pytest.raises(SpatialForcingError, match=case.settings["train"]):
            train(config(root, tmp_path / "run", case))
        return
    assert np.array_equal(dataset.state[frames], sound.state[frames])
    assert np.array_equal(dataset.action[frames], sound.action[frames])
    assert [e.task for e in dataset.episodes] == [e.task for e in sound.episodes]
    texts = [[d.tasks[int(i)] for i in d.task_index] for d in (dataset, sound)]
    assert texts[0] == texts[1]
    for camera in set(sound.cameras) - set(case.differs):
        for frame in frames.tolist():
            assert np.array_equal(dataset.image(frame, camera), sound.image(frame, camera)), (frame, camera)
    student = load_student(train(config(root, tmp_path / "run", case)).policy)
    assert_scaled_by(student, sound.action[frames])


def test_grey_is_read_in_all_three_channels(root, build):
    reencode("L")(root, build)
    pixels = Dataset.open(root).image(3, "front")
    assert pixels.shape == (24, 32, 3)
    assert (pixels == pixels[..., :1]).all()
    assert np.ptp(pixels) > 20


def test_statistics_are_written_anew(root, build, capsys):
    sound = (root / "meta/stats.json").read_text()
    wrong_stats(root, build)
    cli.run(["data", "stats", str(root)])
    assert "action changed" in capsys.readouterr().out
    assert check(root) == []
    old, new = json.loads(sound), json.loads((root / "meta/stats.json").read_text())
    assert old["action"] == new["action"]
    np.testing.assert_allclose(new[FRONT]["mean"], old[FRONT]["mean"], rtol=1e-6)
    assert recompute_stats(root, progress=False) == []


def test_the_command_fails_on_problems_and_not_on_notes(root, build, capsys):
    set_rows("timestamp", {8: 0.104})(root, build)
    cli.run(["data", "check", str(root)])
    assert "frame 2" in capsys.readouterr().out
    wrong_stats(root, build)
    with pytest.raises(SpatialForcingError, match="1 problems"):
        cli.run(["data", "check", str(root)])


def test_statistics_are_those_of_the_episodes_that_are_trained_on(dataset):
    part = dataset.statistics([0, 2])
    rows = np.r_[dataset.action[:6], dataset.action[15:]].astype(np.float64)
    assert part["action"]["max"].tolist() == rows.max(0).tolist()
    assert part["action"]["q99"] == pytest.approx(np.quantile(rows, 0.99, axis=0))
    assert dataset.statistics()["action"]["max"].tolist() != part["action"]["max"].tolist()


def test_a_source_that_is_not_there_is_named(root):
    with pytest.raises(SpatialForcingError, match=r"'actoin'.*Did you mean 'action'"):
        Dataset.open(root, keys={"action": "actoin"})
    with pytest.raises(SpatialForcingError, match=rf"{FRONT}.*images cannot be joined"):
        Dataset.open(root, keys={"observation.images.both": f"{FRONT}+observation.images.wrist"})


def test_a_split_of_the_dataset_can_be_trained_on(tmp_path, root, build):
    edit_info(splits={"train": "0:2", "valid": "2:3"})(root, build)
    case = Case("", lambda root, build: None)
    valid = replace(config(root, tmp_path / "run", case), split="valid")
    student = load_student(train(valid).policy)
    assert_scaled_by(student, Dataset.open(root).action[15:])
    with pytest.raises(SpatialForcingError, match=r"'test'.*train.*valid"):
        train(replace(valid, split="test", output=tmp_path / "other"))
