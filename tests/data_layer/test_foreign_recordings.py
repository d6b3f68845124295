"""What converters of foreign layouts share: nothing is lost or taken over without a word."""

from __future__ import annotations

import shutil

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spatial_forcing import cli
from spatial_forcing.data import Dataset
from spatial_forcing.data.check import check
from spatial_forcing.data.convert import CONVERTERS, load_converter
from spatial_forcing.data.convert.run import convert, read_log
from spatial_forcing.errors import ConfigError, DataError, SpatialForcingError
from tests.data_layer.recordings import WRITERS, recording

NAMES = {"rlds": "libero"}
LOSSLESS = {"aloha": {"video": False}, "robotwin": {"video": False}}
"""Frames can then be compared pixel by pixel."""


def converted(kind, source, output, **options):
    settings = {**LOSSLESS.get(kind, {}), **options}
    converter = load_converter(NAMES.get(kind, kind))(source, output, **settings)
    return Dataset.open(convert(converter, progress=False))


def assert_holds(dataset, episodes):
    """Exactly these episodes, frame by frame."""
    assert [e.length for e in dataset.episodes] == [len(e["states"]) for e in episodes]
    for episode, wanted in zip(dataset.episodes, episodes, strict=True):
        rows = slice(episode.start, episode.stop)
        np.testing.assert_array_equal(dataset.state[rows], wanted["states"])
        np.testing.assert_array_equal(dataset.action[rows], wanted["actions"])
        assert set(dataset.cameras) == set(wanted["images"])
        for camera, frames in wanted["images"].items():
            for i, frame in enumerate(frames):
                found = dataset.image(episode.start + i, camera)
                assert np.array_equal(found, frame), (episode.index, camera, i)


@pytest.mark.parametrize("kind", WRITERS)
def test_every_frame_and_number_arrives(kind, tmp_path):
    wanted = recording(kind, tmp_path / "raw")
    dataset = converted(kind, tmp_path / "raw", tmp_path / "out")
    assert_holds(dataset, wanted)
    assert all(problem.note for problem in check(tmp_path / "out"))


@pytest.mark.parametrize("kind", WRITERS)
def test_an_interrupted_conversion_resumes_and_a_grown_source_is_appended(kind, tmp_path, monkeypatch):
    wanted = recording(kind, tmp_path / "raw", (5, 3))
    from spatial_forcing.data import DatasetWriter

    original = DatasetWriter.write_episode

    def killed(self, episode):
        original(self, episode)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "write_episode", killed)
        with pytest.raises(KeyboardInterrupt):
            converted(kind, tmp_path / "raw", tmp_path / "out")
    assert_holds(converted(kind, tmp_path / "raw", tmp_path / "out"), wanted)
    shutil.rmtree(tmp_path / "raw")
    grown = recording(kind, tmp_path / "raw", (5, 3, 4))
    assert_holds(converted(kind, tmp_path / "raw", tmp_path / "out"), grown)


@pytest.mark.parametrize("kind", ["aloha", "robotwin", "libero", "rlds", "robomimic"])
def test_hidden_files_and_interrupted_downloads_are_left_out_and_counted(kind, tmp_path, capsys):
    source = tmp_path / "raw"
    wanted = recording(kind, source)
    file = next(path for path in source.rglob("*") if path.is_file() and path.suffix != ".json")
    file.with_name(f"._{file.name}").write_bytes(b"what another system leaves")
    interrupted = source / "1.0.0.incompleteABC"
    interrupted.mkdir()
    shutil.copy(file, interrupted / file.name)
    assert_holds(converted(kind, source, tmp_path / "out"), wanted)
    reasons = list(read_log(tmp_path / "out")["skipped"].values())
    assert sorted(reasons) == ["a hidden file", "in the folder of an interrupted download"]
    assert all("incomplete" in name or "._" in name for name in read_log(tmp_path / "out")["skipped"])
    options = ["--task", "lift"] if kind in ("aloha", "robotwin", "robomimic") else []
    arguments = ["--source", str(source), "--output", str(tmp_path / "cli"), *options]
    cli.run(["data", "convert", NAMES.get(kind, kind), *arguments])
    assert "1 left out: a hidden file" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["libero", "robomimic"])
