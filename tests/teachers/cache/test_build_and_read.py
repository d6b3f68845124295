import errno
import fcntl
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from spatial_forcing import storage
from spatial_forcing.alignment import Views
from spatial_forcing.errors import ConfigError, DataError, EnvironmentSetupError
from spatial_forcing.protocols import Teacher
from spatial_forcing.teachers.cache import (
    CachedTeacher,
    SourceEpisode,
    cache_info,
    dataset_source,
    prune_cache,
    verify_cache,
)
from spatial_forcing.teachers.cache import build as cache_build
from tests.fakes import CAMERAS, FakeTeacher
from tests.teachers.cache.cache_fakes import LENGTHS, CountingTeacher, FakeSource, build, views_of


@pytest.fixture
def source():
    return FakeSource(absent=[(4, "wrist"), (6, "front")])


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 2**-8), ("int8", 1 / 127)])
def test_cached_features_are_the_teachers(source, folder, dtype, tolerance):
    teacher = FakeTeacher()
    build(teacher, source, folder, layers=(-1, 0), dtype=dtype)
    cached = CachedTeacher(folder)
    assert isinstance(cached, Teacher)
    views = views_of(source, [13, 4, 0, 6, 7, 4])
    for fresh, stored in zip(
        teacher.features(views, (0, 2, 0)), cached.features(views, (0, -1, 0)), strict=True
    ):
        assert stored.dtype == torch.float32
        bound = tolerance * fresh.abs().amax(-1, keepdim=True)
        assert ((fresh - stored).abs() <= bound + 1e-7).all()
    absent = cached.features(views)[0]
    assert absent[1, 1].abs().max() == 0
    assert absent[3, 0].abs().max() == 0
    assert len(cached) == len(source)


def test_the_cache_describes_its_teacher(source, folder):
    teacher = FakeTeacher()
    cached = CachedTeacher(build(teacher, source, folder), fingerprint=teacher.fingerprint, source=source)
    for fact in ("name", "licence", "fingerprint", "dim", "depth", "patch", "resolution"):
        assert getattr(cached, fact) == getattr(teacher, fact)
    info = cache_info(folder)
    assert info.header.grid == (5, 5)
    assert info.header.layers == (2,)
    assert info.header.dataset == "demo"
    assert (info.episodes, info.frames) == (4, 14)
    assert info.shards > 1
    assert info.bytes == info.frames * info.row_bytes
    assert verify_cache(folder) == []


def test_fidelity_costs_a_hundredth_of_the_build(folder):
    header = cache_info(build(FakeTeacher(), FakeSource((700, 500)), folder, batch_size=64)).header
    assert header.fidelity_frames == 12


def test_fidelity_is_measured_against_the_teacher(source, folder, tmp_path):
    exact = cache_info(build(FakeTeacher(), source, folder)).header
    coarse = cache_info(build(FakeTeacher(), source, tmp_path / "int8", dtype="int8")).header
    assert exact.fidelity_frames == 8
    for header in (exact, coarse):
        figures = header.fidelity["2"]
        assert 0.99 < figures["cosine_mean_removed"] <= figures["cosine"] <= 1 + 1e-9


def test_a_common_vector_hides_losses_from_the_raw_cosine_only():
    measured = cache_build.cosines(torch.tensor([[9.0, 1], [9, -1]]), torch.tensor([[9.0, -1], [9, 1]]))
    assert measured["cosine"] == pytest.approx(80 / 82)
    assert measured["cosine_mean_removed"] == pytest.approx(-1)


def test_features_that_change_from_call_to_call_are_reported(source, folder, caplog):
    build(FakeTeacher(), source, folder)
    assert "agree with fresh ones" not in caplog.text

    class Restless(FakeTeacher):
        def features(self, views, layers=(-1,)):
            return tuple(torch.randn_like(layer) for layer in super().features(views, layers))

    build(Restless(), source, folder.with_name("restless"))
    assert "layer 2 agree with fresh ones only to cosine" in caplog.text


def test_int8_rows_are_small():
    facts = cache_build.teacher_facts(FakeTeacher())
    header = cache_build.CacheHeader(
        facts, ("a", "b"), (0,), (16, 16), 256, "int8", frame_size=(64, 64), dataset="demo"
    )
    raw = replace(header, channels=2048, dtype="bf16")
    assert header.row.itemsize * 15.5 <= raw.row.itemsize


