import itertools
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spatial_forcing.data import Dataset, DecodedStore
from spatial_forcing.data.check import check

DATA = "data/chunk-000/file-000.parquet"


def rewrite(root, change):
    """Apply `change` to the data table and write it back, one row group an episode."""
    table = change(pq.read_table(root / DATA))
    bounds = [0, 6, 15, 19]
    with pq.ParquetWriter(root / DATA, table.schema) as writer:
        for start, stop in itertools.pairwise(bounds):
            writer.write_table(table.slice(start, stop - start))


def with_column(table, name, values):
    field = table.schema.field(name)
    return table.set_column(table.column_names.index(name), field, pa.array(values, field.type))


def put(name, row, value):
    """Replace one row of a column."""

    def change(table):
        values = table[name].to_pylist()
        values[row] = value
        return with_column(table, name, values)

    return lambda root: rewrite(root, change)


def shrink(path, keep):
    def spoil(root):
        file = root / path
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])

    return spoil


def edit_info(root, change):
    path = root / "meta/info.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def overwrite_middle(root):
    """Damage the pages of the middle of the file and leave its footer alone."""
    content = bytearray((root / DATA).read_bytes())
    middle = pq.ParquetFile(root / DATA).metadata.row_group(1).column(0)
    start = middle.dictionary_page_offset or middle.data_page_offset
    content[start : start + middle.total_compressed_size] = b"\xff" * middle.total_compressed_size
    (root / DATA).write_bytes(content)


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("depth", [False, True])
def test_a_sound_dataset_has_no_problems(tmp_path, build, video, depth):
    root = build.write_dataset(tmp_path / "d", video=video, depth=depth)
    DecodedStore.build(Dataset.open(root), progress=False)
    assert check(root) == []


@pytest.mark.parametrize(
    ("spoil", "episode", "what"),
    [
        (shrink(DATA, 0.5), 0, "truncated"),
        (lambda root: (root / DATA).unlink(), 2, "missing"),
        (overwrite_middle, 1, "unreadable|bad images"),
        (put("action", 8, [0.0, float("nan")]), 1, "NaN or infinite in 1 frames, first frame 2"),
        (put("observation.state", 15, [float("inf")] * 4), 2, "NaN or infinite"),
        (put("observation.state", 3, None), 0, "wrong shape"),
        (put("timestamp", 7, 0.0), 1, "not increasing at frame 1"),
        (put("timestamp", 18, 9.0), 2, "frame 3 is at 9 s"),
        (put("index", 4, 40), 0, "a gap"),
        (put("episode_index", 10, 2), 1, "expected 1"),
        (put("task_index", 2, 5), 0, "no task"),
        (put("observation.images.wrist", 16, {"bytes": b"no image", "path": None}), 2, "first frame 1"),
        (put("observation.images.front", 1, {"bytes": None, "path": "x.png"}), 0, "no bytes"),
        (
            lambda root: rewrite(root, lambda t: t.drop_columns(["observation.images.wrist"])),
            0,
            "observation.images.wrist is missing",
        ),
        (lambda root: rewrite(root, lambda t: t.slice(0, 17)), 2, "17 rows"),
        (lambda root: (root / "meta/stats.json").unlink(), None, "stats.json"),
        (lambda root: (root / "meta/tasks.parquet").write_bytes(b""), None, "tasks.parquet"),
        (shrink("meta/episodes/chunk-000/file-000.parquet", 0.7), None, "episodes"),
        (lambda root: edit_info(root, lambda c: c.update(total_episodes=4)), None, "says 4"),
        (lambda root: edit_info(root, lambda c: c.update(codebase_version="v2.1")), None, "v2.1"),
        (
            lambda root: edit_info(
                root, lambda c: c["features"]["observation.images.front"].update(shape=[24, 30, 3])
            ),
            1,
            r"9 bad images, first frame 0: shape \(24, 32, 3\)",
        ),
    ],
)
def test_every_defect_is_found_and_its_episode_named(root, spoil, episode, what):
    spoil(root)
    problems = check(root)
    found = [p for p in problems if p.episode == episode and re.search(what, str(p))]
    assert found, [str(p) for p in problems]
    assert all(p.remedy for p in problems)


def test_one_defect_does_not_hide_another(root):
    put("action", 0, [float("nan"), 0.0])(root)
    put("action", 16, [float("nan"), 0.0])(root)
    overwrite_middle(root)
    assert {p.episode for p in check(root)} == {0, 1, 2}


def test_a_truncated_video_names_its_episodes(tmp_path, build):
    root = build.write_dataset(tmp_path / "d", video=True)
    shrink("videos/observation.images.front/chunk-000/file-000.mp4", 0.5)(root)
    problems = check(root)
    assert {p.episode for p in problems} == {0, 1, 2}
    assert all("observation.images.front" in p.place for p in problems)


def test_a_video_that_is_too_short_names_the_episode(tmp_path, build):
    root = build.write_dataset(tmp_path / "short", video=True)
    other = build.new_writer(tmp_path / "other", video=True)
    build.add_episode(other, 0, 6)
    build.add_episode(other, 1, 9)
    other.finalize()
    file = "videos/observation.images.wrist/chunk-000/file-000.mp4"
    (root / file).write_bytes((tmp_path / "other" / file).read_bytes())
    assert {p.episode for p in check(root)} == {2}


def test_tables_only_is_possible(root):
    put("observation.images.wrist", 16, {"bytes": b"no image", "path": None})(root)
    assert check(root, decode=False) == []


def test_a_damaged_store_is_reported(root):
    DecodedStore.build(Dataset.open(root), progress=False)
    file = next((root / ".decoded").glob("wrist-*.u8"))
    file.write_bytes(bytes(file.stat().st_size))
    problems = check(root)
    assert [p.episode for p in problems] == [0, 1, 2]
    assert problems[0].place.startswith(".decoded/wrist-")


def test_an_unfinished_recording_is_reported(root, build):
    from spatial_forcing.data import DatasetWriter

    build.add_episode(DatasetWriter.resume(root), 3, 2)
    assert "1 recorded episodes are not finalised" in str(check(root)[0])
