import numpy as np
import pytest
import torch

from spatial_forcing.errors import ConfigError, DataError, EnvironmentSetupError
from spatial_forcing.nano_teacher import scenes
from spatial_forcing.nano_teacher.losses import make_targets
from spatial_forcing.nano_teacher.scenes import (
    DEPTH_MAX,
    SceneDataset,
    SceneSpec,
    missing_shards,
    render_scenes,
    shard_path,
)
from spatial_forcing.nano_teacher.world import TabletopWorld

SMALL = SceneSpec(("hammer-v3", "coffee-pull-v3", "coffee-push-v3"), count=7, views=2, size=32, seed=3)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(scenes, "SHARD", 4)
    monkeypatch.setattr(scenes, "SCENES_PER_RESET", 2)


@pytest.fixture
def rendered(tmp_path):
    assert list(render_scenes(tmp_path, SMALL)) == [0, 1]
    return tmp_path


def test_a_deleted_shard_is_rendered_again_bit_for_bit(rendered):
    path = shard_path(rendered, 1)
    before = path.read_bytes()
    path.unlink()
    assert missing_shards(rendered, SMALL) == [1]
    assert list(render_scenes(rendered, SMALL)) == [1]
    assert path.read_bytes() == before
    assert list(render_scenes(rendered, SMALL)) == []
    assert sorted(p.name for p in rendered.iterdir()) == [
        "manifest.json",
        "scenes-00000.safetensors",
        "scenes-00001.safetensors",
    ]


def test_what_is_read_is_exact_geometry(rendered):
    dataset = SceneDataset(rendered)
    assert len(dataset) == 8
    batch = dataset.batch(torch.arange(8))
    assert batch.images.shape == (8, 2, 3, 32, 32)
    assert batch.images.dtype == torch.uint8
    assert 0 < float(batch.depth.min()) <= float(batch.depth.max()) <= DEPTH_MAX + 1e-6
    # Table and floor are in every scene: points carried to the world lie on the table and above the floor.
    points = make_targets(batch, (32, 32)).points
    world = (
        points @ batch.poses[:, 0, :3, :3].transpose(1, 2)[:, None, None]
        + batch.poses[:, :1, None, None, :3, 3]
    )
    heights = world[..., 2][make_targets(batch, (32, 32)).solid]
    assert float(heights.min()) > -0.95
    assert float((heights.abs() < 0.003).float().mean()) > 0.1
    swapped = batch.select(torch.tensor([1, 0]))
    assert torch.equal(swapped.images[:, 0], batch.images[:, 1])
    assert torch.equal(swapped.poses[:, 1], batch.poses[:, 0])


def test_another_specification_is_refused_and_a_larger_count_extends(rendered):
    with pytest.raises(DataError, match="seed"):
        list(render_scenes(rendered, SceneSpec(SMALL.tasks, 7, views=2, size=32, seed=4)))
    assert missing_shards(rendered, SceneSpec(SMALL.tasks, 12, views=2, size=32, seed=3)) == [2]


def test_too_little_disk_is_said_before_anything_is_written(tmp_path):
    huge = SceneSpec(("hammer-v3",), count=40, size=10**7)
    with pytest.raises(EnvironmentSetupError, match="MiB"):
        next(render_scenes(tmp_path / "x", huge))
    assert not (tmp_path / "x").exists()


def test_bad_specifications_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="1 or more"):
        SceneSpec((), 4)
    with pytest.raises(ConfigError, match="views=2"):
        SceneSpec(("hammer-v3",), 4, cameras="policy")
    with pytest.raises(DataError, match="no rendered scenes"):
        SceneDataset(tmp_path)


def test_plain_worlds_have_no_clutter_and_random_ones_do():
    rng = np.random.default_rng(0)
    with TabletopWorld("hammer-v3", 32) as world:
        world.reset(rng)
        counts = []
        for _ in range(6):
            world.advance(rng)
            counts.append(int((world.model.geom_rgba[world._clutter, 3] > 0).sum()))
        world.advance(rng, plain=True)
        assert max(counts) > 0
        assert not (world.model.geom_rgba[world._clutter, 3] > 0).any()
        rgb, depth = world.render(world.corner_camera())
        assert rgb.shape == (32, 32, 3)
        assert 0.3 < float(np.median(depth)) < 2


def test_policy_cameras_are_upright():
    with TabletopWorld("hammer-v3", 32) as world:
        world.reset(np.random.default_rng(0))
        pose = world.corner_camera().pose
        assert pose[2, 1] < 0
        assert np.allclose(pose[:3, 3], [0.75, 0.075, 0.7], atol=1e-6)