def test_demonstrations_have_any_names_in_natural_order(kind, tmp_path):
    wanted = recording(kind, tmp_path / "raw")
    (file,) = (tmp_path / "raw").glob("*.hdf5")
    with h5py.File(file, "r+") as opened:
        for old, new in (("demo_0", "run2"), ("demo_1", "run10"), ("demo_2", "teleop_a")):
            opened.move(f"data/{old}", f"data/{new}")
    assert_holds(converted(kind, tmp_path / "raw", tmp_path / "out"), wanted)


def freeze(kind, source):
    """Stop the robot of episode 1."""
    if kind == "aloha":
        names, file = ["observations/qpos"], source / "episode_1.hdf5"
    elif kind == "robotwin":
        names, file = ["joint_action/vector"], source / "data/episode1.hdf5"
    else:
        (file,) = source.glob("*.hdf5")
        moving = ["actions"] if kind == "libero" else [
            f"obs/robot0_{part}" for part in ("eef_pos", "eef_quat", "gripper_qpos")
        ]  # fmt: skip
        names = [f"data/demo_1/{name}" for name in moving]
    with h5py.File(file, "r+") as opened:
        for name in names:
            opened[name][:] = 0


@pytest.mark.parametrize("kind", ["aloha", "robotwin", "libero", "robomimic"])
def test_episodes_without_movement_are_left_out_and_counted(kind, tmp_path):
    wanted = recording(kind, tmp_path / "raw")
    freeze(kind, tmp_path / "raw")
    assert_holds(converted(kind, tmp_path / "raw", tmp_path / "out"), [wanted[0], wanted[2]])
    assert list(read_log(tmp_path / "out")["skipped"].values()) == ["the robot never moves"]
    keep = {"keep_no_ops": True} if kind == "libero" else {"keep_still": True}
    assert len(converted(kind, tmp_path / "raw", tmp_path / "kept", **keep).episodes) == 3


EXTRA = {
    "aloha": ("base_action", "observations/effort"),
    "robotwin": ("endpose/left_endpose",),
    "libero": ("obs/joint_states",),
    "robomimic": ("obs/robot0_joint_pos",),
}


@pytest.mark.parametrize("kind", EXTRA)
def test_arrays_that_nothing_takes_are_named_once_and_taken_when_asked(kind, tmp_path, caplog):
    source, names = tmp_path / "raw", EXTRA[kind]
    wanted = recording(kind, source)
    extra: list[dict[str, np.ndarray]] = [{} for _ in wanted]
    for path in sorted(source.rglob("*.hdf5")):
        with h5py.File(path, "r+") as file:
            groups = [file] if kind in ("aloha", "robotwin") else list(file["data"].values())
            for group in groups:
                number = int("".join(c for c in (path.stem if group is file else group.name) if c.isdigit()))
                length = len(wanted[number]["states"]) + (kind == "robotwin")
                for i, name in enumerate(names):
                    values = np.random.default_rng([number, i]).normal(size=(length, 2)).astype(np.float32)
                    group[name] = values
                    extra[number][name] = values
    converted(kind, source, tmp_path / "out")
    for name in names:
        assert caplog.text.count(f"--append {name}") == 1
        assert name in read_log(tmp_path / "out")["unused"]
    caplog.clear()
    dataset = converted(kind, source, tmp_path / "more", append=names)
    assert not any(name in caplog.text for name in names)
    for episode, found in zip(dataset.episodes, wanted, strict=True):
        parts = extra[episode.index]
        length = episode.length
        if kind == "aloha":
            found["actions"] = np.c_[found["actions"], parts["base_action"]]
            found["states"] = np.c_[found["states"], parts["observations/effort"]]
        else:
            found["states"] = np.c_[found["states"], *(parts[name][:length] for name in names)]
    assert_holds(dataset, wanted)
    assert len(dataset.info.features["observation.state"]["names"]) == dataset.state.shape[1]
    with pytest.raises(ConfigError, match="'torqe'"):
        converted(kind, source, tmp_path / "typo", append=("torqe",))


