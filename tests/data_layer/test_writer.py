import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from spatial_forcing.data import Dataset, DatasetInfo, DatasetWriter
from spatial_forcing.data.stats import NAMES, load_stats
from spatial_forcing.errors import DataError


def same_dataset(left: Dataset, right: Dataset) -> bool:
    """Equal numbers, tasks, statistics and encoded images."""
    return (
        np.array_equal(left.state, right.state)
        and np.array_equal(left.action, right.action)
        and np.array_equal(left.timestamp, right.timestamp)
        and left.tasks == right.tasks
        and [left.content_hash(e) for e in range(len(left.episodes))]
        == [right.content_hash(e) for e in range(len(right.episodes))]
        and all(
            np.allclose(value["mean"], load_stats(right.root)[key]["mean"])
            for key, value in load_stats(left.root).items()
        )
    )


@pytest.mark.parametrize("video", [False, True])
def test_round_trip(tmp_path, build, video):
    dataset = Dataset.open(build.write_dataset(tmp_path / "d", video=video))
    assert len(dataset) == sum(build.LENGTHS)
    assert dataset.cameras == tuple(build.SIZES)
    assert [(e.length, e.task) for e in dataset.episodes] == list(
        zip(build.LENGTHS, ["task 0", "task 1", "task 0"], strict=True)
    )
    assert dataset.state.shape == (19, 4)
    assert dataset.state.dtype == np.float32
    assert np.allclose(dataset.timestamp[6:9], [0, 0.05, 0.1])
    for episode in dataset.episodes:
        for index in (episode.stop - 1, episode.start, episode.start + 2):
            for camera in dataset.cameras:
                wanted = build.picture(episode.index, index - episode.start, camera)
                error = np.abs(dataset.image(index, camera).astype(int) - wanted).mean()
                assert error < (4 if video else 1e-9)
        assert dataset.action[episode.start + 1].tolist() == [1, 10 * episode.index]
    assert [dataset.tasks[i] for i in dataset.task_index[[0, 6, 15]]] == ["task 0", "task 1", "task 0"]


def test_depth_intrinsics_and_extrinsics(tmp_path, build):
    dataset = Dataset.open(build.write_dataset(tmp_path / "d", depth=True))
    assert dataset.cameras == ("front", "wrist")
    assert dataset.depth(3, "front") == pytest.approx(1 + 3 / 8)
    assert dataset.depth(3, "wrist").shape == (16, 16)
    assert dataset.extrinsics(7, "wrist") == pytest.approx(np.eye(4) * 2)
    assert dataset.intrinsics("front")[0, 0] == 50
    feature = dataset.info.features["observation.images.front_depth"]
    assert feature["info"] == {"is_depth_map": True, "depth_unit": "mm"}


def test_what_was_not_recorded_is_said(dataset):
    for read in (dataset.depth, dataset.extrinsics):
        with pytest.raises(DataError, match="front"):
            read(0, "front")
    with pytest.raises(DataError, match=r"intrinsics for camera 'front'"):
        dataset.intrinsics("front")


def test_statistics_are_exact_for_numbers_and_scaled_for_images(dataset, build):
    stats = load_stats(dataset.root)
    for key, value in dataset.statistics().items():
        assert {name: v.tolist() for name, v in value.items()} == {
            n: v.tolist() for n, v in stats[key].items()
        }
    assert set(stats["action"]) == set(NAMES)
    assert stats["action"]["q01"] == pytest.approx(np.quantile(dataset.action.astype(float), 0.01, axis=0))
    assert stats["observation.state"]["std"] == pytest.approx(dataset.state.std(0), abs=1e-6)
    front = stats["observation.images.front"]
    assert front["mean"].shape == (3, 1, 1)
    assert front["count"].tolist() == [19]
    pixels = np.stack([dataset.image(i, "front") for i in range(19)]).reshape(-1, 3) / 255
    assert front["mean"].ravel() == pytest.approx(pixels.mean(0), abs=1e-6)
    assert front["std"].ravel() == pytest.approx(pixels.std(0), abs=1e-6)
    assert front["max"].ravel() == pytest.approx(pixels.max(0))


