"""Pruning frees what no reader uses, and loses nothing else whenever it is killed."""

from __future__ import annotations

import pytest
import torch

from spatial_forcing.errors import DataError
from spatial_forcing.teachers.cache import CachedTeacher, cache_info, prune_cache, verify_cache
from spatial_forcing.teachers.cache import prune as cache_prune
from tests.fakes import FakeTeacher
from tests.teachers.cache.cache_fakes import FakeSource, build, views_of


@pytest.fixture
def source():
    return FakeSource()


@pytest.fixture
def folder(source, tmp_path):
    return build(FakeTeacher(), source, tmp_path / "cache")


def size(folder):
    return sum(path.stat().st_size for path in folder.glob("*.bin"))


def test_a_tidy_cache_is_left_alone(source, folder):
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    found = prune_cache(folder, source)
    assert (found.leftovers, found.damaged, found.gone, found.bytes) == ((), (), (), 0)
    del before["lock"]
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert {name: after[name] for name in before} == before


def test_rows_of_replaced_episodes_are_freed(source, folder):
    frames, row = list(range(14)), cache_info(folder).row_bytes
    source.seeds[0], source.seeds[2] = 100, 102
    build(FakeTeacher(), source, folder, replace_changed=True)
    (expected,) = CachedTeacher(folder, source=source).features(views_of(source, frames))
    assert size(folder) == (14 + 5) * row
    assert prune_cache(folder, source, dry_run=True).bytes == 5 * row
    assert size(folder) == (14 + 5) * row
    assert prune_cache(folder, source).bytes == 5 * row
    assert size(folder) == 14 * row
    assert torch.equal(CachedTeacher(folder, source=source).features(views_of(source, frames))[0], expected)
    assert verify_cache(folder) == []
    for seed in (200, 201):  # a pruned cache can be built upon, and a pruned shard pruned again
        source.seeds[0] = seed
        build(FakeTeacher(), source, folder, replace_changed=True)
        prune_cache(folder)
        assert size(folder) == 14 * row
    (fresh,) = FakeTeacher().features(views_of(source, frames))
    (stored,) = CachedTeacher(folder, source=source).features(views_of(source, frames))
    torch.testing.assert_close(stored, fresh, atol=0.02, rtol=0.01)
    assert verify_cache(folder) == []


def test_episodes_that_are_gone_are_dropped_when_the_dataset_is_given(folder):
    shorter = FakeSource((3, 5))
    assert prune_cache(folder).gone == ()
    assert cache_info(folder).frames == 14
    assert prune_cache(folder, shorter).gone == (2, 3)
    assert cache_info(folder).frames == 8
    assert len(CachedTeacher(folder, source=shorter)) == 8
    other = FakeSource()
    other.seeds = [7, 8, 9, 10]
    with pytest.raises(DataError, match="no episode of demo is the same"):
        prune_cache(folder, other)


def test_leftovers_are_removed(folder):
    (folder / "shard-00009.bin").write_bytes(b"uncounted")
    (folder / "shard-00001.partial").write_bytes(b"torn")
    found = prune_cache(folder)
    assert {path.name for path in found.leftovers} == {"shard-00009.bin", "shard-00001.partial"}
    assert found.bytes == 13
    assert not any(path.exists() for path in found.leftovers)
    assert cache_info(folder).frames == 14


def test_a_missing_data_file_costs_its_episodes_only(source, folder):
    (folder / "shard-00000.bin").unlink()
    assert prune_cache(folder).damaged == (0, 1)
    assert verify_cache(folder) == []
    build(FakeTeacher(), source, folder)
    assert cache_info(folder).frames == 14


@pytest.mark.parametrize("step", ["replace", "save", "unlink"])
def test_a_killed_prune_loses_nothing(source, folder, monkeypatch, step):
    source.seeds[0] = 100
    build(FakeTeacher(), source, folder, replace_changed=True)
    (expected,) = CachedTeacher(folder).features(views_of(source, range(14)))

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step == "replace":
            patch.setattr(cache_prune.os, "replace", die)
        elif step == "save":
            patch.setattr(cache_prune.Shard, "save", die)
        else:
            patch.setattr(cache_prune.Path, "unlink", lambda self, missing_ok=False: die())
        with pytest.raises(KeyboardInterrupt):
            prune_cache(folder)
    views = views_of(source, range(14))
    assert torch.equal(CachedTeacher(folder, source=source).features(views)[0], expected)
    prune_cache(folder)
    assert size(folder) == 14 * cache_info(folder).row_bytes
    assert torch.equal(CachedTeacher(folder, source=source).features(views)[0], expected)
    assert verify_cache(folder) == []