def test_filter_keys_become_splits(tmp_path):
    wanted = recording("robomimic", tmp_path / "raw", (5, 3, 4, 6))
    with h5py.File(tmp_path / "raw/low_dim.hdf5", "r+") as file:
        file["mask/train"] = np.array(["demo_3", "demo_1"], "S8")
        file["mask/valid"] = np.array(["demo_0", "demo_2"], "S8")
    dataset = converted("robomimic", tmp_path / "raw", tmp_path / "out")
    assert_holds(dataset, [wanted[i] for i in (1, 3, 0, 2)])
    assert dataset.info.splits == {"train": "0:2", "valid": "2:4"}
    assert dataset.fps == 25
    assert dataset.episodes[0].task == "nut assembly square"
    part = converted("robomimic", tmp_path / "raw", tmp_path / "valid", filter_key="valid")
    assert_holds(part, [wanted[0], wanted[2]])
    with pytest.raises(ConfigError, match=r"'vaild'.*Did you mean 'valid'"):
        converted("robomimic", tmp_path / "raw", tmp_path / "typo", filter_key="vaild")


def test_depth_beside_the_cameras(tmp_path):
    wanted = recording("aloha", tmp_path / "raw", (4,))
    depth = np.random.default_rng(0).integers(100, 3000, (4, 16, 16)).astype(np.uint16)
    with h5py.File(tmp_path / "raw/episode_0.hdf5", "r+") as file:
        for camera in wanted[0]["images"]:
            file[f"observations/images_depth/{camera}"] = depth
    converted("aloha", tmp_path / "raw", tmp_path / "out")
    named = read_log(tmp_path / "out")["unused"]
    assert named["observations/images_depth/cam_high"] == "--depth"
    dataset = converted("aloha", tmp_path / "raw", tmp_path / "deep", depth=True)
    np.testing.assert_allclose(dataset.depth(2, "cam_high"), depth[2] / 1000, atol=1e-6)


# ---- random damage


def names_of(path):
    found: list[str] = []
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    return found


def damage_hdf5(path, draw):
    """Cut the file short, or drop, rename, shorten, empty or reshape some of its arrays."""
    if draw(st.booleans()):
        content = path.read_bytes()
        path.write_bytes(content[: draw(st.integers(0, len(content) - 1))])
        return
    names = draw(st.lists(st.sampled_from(names_of(path)), max_size=3, unique=True))
    with h5py.File(path, "r+") as file:
        for name in names:
            how = draw(st.sampled_from(["drop", "rename", "shorten", "empty", "flatten", "text", "scalar"]))
            values = np.asarray(file[name])
            del file[name]
            if how == "rename":
                file[name + "_old"] = values
            elif how == "shorten":
                file[name] = values[: draw(st.integers(0, len(values)))]
            elif how == "empty":
                file[name] = values[:0]
            elif how == "flatten":
                file[name] = values.reshape(-1)
            elif how == "text":
                file[name] = np.array(["x"] * len(values), "S1")
            elif how == "scalar":
                file[name] = 1.0


def damage_records(path, draw):
    from tfrecord.example_pb2 import Example

    content = bytearray(path.read_bytes())
    if draw(st.booleans()):
        path.write_bytes(content[: draw(st.integers(0, len(content) - 1))])
        return
    import struct

    at, records = 0, []
    while at < len(content):
        (size,) = struct.unpack("<Q", content[at : at + 8])
        records.append(Example.FromString(bytes(content[at + 12 : at + 12 + size])))
        at += 16 + size
    example = draw(st.sampled_from(records))
    features = example.features.feature
    for name in draw(st.lists(st.sampled_from(sorted(features)), max_size=3, unique=True)):
        if draw(st.booleans()):
            del features[name]
            continue
        values = getattr(features[name], features[name].WhichOneof("kind")).value
        for _ in range(draw(st.integers(0, len(values)))):
            values.pop()
    with path.open("wb") as file:
        for record in records:
            payload = record.SerializeToString()
            file.write(struct.pack("<Q", len(payload)) + bytes(4) + payload + bytes(4))