def test_layout_is_lerobots(root):
    table = pq.read_table(root / "data/chunk-000/file-000.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["observation.images.front"] == {"_type": "Image"}
    assert features["observation.state"]["length"] == 4
    assert features["index"] == {"dtype": "int64", "_type": "Value"}
    assert set(table["observation.images.front"][0].as_py()) == {"bytes", "path"}
    episodes = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet")
    for name in ("tasks", "length", "dataset_from_index", "dataset_to_index", "data/chunk_index"):
        assert name in episodes.column_names
    assert "stats/observation.images.front/q99" in episodes.column_names
    assert "meta/episodes/file_index" in episodes.column_names
    tasks = pq.read_table(root / "meta/tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    assert json.loads((root / "meta/info.json").read_text())["splits"] == {"train": "0:3"}
    assert pq.ParquetFile(root / "data/chunk-000/file-000.parquet").num_row_groups == 3


@pytest.mark.parametrize("video", [False, True])
def test_interruption_loses_at_most_the_running_episode(tmp_path, build, video):
    whole = Dataset.open(build.write_dataset(tmp_path / "whole", video=video))
    root = tmp_path / "interrupted"
    writer = build.new_writer(root, video=video)
    build.add_episode(writer, 0, build.LENGTHS[0])
    build.add_episode(writer, 1, build.LENGTHS[1])
    writer.add_frame(build.frame_of(2, 0), "task 0")  # never saved
    with pytest.raises(DataError, match="2 recorded, not finalised"):
        Dataset.open(root)
    again = DatasetWriter.resume(root)
    assert (again.num_episodes, again.num_frames, again.tasks) == (2, 15, ["task 0", "task 1"])
    build.add_episode(again, 2, build.LENGTHS[2])
    again.finalize()
    assert same_dataset(Dataset.open(root), whole)
    assert not (root / ".recording").exists()


@pytest.mark.parametrize("video", [False, True])
def test_a_finished_dataset_can_grow(tmp_path, build, video):
    whole = Dataset.open(build.write_dataset(tmp_path / "whole", video=video))
    root = tmp_path / "grown"
    for episode, length in enumerate(build.LENGTHS):
        writer = DatasetWriter.resume(root) if episode else build.new_writer(root, video=video)
        build.add_episode(writer, episode, length)
        writer.finalize()
    assert same_dataset(Dataset.open(root), whole)
    assert len(list((root / "data").rglob("*.parquet"))) == 3


def test_a_crash_while_finalising_can_be_repeated(tmp_path, build, monkeypatch):
    whole = Dataset.open(build.write_dataset(tmp_path / "whole"))
    root = tmp_path / "crashed"
    writer = build.new_writer(root)
    build.add_episode(writer, 0, build.LENGTHS[0])
    writer.finalize()
    build.add_episode(writer, 1, build.LENGTHS[1])
    build.add_episode(writer, 2, build.LENGTHS[2])
    with monkeypatch.context() as patch:
        patch.setattr(DatasetInfo, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            writer.finalize()
    assert len(Dataset.open(root).episodes) == 1  # what was committed still stands
    DatasetWriter.resume(root).finalize()
    assert same_dataset(Dataset.open(root), whole)


def test_files_are_split_by_size(tmp_path, build):
    whole = Dataset.open(build.write_dataset(tmp_path / "whole"))
    split = Dataset.open(build.write_dataset(tmp_path / "split", data_files_size_in_mb=0))
    assert [e.row["data/file_index"] for e in split.episodes] == [0, 1, 2]
    assert same_dataset(split, whole)  # so the content hash depends on neither file nor position


def test_content_hash_sees_every_pixel_and_only_the_cameras_asked_for(tmp_path, build):
    first = Dataset.open(build.write_dataset(tmp_path / "a"))
    writer = build.new_writer(tmp_path / "b")
    for frame in range(build.LENGTHS[0]):
        content = build.frame_of(0, frame)
        content["images"]["front"][0, 0, 0] += frame == 3
        writer.add_frame(content, "task 0")
    writer.save_episode()
    writer.finalize()
    second = Dataset.open(tmp_path / "b")
    assert first.content_hash(0) != second.content_hash(0)
    assert first.content_hash(0, ["wrist"]) == second.content_hash(0, ["wrist"])


def _with(**changes):
    return lambda frame: {**frame, **changes}


def _with_image(**images):
    return lambda frame: {**frame, "images": {**frame["images"], **images}}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_with(images={"front": np.zeros((24, 32, 3), np.uint8)}), r"\['front'\].*\['front', 'wrist'\]"),
        (
            lambda f: {**f, "images": {**f["images"], "front": np.zeros((3, 24, 32), np.uint8)}},
            r"\(24, 32, 3\)",
        ),
        (lambda f: {**f, "images": {**f["images"], "wrist": np.zeros((16, 16, 3))}}, "float64"),
        (_with(state=[1, 2]), r"shape \(2,\)"),
        (_with(state=[1, 2, np.nan, 3]), "not finite"),
        (_with(action=None), "action is missing"),
        (_with(extrinsics={"front": np.eye(4)}), "extrinsics=True"),
        (_with(depth={"front": np.ones((24, 32))}), "depth are given"),
    ],
)
def test_a_bad_frame_is_refused_and_the_episode_stays(tmp_path, build, spoil, message):
    writer = build.new_writer(tmp_path / "d")
    writer.add_frame(build.frame_of(0, 0), "task")
    with pytest.raises(DataError, match=message) as caught:
        writer.add_frame(spoil(build.frame_of(0, 1)), "task")
    assert "frame 1" in str(caught.value)
    writer.add_frame(build.frame_of(0, 1), "task")
    writer.save_episode()
    writer.finalize()
    assert Dataset.open(tmp_path / "d").action[:, 0].tolist() == [0, 1]


def test_nothing_is_overwritten(root):
    with pytest.raises(DataError, match=r"/dataset is not empty.*DatasetWriter\.resume"):
        DatasetWriter.create(root, fps=1, cameras={"a": (2, 2)}, state_dim=1, action_dim=1)


def test_an_empty_episode_is_refused(tmp_path, build):
    with pytest.raises(DataError, match=r"add_frame"):
        build.new_writer(tmp_path / "d").save_episode()


def test_vectors_of_one_number(tmp_path):
    writer = DatasetWriter.create(tmp_path / "d", fps=5, cameras={"a": (4, 4)}, state_dim=1, action_dim=1)
    for i in range(3):
        image = np.full((4, 4, 3), i, np.uint8)
        writer.add_frame({"images": {"a": image}, "state": [i], "action": [2 * i]}, "t")
    writer.save_episode()
    writer.finalize()
    dataset = Dataset.open(tmp_path / "d")
    assert dataset.state.shape == (3, 1)
    assert dataset.action[:, 0].tolist() == [0, 2, 4]


def test_context_manager_finalises(tmp_path, build):
    with build.new_writer(tmp_path / "d") as writer:
        build.add_episode(writer, 0, 3)
    assert len(Dataset.open(tmp_path / "d")) == 3


def test_disagreement_of_table_and_data_is_named(root):
    path = root / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "total_frames": 20}))
    with pytest.raises(DataError, match=r"frame 19, info\.json says 20"):
        Dataset.open(root)


def test_frame_index_out_of_range(dataset):
    with pytest.raises(DataError, match="index 19 is out of range"):
        dataset.image(19, "front")
