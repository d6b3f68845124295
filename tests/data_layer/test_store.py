import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from spatial_forcing import storage
from spatial_forcing.data import Dataset, DatasetWriter
from spatial_forcing.data.store import DecodedStore, store_bytes, verify_store
from spatial_forcing.errors import DataError, EnvironmentSetupError

ROOT = Path(__file__).parents[2]


def count_decoded(monkeypatch):
    """A list that grows by every image the dataset decodes."""
    decoded, original = [], Dataset.image

    def image(self, index, camera):
        decoded.append((index, camera))
        return original(self, index, camera)

    monkeypatch.setattr(Dataset, "image", image)
    return decoded


def assert_equal_to_decoding(decoded: DecodedStore, dataset: Dataset):
    for camera in decoded.cameras:
        wanted = np.stack([dataset.image(i, camera) for i in range(len(dataset))])
        assert np.array_equal(decoded.images(np.arange(len(dataset)), camera), wanted)


@pytest.mark.parametrize("video", [False, True])
def test_equals_decoding_and_is_built_once(tmp_path, build, monkeypatch, video):
    dataset = Dataset.open(build.write_dataset(tmp_path / "d", video=video))
    assert_equal_to_decoding(DecodedStore.build(dataset, progress=False), dataset)
    opened = Dataset.open(dataset.root)
    decoded = count_decoded(monkeypatch)
    again = DecodedStore.build(opened, progress=False)
    assert decoded == []
    assert again.images([5, 0, 5], "wrist").shape == (3, 16, 16, 3)


def test_reduced_frames_keep_their_aspect(dataset):
    reduced = DecodedStore.build(dataset, ["front"], size=16, progress=False)
    assert reduced.frame_size("front") == (12, 16)
    assert DecodedStore.build(dataset, ["front"], size=999, progress=False).frame_size("front") == (24, 32)
    assert store_bytes(dataset, ["front"], size=16) == 19 * 12 * 16 * 3


def test_an_interrupted_build_resumes(dataset, monkeypatch):
    original = Dataset.image

    def interrupted(self, index, camera):
        if index == 8:
            raise KeyboardInterrupt
        return original(self, index, camera)

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            DecodedStore.build(dataset, ["front"], progress=False)
    decoded = count_decoded(monkeypatch)
    resumed = DecodedStore.build(dataset, ["front"], progress=False)
    assert [index for index, _ in decoded] == list(range(6, 19))  # episode 0 was complete
    assert_equal_to_decoding(resumed, dataset)


def test_a_grown_dataset_decodes_only_what_is_new(dataset, build, monkeypatch):
    DecodedStore.build(dataset, ["wrist"], progress=False)
    writer = DatasetWriter.resume(dataset.root)
    build.add_episode(writer, 3, 5)
    writer.finalize()
    grown = Dataset.open(dataset.root)
    assert verify_store(grown) == []  # what is not there yet is not a defect
    decoded = count_decoded(monkeypatch)
    result = DecodedStore.build(grown, ["wrist"], progress=False)
    assert [index for index, _ in decoded] == list(range(19, 24))
    assert_equal_to_decoding(result, grown)


def test_a_changed_episode_is_decoded_again(dataset, build, tmp_path, monkeypatch):
    DecodedStore.build(dataset, ["front"], progress=False)
    writer = build.new_writer(tmp_path / "other")
    for episode, length in enumerate(build.LENGTHS):
        build.add_episode(writer, 7 if episode == 1 else episode, length)
    writer.finalize()
    shutil.copytree(dataset.root / ".decoded", tmp_path / "other/.decoded")
    changed = Dataset.open(tmp_path / "other")
    decoded = count_decoded(monkeypatch)
    result = DecodedStore.build(changed, ["front"], progress=False)
    assert [index for index, _ in decoded] == list(range(6, 15))
    assert_equal_to_decoding(result, changed)


def test_damage_is_found_and_truncation_repaired(dataset):
    DecodedStore.build(dataset, ["front"], progress=False)
    assert verify_store(dataset) == []
    file = next((dataset.root / ".decoded").glob("front-*.u8"))
    content = bytearray(file.read_bytes())
    content[7 * 24 * 32 * 3] ^= 1
    file.write_bytes(content)
    assert verify_store(dataset) == [(1, f".decoded/{file.name}")]
    file.write_bytes(content[: len(content) // 2])
    assert {episode for episode, _ in verify_store(dataset)} == {1, 2}
    assert_equal_to_decoding(DecodedStore.build(dataset, ["front"], progress=False), dataset)
    assert verify_store(dataset) == []


def test_too_little_disk_is_said_before_anything_is_written(dataset, monkeypatch):
    usage = shutil.disk_usage(dataset.root)._replace(free=10 * 2**20)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(EnvironmentSetupError, match="10 MiB are free"):
        DecodedStore.build(dataset, progress=False)
    assert not list((dataset.root / ".decoded").glob("*.u8"))


def test_a_camera_outside_the_store_is_named(dataset):
    with pytest.raises(DataError, match="'front' is not in this store"):
        DecodedStore.build(dataset, ["wrist"], progress=False).images([0], "front")


def test_a_store_of_some_episodes_holds_no_others(dataset, monkeypatch):
    decoded = count_decoded(monkeypatch)
    part = DecodedStore.build(dataset, ["front"], progress=False, episodes=[0, 2])
    assert [index for index, _ in decoded] == [*range(6), *range(15, 19)]
    assert np.array_equal(part.images([0, 16], "front"), [dataset.image(i, "front") for i in (0, 16)])
    with pytest.raises(DataError, match=r"frames \[8\]"):  # its rows in the file are zeros
        part.images([0, 8], "front")
    decoded.clear()
    assert_equal_to_decoding(DecodedStore.build(dataset, ["front"], progress=False), dataset)
    assert [index for index, _ in decoded][:9] == list(range(6, 15))


def test_a_folder_may_be_given(dataset, tmp_path):
    elsewhere = Dataset.open(dataset.root, store=tmp_path / "stores")
    assert_equal_to_decoding(DecodedStore.build(elsewhere, progress=False), elsewhere)
    (folder,) = (tmp_path / "stores").iterdir()
    assert folder.name.startswith("dataset-")
    assert not (dataset.root / ".decoded").exists()
    assert verify_store(elsewhere) == []


PROGRAM = """
import os, sys
from spatial_forcing.data import Dataset
from spatial_forcing.data.store import DecodedStore, store_folder
dataset = Dataset.open(sys.argv[1])
if os.geteuid() == 0:  # whom no mode keeps from writing
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
store = DecodedStore.build(dataset, progress=False)
assert store.images([7], "front").any()
print(store_folder(dataset))
"""


def test_a_dataset_in_a_folder_that_cannot_be_written(build):
    """Its store goes into the user's cache folder."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        cache = Path(place) / "cache"
        cache.mkdir()
        cache.chmod(0o777)
        root = build.write_dataset(Path(place) / "dataset")
        folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(root)],
            env={**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        for folder in folders:
            folder.chmod(0o755)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(cache / "spatial-forcing" / "decoded" / "dataset-"))
        assert not (root / ".decoded").exists()
