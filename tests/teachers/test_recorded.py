"""Recorded depth as a teacher: geometry of analytic scenes, the encoding, holes, live and cached."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_forcing.alignment import Views
from spatial_forcing.data import Dataset, DatasetWriter
from spatial_forcing.data.augment import Augment
from spatial_forcing.data.info import extrinsic_key
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.forcing import ForcingConfig, SpatialForcing, layout_from_offset
from spatial_forcing.forcing.target import make_targets
from spatial_forcing.protocols import Teacher
from spatial_forcing.students import NanoConfig
from spatial_forcing.teachers import load_teacher
from spatial_forcing.teachers.cache import CachedTeacher, build_cache, dataset_source
from spatial_forcing.teachers.recorded import WAVELENGTHS, RecordedDepth, median_cells, surface
from spatial_forcing.training import TrainConfig, train
from spatial_forcing.training.config import OptimConfig
from spatial_forcing.training.metrics import read_metrics
from tests.fakes import FakeStudent

SIZE = 28
K = np.array([[30.0, 0, SIZE / 2], [0, 30.0, SIZE / 2], [0, 0, 1]])
CAMERAS = ("front", "wrist")
STUDENT = NanoConfig(
    cameras=CAMERAS, image_size=28, patch_size=4, width=16, depth=2, heads=2, action_dim=3, state_dim=4,
    chunk=2, vocab=64,
)  # fmt: skip
few = settings(max_examples=25, deadline=None)


def rays():
    v, u = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    return np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones_like(u)], -1)


def plane(normal, distance):
    """Depth (H, W) of the plane of points p with normal . p = -distance, seen from the origin."""
    return (-distance / (rays() @ np.asarray(normal, float))).astype(np.float32)


def pose(angle, shift):
    c, s = math.cos(angle), math.sin(angle)
    found = np.eye(4, dtype=np.float32)
    found[:3, :3] = [[c, 0, s], [0, 1, 0], [-s, 0, c]]
    found[:3, 3] = shift
    return found


class Scene:
    """Depth by frame and camera; poses if given."""

    def __init__(self, depths, poses=None):
        self.depths, self.poses = depths, poses
        self.info = SimpleNamespace(depths=dict.fromkeys(CAMERAS, "depth"))

    def depth(self, index, camera):
        return self.depths[index, camera]

    def intrinsics(self, camera):
        return K

    def extrinsics(self, index, camera):
        if self.poses is None:
            raise DataError("no extrinsics")
        return self.poses[camera]


def views_of(keys, cameras=("front",), present=None):
    images = torch.zeros(len(keys), len(cameras), 3, SIZE, SIZE)
    return Views.create(images, cameras, keys=torch.tensor(keys), present=present)


@few
@given(st.floats(-0.6, 0.6), st.floats(-0.6, 0.6), st.floats(0.3, 3.0))
def test_a_planes_normal_and_points_are_found_at_every_pixel(a, b, distance):
    normal = np.array([a, b, -1.0]) / np.linalg.norm([a, b, -1.0])
    depth = plane(normal, distance)
    points, normals, measured = surface(torch.from_numpy(depth), torch.from_numpy(K).float())
    assert measured.all()
    torch.testing.assert_close(
        normals, torch.from_numpy(normal).float().expand(SIZE, SIZE, 3), atol=2e-3, rtol=0
    )
    np.testing.assert_allclose(points.numpy(), rays() * depth[..., None], rtol=1e-4, atol=1e-4)


def test_a_normal_does_not_reach_over_an_edge_or_a_hole():
    depth = torch.full((SIZE, SIZE), 1.0)
    depth[:, SIZE // 2 :] = 2.0
    depth[5, 5] = 0.0
    _, normals, measured = surface(depth, torch.from_numpy(K).float())
    assert not measured[5, 5]
    assert measured.sum() == SIZE * SIZE - 1
    torch.testing.assert_close(
        normals[measured], torch.tensor([0.0, 0.0, -1.0]).expand(SIZE * SIZE - 1, 3), atol=1e-5, rtol=0
    )


def test_a_cell_is_its_pixel_of_median_depth_and_needs_half_of_them():
    depth = torch.ones(8, 8)
    depth[:4, :4] = torch.arange(16.0).view(4, 4) + 1
    depth[4:, 4:] = 0
    depth[4:6, 4:] = 3.0
    depth[:, 4:][:4] = 0
    depth[0, 4] = 5.0
    values, known = median_cells(depth[..., None], depth, depth > 0, (2, 2))
    assert known.tolist() == [[1, 0], [1, 1]]
    assert values[0, 0, 0] == 8
    assert values[1, 1, 0] == 3


def test_features_are_the_encoded_numbers():
    teacher = RecordedDepth(Scene({(0, "front"): plane([0, 0, -1], 2.0)}), resolution=28)
    assert isinstance(teacher, Teacher)
    assert (teacher.dim, teacher.depth, teacher.patch) == (84, 1, 14)
    (features,) = teacher.features(views_of([0]))
    assert features.shape == (1, 1, 2, 2, 84)
    cell = features[0, 0, 1, 1].view(7, len(WAVELENGTHS), 2)
    angles = cell[..., 0].atan2(cell[..., 1])
    # Half a revolution of 8 is 4: these numbers are unambiguous at the longest wavelength.
    numbers = angles[:, 0] * WAVELENGTHS[0] / (2 * math.pi)
    assert float(numbers[0]) == pytest.approx(math.log(2.0), abs=1e-4)
    assert numbers[1:4].tolist() == pytest.approx([0, 0, -1], abs=1e-4)
    assert float(numbers[6]) == pytest.approx(2.0, abs=1e-4)
    assert float(numbers[4]) == pytest.approx(float(numbers[5]), abs=0.7)  # lower right of the axis
    assert 0 < min(numbers[4:6]) <= max(numbers[4:6]) < 2 * SIZE / 2 / K[0, 0]
    for k, wavelength in enumerate(WAVELENGTHS):
        turns = numbers * 2 * math.pi / wavelength
        expected = torch.stack([turns.sin(), turns.cos()], -1)
        torch.testing.assert_close(cell[:, k], expected, atol=2e-3, rtol=0)


@few
@given(st.floats(0.5, 2.0), st.floats(0.5, 2.0))
def test_the_cosine_falls_with_the_difference(first, second):
    scene = Scene({(k, "front"): plane([0, 0, -1], d) for k, d in enumerate((first, second))})
    (features,) = RecordedDepth(scene, resolution=28).features(views_of([0, 1]))
    cosine = torch.cosine_similarity(features[0], features[1], dim=-1)
    assert (cosine <= 1 + 1e-5).all()
    if abs(first - second) < 1e-3:
        assert (cosine > 0.99).all()
    if abs(first - second) > 0.2:
        assert (cosine < 0.97).all()


def test_two_cameras_agree_on_world_points():
    """A wall at world z = 2, seen from two poses: what is the same point has the same world features."""
    poses = {"front": pose(0.0, [0, 0, 0]), "wrist": pose(0.25, [-0.4, 0, 0.1])}
    depths = {}
    for camera, matrix in poses.items():
        normal = matrix[:3, :3].T @ np.array([0, 0, -1.0])
        depths[0, camera] = plane(normal, 2.0 - matrix[2, 3])
    scene = Scene(depths, poses)
    world = RecordedDepth(scene, "world", resolution=28 * 14)
    both = RecordedDepth(scene, resolution=28)
    assert (world.dim, both.dim, both.posed) == (84, 120, True)
    assert RecordedDepth(scene, "camera", resolution=28).dim == 84
    (features,) = world.features(views_of([0], CAMERAS))
    cells = features[0].view(2, 28, 28, 7, len(WAVELENGTHS), 2)
    angle = cells[..., 0, 0].atan2(cells[..., 0, 1]) * WAVELENGTHS[0] / (2 * math.pi)
    np.testing.assert_allclose(angle[..., 6].numpy(), 2.0, atol=2e-3)
    np.testing.assert_allclose(angle[..., 1:4].reshape(-1, 3).numpy(), [[0, 0, -1]] * 1568, atol=3e-3)


def test_absent_views_and_unmeasured_cells_are_zero_and_others_do_not_notice():
    depth = plane([0, 0, -1], 1.0)
    holed = depth.copy()
    holed[:14, :14] = 0
    teacher = RecordedDepth(Scene({(0, "front"): depth, (1, "front"): holed}), resolution=28)
    (features,) = teacher.features(views_of([0, 1]))
    assert (features[1, 0, 0, 0] == 0).all()
    torch.testing.assert_close(features[1, 0, 1], features[0, 0, 1], atol=0.2, rtol=0)
    present = torch.tensor([[True], [False]])
    (features,) = teacher.features(views_of([0, 1], present=present))
    assert (features[1] == 0).all()
    with pytest.raises(DataError, match=r"'recorded-depth' needs Views\.keys"):
        teacher.features(Views.create(torch.zeros(1, 1, 3, SIZE, SIZE), ("front",)))
    with pytest.raises(ConfigError, match="layer 1 does not exist"):
        teacher.features(views_of([0]), (1,))


def test_the_fingerprint_follows_the_settings():
    scene = Scene({}, dict.fromkeys(CAMERAS, np.eye(4, dtype=np.float32)))
    found = {
        RecordedDepth(scene).fingerprint, RecordedDepth(scene, "camera").fingerprint,
        RecordedDepth(scene, "world").fingerprint, RecordedDepth(scene, resolution=112).fingerprint,
        RecordedDepth(Scene({})).fingerprint,
    }  # fmt: skip
    assert len(found) == 5


def test_it_is_named_like_any_teacher_and_says_what_it_needs(recorded):
    teacher = load_teacher("recorded-depth?points=camera", dataset=recorded, resolution=112)
    assert (teacher.name, teacher.points, teacher.resolution) == (
        "recorded-depth?points=camera",
        "camera",
        112,
    )
    with pytest.raises(ConfigError, match="reads the depth of a dataset"):
        load_teacher("recorded-depth")
    with pytest.raises(ConfigError, match="'random:'"):
        load_teacher("random:recorded-depth", dataset=recorded)
    with pytest.raises(ConfigError, match="Did you mean 'camera'"):
        load_teacher("recorded-depth?points=camra", dataset=recorded)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Walls at random distances; a part of the second episode's depth is missing."""
    root = tmp_path_factory.mktemp("recorded") / "data"
    rng = np.random.default_rng(0)
    with DatasetWriter.create(
        root, fps=10, cameras=dict.fromkeys(CAMERAS, (SIZE, SIZE)), state_dim=4, action_dim=3, depth=True,
        extrinsics=True, intrinsics=dict.fromkeys(CAMERAS, K),
    ) as writer:  # fmt: skip
        for episode in range(2):
            for _ in range(5):
                depth = {c: plane([0.2 * rng.random(), 0, -1], 0.5 + rng.random()) for c in CAMERAS}
                if episode:
                    depth["wrist"][:20] = 0
                images = {c: rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8) for c in CAMERAS}
                frame = {
                    "images": images, "depth": depth, "state": rng.normal(size=4).astype(np.float32),
                    "action": rng.normal(size=3).astype(np.float32),
                    "extrinsics": {c: np.eye(4, dtype=np.float32) for c in CAMERAS},
                }  # fmt: skip
                writer.add_frame(frame, task="look")
            writer.save_episode()
    return Dataset.open(root)


