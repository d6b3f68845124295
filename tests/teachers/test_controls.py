"""Controls: shuffled targets (random weights are tested with their architectures)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.protocols import Teacher
from spatial_forcing.teachers import load_teacher
from spatial_forcing.teachers.cache import CachedTeacher
from spatial_forcing.teachers.controls import FutureTeacher, ShuffledTeacher
from tests.fakes import FakeTeacher
from tests.teachers.cache.cache_fakes import FakeSource, build, views_of

ABSENT = [(4, "wrist"), (6, "front"), (9, "wrist"), (11, "wrist")]


@pytest.fixture
def source():
    return FakeSource(absent=ABSENT)


@pytest.fixture
def cached(source, tmp_path):
    return CachedTeacher(build(FakeTeacher(), source, tmp_path / "cache"))


def test_every_frame_gets_another_ones_features(source, cached):
    shuffled = ShuffledTeacher(cached)
    assert isinstance(shuffled, Teacher)
    frames = np.arange(len(source))
    donors = shuffled.donors(frames)
    assert sorted(donors) == frames.tolist()
    lonely = 6  # the only frame without its front view
    assert (donors == frames).tolist() == (frames == lonely).tolist()
    (ours,) = shuffled.features(views_of(source, frames))
    (theirs,) = cached.features(views_of(source, donors))
    assert torch.equal(ours, theirs)


def test_donors_have_the_same_views(source, cached):
    donors = ShuffledTeacher(cached).donors(np.array([4, 9, 11]))
    assert set(donors) == {4, 9, 11}


def test_the_permutation_is_fixed_by_the_seed(source, cached):
    frames = np.arange(len(source))
    first, again = ShuffledTeacher(cached).donors(frames), ShuffledTeacher(cached).donors(frames[::-1])[::-1]
    assert first.tolist() == again.tolist()
    assert first.tolist() != ShuffledTeacher(cached, seed=1).donors(frames).tolist()


def test_a_later_frames_features_stay_within_the_episode(tmp_path):
    source = FakeSource()  # episodes of 3, 5, 2 and 4 frames
    cached = CachedTeacher(build(FakeTeacher(), source, tmp_path / "cache"))
    later = FutureTeacher(cached, 2)
    assert isinstance(later, Teacher)
    assert later.donors(np.arange(14)).tolist() == [2, 2, 2, 5, 6, 7, 7, 7, 9, 9, 12, 13, 13, 13]
    frames = np.array([0, 3, 7])
    (ours,) = later.features(views_of(source, frames))
    (theirs,) = cached.features(views_of(source, np.array([2, 5, 7])))
    assert torch.equal(ours, theirs)
    assert later.fingerprint != cached.fingerprint
    with pytest.raises(ConfigError, match="future is 0 frames"):
        FutureTeacher(cached, 0)


def test_it_names_itself_and_refuses_what_the_cache_refuses(source, cached):
    shuffled = ShuffledTeacher(cached)
    assert shuffled.name == "shuffled:fake"
    assert shuffled.fingerprint != cached.fingerprint
    assert shuffled.to("cpu") is shuffled
    with pytest.raises(DataError, match=r"frames \[14, 99\] are not in"):
        shuffled.features(views_of(FakeSource((14, 90)), [14, 99]))
    with pytest.raises(ConfigError, match="'shuffled:vggt-nano' is a control over cached features"):
        load_teacher("shuffled:vggt-nano")