def damage_v2(path, draw):
    if path.suffix != ".parquet" or draw(st.booleans()):
        content = path.read_bytes()
        path.write_bytes(content[: draw(st.integers(0, len(content) - 1))])
        return
    table = pq.read_table(path)
    for name in draw(st.lists(st.sampled_from(table.column_names), max_size=3, unique=True)):
        how = draw(st.sampled_from(["drop", "rename", "shorten"]))
        if how == "drop":
            table = table.drop_columns([name])
        elif how == "rename":
            table = table.rename_columns([n + "_old" if n == name else n for n in table.column_names])
        else:
            table = table.slice(0, draw(st.integers(0, table.num_rows)))
    pq.write_table(table, path)


def files_of(kind, source):
    if kind == "lerobot-v2":
        return sorted(path for path in source.rglob("*") if path.is_file())
    return sorted(path for path in source.rglob("*") if path.is_file() and path.suffix != ".json")


def survives(kind, folder, data):
    """Damage a recording; the conversion refuses it in words, or holds only right frames."""
    source = folder / "raw"
    wanted = recording(kind, source, (4, 3))
    path = data.draw(st.sampled_from(files_of(kind, source)), label="file")
    change = {"rlds": damage_records, "lerobot-v2": damage_v2}.get(kind, damage_hdf5)
    change(path, data.draw)
    try:
        dataset = converted(kind, source, folder / "out")
    except SpatialForcingError:
        return
    found = [tuple(map(bytes, (e["states"].tobytes(), e["actions"].tobytes()))) for e in wanted]
    for episode in dataset.episodes:
        rows = slice(episode.start, episode.stop)
        key = (dataset.state[rows].tobytes(), dataset.action[rows].tobytes())
        assert key in found, "rows that no episode of the source has"
        images = wanted[found.index(key)]["images"]
        for camera in dataset.cameras:
            for i in range(episode.length):
                assert np.array_equal(dataset.image(episode.start + i, camera), images[camera][i])


FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
MANY = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", WRITERS)
def test_damage_is_refused_in_words(kind, tmp_path_factory):
    @FEW
    @given(st.data())
    def run(data):
        survives(kind, tmp_path_factory.mktemp("damaged"), data)

    run()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", WRITERS)
def test_damage_is_refused_in_words_in_many_examples(kind, tmp_path_factory):
    @MANY
    @given(st.data())
    def run(data):
        folder = tmp_path_factory.mktemp("damaged")
        try:
            survives(kind, folder, data)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    run()


def test_every_converter_is_among_them():
    assert set(CONVERTERS) == {NAMES.get(kind, kind) for kind in WRITERS}


def test_a_source_without_recordings_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for kind in WRITERS:
        with pytest.raises(DataError, match=str(tmp_path / "empty")):
            converted(kind, tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_start_that_failed_leaves_nothing_in_the_way_of_the_corrected_command(tmp_path):
    wanted = recording("aloha", tmp_path / "raw")
    with pytest.raises(ConfigError, match="'torqe'"):
        converted("aloha", tmp_path / "raw", tmp_path / "out", append=("torqe",))
    assert_holds(converted("aloha", tmp_path / "raw", tmp_path / "out"), wanted)
    with pytest.raises(
        ConfigError, match=r"/out holds .*append: there \[\], asked for \['observations/qpos'\]"
    ):  # now there is something to lose
        converted("aloha", tmp_path / "raw", tmp_path / "out", append=("observations/qpos",))