@pytest.mark.parametrize("augment", [None, Augment(crop_area=(0.2, 0.4))])
def test_live_and_cached_give_the_same_losses(recorded, augment, tmp_path):
    teacher = load_teacher("recorded-depth", dataset=recorded)
    build_cache(teacher, dataset_source(recorded, CAMERAS), tmp_path / "cache", progress=False)
    curves = []
    for name, cache in (("live", None), ("cached", tmp_path / "cache")):
        config = TrainConfig(
            dataset=recorded.root, output=tmp_path / name, cache=cache, teacher="recorded-depth", steps=3,
            batch_size=4, log_every=1, augment=augment, trackers=(), progress=False, cpu=True,
            student=STUDENT,
            forcing=ForcingConfig(alpha=0.5, pairs=((1, -1),)), optim=OptimConfig(warmup_steps=1),
        )  # fmt: skip
        train(config)
        curves.append([(row["align_loss"], row["action_loss"]) for row in read_metrics(tmp_path / name)])
    for live, cached in zip(*curves, strict=True):
        assert live == pytest.approx(cached, rel=5e-3)  # the cache holds bfloat16
    assert curves[0][0][0] > 0


def test_what_was_not_measured_is_no_target(recorded):
    """The second episode's wrist depth is missing in its upper part."""
    teacher = load_teacher("recorded-depth", dataset=recorded)
    views = Views.create(torch.zeros(1, 2, 3, SIZE, SIZE), CAMERAS, keys=torch.tensor([7]))
    layout = layout_from_offset(1, 2, (4, 4), start=0)
    (target,) = make_targets(
        teacher.features(views), views, layout, valid=layout.valid, partial=True, pe_scale=0.1
    )
    known = (target != 0).any(-1)[0]
    assert known[0].all()
    assert not known[1, :2].any()
    assert known[1, 3].all()


