"""`forcing.tap` "vision": the first-class students name their tower, and its tokens are where they say."""

from __future__ import annotations

import pytest
import torch

from spatial_forcing.alignment import IMAGE_PREFIX
from spatial_forcing.errors import ConfigError, LayoutError
from spatial_forcing.forcing import ForcingConfig, SpatialForcing
from spatial_forcing.forcing.extras.tower import on_tower, views_in_sequence
from spatial_forcing.students import LoraSettings, LoraStudent, NanoConfig, NanoVLA, Pi0
from tests.fakes import CAMERAS, FakeStudent, FakeTeacher, fake_batch
from tests.students.openvla_oft.small import small as small_oft
from tests.students.pi0_fixtures import small_config

STATS = {
    "observation.state": {"mean": [0.0] * 4, "std": [1.0] * 4, "q01": [-3.0] * 4, "q99": [3.0] * 4},
    "action": {"mean": [0.0] * 3, "std": [1.0] * 3, "q01": [-3.0] * 3, "q99": [3.0] * 3},
}


def pi0():
    return Pi0.create(small_config(), STATS)


def oft():
    student = small_oft()
    student.fit(STATS)
    return student


@pytest.fixture(params=[pi0, oft], ids=["pi0", "openvla_oft"])
def student(request):
    torch.manual_seed(0)
    return request.param()


def forced(student, **options):
    return SpatialForcing(student, FakeTeacher(), ForcingConfig(tap="vision", **options))


def tower_output(student, batch):
    seen = []
    handle = student.vision_tower.module.register_forward_hook(lambda m, a, output: seen.append(output))
    with torch.no_grad():
        student(batch)
    handle.remove()
    return seen[0]


def test_the_alignment_trains_the_tower_and_the_projector_and_no_block(student):
    forcing = forced(student)
    _, align, metrics = forcing.losses(fake_batch(batch_size=2))
    align.backward()
    assert "cosine/vision_teacher2" in metrics
    assert all(p.grad.abs().sum() > 0 for p in forcing.projector.parameters())
    tower = student.vision_tower
    assert forcing.projector.fc1.in_features == tower.dim == tower_output(student, fake_batch(2)).shape[-1]
    assert all(p.grad is None for block in student.blocks for p in block.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


def test_tokens_are_the_patches_of_their_view(student):
    batch = fake_batch(batch_size=2, size=56)
    layout = on_tower(student.alignment(batch).layout)
    B, V, h, w = layout.index.shape
    before = views_in_sequence(V)([tower_output(student, batch)])
    for b, v, row, column in ((0, 1, 0, w - 1), (1, 0, h - 1, 0)):
        painted = {k: x.clone() if torch.is_tensor(x) else x for k, x in batch.items()}
        image = painted[IMAGE_PREFIX + CAMERAS[v]]
        size = (image.shape[-2] // h, image.shape[-1] // w)
        y, x = row * size[0], column * size[1]
        image[b, :, y : y + size[0], x : x + size[1]] = 1 - image[b, :, y : y + size[0], x : x + size[1]]
        after = views_in_sequence(V)([tower_output(student, painted)])
        moved = (after - before).norm(dim=-1)
        token = int(layout.index[b, v, row, column])
        assert int(moved[b].argmax()) == token
        others = torch.ones(B, V * h * w, dtype=torch.bool)
        others[b, v * h * w : (v + 1) * h * w] = False
        assert float(moved[others].max()) < 1e-5  # other views and samples saw nothing


def test_a_frozen_tower_is_refused_and_adapters_in_it_are_enough():
    student = oft()
    student.vision.requires_grad_(False)
    with pytest.raises(ConfigError, match="vision tower"):
        forced(student).losses(fake_batch(2))
    adapted = LoraStudent(oft(), LoraSettings(rank=2), base="base")
    forcing = forced(adapted)
    _, align, _ = forcing.losses(fake_batch(2))
    align.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters())


def test_alpha_zero_stays_the_student_alone(student):
    batch = fake_batch(batch_size=2)
    torch.manual_seed(1)
    alone = student(batch)[0]
    torch.manual_seed(1)
    assert torch.equal(forced(student, alpha=0.0)(batch)[0], alone)


@pytest.mark.parametrize(
    "student", [FakeStudent(), NanoVLA(NanoConfig(cameras=CAMERAS))], ids=["fake", "nano"]
)
def test_a_student_without_a_tower_says_what_to_tap(student):
    with pytest.raises(ConfigError, match=rf"{type(student).__name__} names no vision tower.*\(0, -1\)"):
        forced(student)
    with pytest.raises(ConfigError, match="no vision tower"):
        forced(LoraStudent(student, LoraSettings(rank=2), base="base"))


def test_pairs_do_not_count_blocks_of_the_tower():
    with pytest.raises(ConfigError, match=r"tap is vision.*\(\(2, -1\),\).*is -1"):
        ForcingConfig(tap="vision", pairs=((2, -1),))
    assert forced(oft(), pairs=((-1, 0), (-1, 1))).pairs[1].layer == 1


def test_an_output_that_is_no_row_of_views_is_refused():
    with pytest.raises(LayoutError, match=r"\(3, 4, 5\).*2 views"):
        views_in_sequence(2)([torch.zeros(3, 4, 5)])
