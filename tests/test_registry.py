import pytest

from spatial_forcing.errors import ConfigError
from spatial_forcing.registry import Registry, did_you_mean


def test_lookup_and_iteration():
    registry = Registry[int]("teacher")
    registry.add("vggt-nano", 1)
    assert registry["vggt-nano"] == 1
    assert list(registry) == ["vggt-nano"]
    assert "dino" not in registry


def test_an_unknown_name_gets_the_closest_and_the_list():
    registry = Registry[int]("teacher")
    registry.add("vggt-nano", 1)
    registry.add("dinov2", 2)
    with pytest.raises(ConfigError, match=r"unknown teacher 'vgt-nano'. Did you mean 'vggt-nano'\?.*dinov2"):
        registry["vgt-nano"]


def test_a_name_is_registered_once():
    registry = Registry[int]("teacher")
    registry.add("a", 1)
    with pytest.raises(ConfigError, match="twice"):
        registry.add("a", 2)


def test_nothing_close_gives_no_suggestion():
    assert did_you_mean("zzz", ["reach-v3"]) == ""