def test_a_complete_cache_is_not_built_again(source, folder):
    build(FakeTeacher(), source, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = CountingTeacher()
    build(again, source, folder)
    assert again.frames == [0]  # the one that tells the grid
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("dies_at", range(0, 14, 3))
def test_a_killed_build_resumes_without_losing_or_repeating_a_row(source, folder, tmp_path, dies_at):
    build(FakeTeacher(), source, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        build(CountingTeacher(dies_at=dies_at), source, folder)
    done = cache_info(folder).frames if (folder / "header.json").exists() else 0
    assert done <= dies_at
    teacher = CountingTeacher()
    build(teacher, source, folder)
    fresh = teacher.frames[1 : 1 + len(source) - done]
    assert fresh == list(range(done, len(source)))
    assert cache_info(folder).frames == len(source)
    assert verify_cache(folder) == []
    every = views_of(source, range(len(source)))
    (whole,), (resumed,) = (
        CachedTeacher(tmp_path / "whole").features(every),
        CachedTeacher(folder).features(every),
    )
    assert torch.equal(whole, resumed)


def test_a_kill_between_data_and_record_leaves_nothing_torn(source, folder, monkeypatch):
    def die(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache_build.Shard, "save", die)
        with pytest.raises(KeyboardInterrupt):
            build(FakeTeacher(), source, folder)
    assert (folder / "shard-00000.bin").exists()
    (folder / "shard-00007.bin").write_bytes(b"left by an earlier build")
    (folder / "shard-00001.partial").write_bytes(b"torn")
    assert cache_info(folder).frames == 0
    build(FakeTeacher(), source, folder)
    assert verify_cache(folder) == []
    assert not (folder / "shard-00007.bin").exists()
    assert not list(folder.glob("*.partial"))


def test_a_grown_dataset_adds_only_what_is_new(folder):
    build(FakeTeacher(), FakeSource(LENGTHS[:2]), folder)
    grown, teacher = FakeSource(), CountingTeacher()
    with pytest.raises(DataError, match=r"frames \[8, 13\] are not in .*8 frames of demo"):
        CachedTeacher(folder).features(views_of(grown, [2, 13, 8]))
    build(teacher, grown, folder)
    assert teacher.frames[1:7] == list(range(8, 14))
    assert teacher.frames[7:] == [0, 1, 3, 5, 7, 9, 11, 13]  # the fidelity sample
    (stored,) = CachedTeacher(folder, source=grown).features(views_of(grown, [2, 13, 8]))
    (fresh,) = FakeTeacher().features(views_of(grown, [2, 13, 8]))
    torch.testing.assert_close(stored, fresh, atol=0.02, rtol=0.01)


def test_changed_episodes_are_named_and_replaced_on_demand(source, folder):
    build(FakeTeacher(), source, folder)
    source.seeds[0], source.seeds[2] = 100, 102
    with pytest.raises(DataError, match=r"episodes \[0, 2\] of demo have changed"):
        build(FakeTeacher(), source, folder)
    with pytest.raises(DataError, match=r"episodes \[0, 2\] of demo have changed"):
        CachedTeacher(folder, source=source)
    teacher = CountingTeacher()
    build(teacher, source, folder, replace_changed=True)
    assert teacher.frames[1:6] == [0, 1, 2, 8, 9]
    every = views_of(source, range(len(source)))
    (fresh,), (stored,) = FakeTeacher().features(every), CachedTeacher(folder, source=source).features(every)
    torch.testing.assert_close(stored, fresh, atol=0.02, rtol=0.01)
    assert verify_cache(folder) == []


def test_another_dataset_is_refused_naming_both(source, folder):
    build(FakeTeacher(), source, folder)
    other = FakeSource()
    other.identity, other.seeds = "other", [10, 11, 12, 13]
    for refuse in (
        lambda: build(FakeTeacher(), other, folder),
        lambda: CachedTeacher(folder, source=other),
    ):
        with pytest.raises(DataError, match="caches demo, and no episode of other is the same"):
            refuse()
    source.identity = "demo moved elsewhere"
    build(FakeTeacher(), source, folder)


def test_another_cache_in_the_folder_is_refused_naming_both(source, folder):
    build(FakeTeacher(), source, folder)
    foreign = FakeTeacher()
    foreign.fingerprint = "f" * 64
    with pytest.raises(DataError, match=r"teacher: .*'0{64}'.* cached, .*'f{64}'"):
        build(foreign, source, folder)
    with pytest.raises(DataError, match=r"fingerprint 0{64}, not f{64}"):
        CachedTeacher(folder, fingerprint="f" * 64)
    with pytest.raises(DataError, match="dtype: bf16 cached, int8 asked for"):
        build(FakeTeacher(), source, folder, dtype="int8")
    with pytest.raises(DataError, match=r"layers: \(2,\) cached, \(0,\) asked for"):
        build(FakeTeacher(), source, folder, layers=(0,))
    with pytest.raises(DataError, match=r"cameras: \('front', 'wrist'\) cached, \('wrist', 'front'\) asked"):
        build(FakeTeacher(), source, folder, cameras=("wrist", "front"))


def test_foreign_requests_are_refused(source, folder):
    build(FakeTeacher(), source, folder)
    cached, views = CachedTeacher(folder), views_of(source, [0, 4])
    with pytest.raises(
        DataError, match=r"caches the cameras \('front', 'wrist'\).*shows \('wrist', 'front'\)"
    ):
        cached.features(replace(views, cameras=("wrist", "front")))
    with pytest.raises(DataError, match=r"shows \('front',\)"):
        cached.features(views_of(source, [0], ("front",)))
    with pytest.raises(DataError, match=r"needs Views.keys"):
        cached.features(replace(views, keys=None))
    with pytest.raises(DataError, match=r"frame 4 was cached with present views \[True, False\]"):
        cached.features(replace(views, present=torch.ones(2, 2, dtype=torch.bool)))
    with pytest.raises(DataError, match=r"frames \[-1, 14\]"):
        cached.features(replace(views, keys=torch.tensor([-1, 14])))
    with pytest.raises(ConfigError, match=r"layers \[0\] .* has \(2,\); build a cache with layers=\(0, 2\)"):
        cached.features(views, (0, -1))
    with pytest.raises(ConfigError, match="layer 3 does not exist"):
        cached.features(views, (3,))


def test_wrong_settings_are_refused_before_anything_is_written(source, folder):
    with pytest.raises(ConfigError, match=r"demo has \('front', 'wrist'\)"):
        build(FakeTeacher(), source, folder, cameras=("front", "top"))
    with pytest.raises(ConfigError, match="'fp4'"):
        build(FakeTeacher(), source, folder, dtype="fp4")
    with pytest.raises(ConfigError, match="batch_size is 0"):
        build(FakeTeacher(), source, folder, batch_size=0)
    with pytest.raises(DataError, match=r"demo has no"):
        build(FakeTeacher(), FakeSource(()), folder)
    assert not folder.exists()


def test_a_teacher_that_gives_nan_is_stopped(source, folder):
    teacher = FakeTeacher()
    teacher.weight[2, 0] = float("nan")
    with pytest.raises(DataError, match=r"layer 2 for frames 0 to 1 of demo"):
        build(teacher, source, folder)
    assert cache_info(folder).frames == 0


def test_damage_is_found_named_and_mended(source, folder):
    build(FakeTeacher(), source, folder)
    whole = CachedTeacher(folder).features(views_of(source, range(14)))[0]
    data = sorted(folder.glob("shard-*.bin"))
    flipped = bytearray(data[1].read_bytes())
    flipped[len(flipped) // 2] ^= 4
    data[1].write_bytes(flipped)
    (problem,) = verify_cache(folder)
    assert "shard-00001.bin" in problem
    assert "do not match their checksums" in problem
    data[0].write_bytes(data[0].read_bytes()[:-1])
    problems = verify_cache(folder)
    assert len(problems) == 2
    assert "it is damaged" in problems[0]
    for refuse in (lambda: CachedTeacher(folder), lambda: build(FakeTeacher(), source, folder)):
        with pytest.raises(DataError, match=r"shard-00000.bin has \d+ bytes, \d+ expected.*cache prune"):
            refuse()
    pruned = prune_cache(folder)
    assert (pruned.damaged, pruned.gone, pruned.leftovers) == ((1, 3), (), ())
    again = CountingTeacher()
    build(again, source, folder)
    # Episode 0 lay whole before the missing byte, episode 2 before the flipped one.
    assert again.frames[1:10] == [*range(3, 8), *range(10, 14)]
    assert verify_cache(folder) == []
    assert torch.equal(CachedTeacher(folder).features(views_of(source, range(14)))[0], whole)


def test_no_cache_and_other_versions_are_named(source, folder):
    with pytest.raises(DataError, match=r"cache/header\.json"):
        CachedTeacher(folder)
    build(FakeTeacher(), source, folder)
    path = folder / "header.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(DataError, match=r"version 99.*reads version 1"):
        CachedTeacher(folder)
    path.write_text(json.dumps({**content, "colour": "red"}))
    with pytest.raises(DataError, match="colour"):
        CachedTeacher(folder)
    path.write_text("{")
    with pytest.raises(DataError, match=r"header\.json .*line 1 column 2"):
        CachedTeacher(folder)


def test_the_disk_is_checked_first_and_a_full_one_keeps_what_is_done(source, folder, monkeypatch):
    usage = type("Usage", (), {"free": storage.SPARE_BYTES})
    with monkeypatch.context() as patch:
        patch.setattr(storage.shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(EnvironmentSetupError, match=r"the cache needs .* MiB .*64 MiB are free"):
            build(FakeTeacher(), source, folder)
    assert not (folder / "header.json").exists()
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 4:  # header, first shard, its record, second shard
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache_build.os, "fsync", full)
        with pytest.raises(EnvironmentSetupError, match=r"/cache is full"):
            build(FakeTeacher(), source, folder)
    assert cache_info(folder).shards == 1
    assert verify_cache(folder) == []
    assert not list(folder.glob("*.partial"))


def test_two_builders_on_one_folder_are_refused(source, folder):
    folder.mkdir()
    code = f"""
import fcntl, sys
handle = open({str(folder / "lock")!r}, "w")
fcntl.flock(handle, fcntl.LOCK_EX)
handle.write("4711")
handle.flush()
print("locked", flush=True)
sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(EnvironmentSetupError, match="process 4711 is building"):
            build(FakeTeacher(), source, folder)
    finally:
        other.communicate()
    build(FakeTeacher(), source, folder)  # the lock died with its process
    with open(folder / "lock") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_pickled_reader_carries_no_data(source, folder):
    cached = CachedTeacher(build(FakeTeacher(), source, folder))
    views = views_of(source, [1, 9])
    (expected,) = cached.features(views)
    copy = pickle.loads(pickle.dumps(cached))
    assert copy._open == {}
    assert torch.equal(copy.features(views)[0], expected)


def test_datasets_plug_in(folder):
    frames = FakeSource((2, 3))
    frames.cameras = ("wrist", "front", "top")
    rows = [type("Row", (), {"index": i, "start": s, "length": n}) for i, (s, n) in enumerate(frames.spans)]

    class Dataset:
        root, cameras, episodes = "somewhere/demo", frames.cameras, rows

        def image(self, index, camera):
            return frames._image(index, camera)

        def content_hash(self, episode, cameras=None, *, geometry=False):
            return f"{episode} of {cameras}"

    plain = dataset_source(Dataset(), CAMERAS)
    fast = dataset_source(Dataset(), CAMERAS, images=frames.images)
    assert plain.episodes == fast.episodes
    assert plain.episodes[1] == SourceEpisode(2, 3, 1, f"1 of {CAMERAS}")
    build(FakeTeacher(), plain, folder)
    again = CountingTeacher()
    build(again, fast, folder)
    assert again.frames == [0]
    views = Views.create(
        torch.from_numpy(np.stack([frames.images([3], c) for c in CAMERAS], 1)).movedim(-1, 2),
        CAMERAS,
        keys=torch.tensor([3]),
    )
    (stored,), (fresh,) = CachedTeacher(folder).features(views), FakeTeacher().features(views)
    torch.testing.assert_close(stored, fresh, atol=0.02, rtol=0.01)