def test_means_over_what_was_not_measured_are_refused(recorded, tmp_path):
    teacher = load_teacher("recorded-depth", dataset=recorded)
    for setting in ("subtract_cell_mean", "standardise"):
        with pytest.raises(ConfigError, match=f"'recorded-depth' says nothing of some cells.*{setting}"):
            SpatialForcing(FakeStudent(), teacher, ForcingConfig(**{setting: True}))
    with pytest.raises(ConfigError, match="leave channels out"):
        build_cache(teacher, dataset_source(recorded, CAMERAS), tmp_path, channels=16, progress=False)


def test_a_cache_notices_that_the_depth_has_changed(recorded, tmp_path):
    """The colour images stay; their hashes alone would not tell."""
    teacher = load_teacher("recorded-depth", dataset=recorded)
    source = dataset_source(recorded, CAMERAS)
    build_cache(teacher, source, tmp_path / "cache", progress=False)
    CachedTeacher(tmp_path / "cache", source=source)
    changed = shutil.copytree(recorded.root, tmp_path / "changed")
    (file,) = changed.glob("data/**/*.parquet")
    table, name = pq.read_table(file), extrinsic_key("front")
    moved = np.stack(table[name].to_pylist()) + 0.01
    column = pa.array(moved.tolist(), type=table.schema.field(name).type)
    pq.write_table(table.set_column(table.column_names.index(name), table.schema.field(name), column), file)
    other = dataset_source(Dataset.open(changed), CAMERAS)
    assert other.episodes == source.episodes
    with pytest.raises(DataError, match=r"no episode of .*changed is the same"):
        CachedTeacher(tmp_path / "cache", source=other)
