"""Every student and teacher, real or fake, keeps the contracts of `protocols.py`.

A new student or teacher is added to the parameter lists here and nowhere else.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from spatial_forcing.alignment import Views
from spatial_forcing.protocols import Student, Teacher
from spatial_forcing.students import FusionVLA, NanoConfig, NanoVLA, Pi0
from spatial_forcing.students.base import StudentModule
from spatial_forcing.teachers import load_teacher
from spatial_forcing.teachers.image import FAMILIES, ImageTeacher
from spatial_forcing.teachers.preprocess import IMAGENET_MEAN, IMAGENET_STD
from tests.fakes import CAMERAS, FakeStudent, FakeTeacher, fake_batch
from tests.students.openvla_oft.small import small
from tests.students.pi0_fixtures import small_config

NANO = {"image_size": 24, "patch_size": 8, "width": 32, "depth": 2, "heads": 2, "action_dim": 3, "chunk": 2}
STUDENTS = {
    "fake": FakeStudent,
    "nano-l1": lambda: NanoVLA(NanoConfig(CAMERAS, **NANO)),
    "nano-fusion": lambda: FusionVLA(NanoConfig(CAMERAS, **NANO)),
    "nano-flow": lambda: NanoVLA(NanoConfig(CAMERAS, head="flow", **NANO)),
    "openvla-oft": small,
    "openvla-oft-film": lambda: small(film=True),
    "openvla-oft-tokens": lambda: small(head="tokens"),
    "pi0": lambda: Pi0(small_config()),
}


def tiny_dinov2():
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = transformers.Dinov2Model(config)
    settings = {"resolution": 28, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return ImageTeacher(model, FAMILIES["dinov2"], name="tiny", licence="Apache-2.0", **settings)


TEACHERS = {
    "fake": FakeTeacher,
    "vggt-nano": lambda: load_teacher("vggt-nano"),
    "dinov2": tiny_dinov2,
}
SINGLE_VIEW = ("dinov2",)
"""Teachers that see every view alone, by design."""


@pytest.fixture(params=STUDENTS)
def student(request):
    torch.manual_seed(0)
    return STUDENTS[request.param]()


@pytest.fixture(params=TEACHERS)
def teacher(request):
    return TEACHERS[request.param]()


def observation(seed):
    rng = np.random.default_rng(seed)
    images = {c: rng.integers(0, 255, (24, 24, 3), dtype=np.uint8) for c in CAMERAS}
    return {"images": images, "state": rng.normal(size=4).astype(np.float32), "task": "touch the cube"}


def test_student_protocol_and_loss(student):
    assert isinstance(student, Student)
    loss, metrics = student(fake_batch())
    assert loss.ndim == 0
    assert all(m.ndim == 0 and not m.requires_grad for m in metrics.values())
    loss.backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


def test_a_student_that_lacks_a_member_cannot_be_made():
    class Half(StudentModule):
        @property
        def spec(self):
            return None

    with pytest.raises(TypeError, match=r"act.*alignment.*blocks.*final_norm.*from_pre.*save_pre"):
        Half()


def test_layout_fits_the_views_and_the_sequence(student):
    batch = fake_batch()
    layout, views = student.alignment(batch).layout, student.alignment(batch).views
    assert layout.index.shape == layout.valid.shape
    assert layout.index.shape[:2] == views.present.shape
    lengths = []
    hook = student.blocks[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    student(batch)
    hook.remove()
    assert layout.index.min() >= 0
    assert layout.index.max() < lengths[0]
    positions = layout.index[0][layout.valid[0]]
    assert positions.unique().numel() == positions.numel()


def test_each_token_sees_its_own_patch(student):
    """Painting one patch changes most the position the layout claims, at the first block's input."""
    batch = fake_batch(batch_size=1)
    layout = student.alignment(batch).layout
    seen = []
    hook = student.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    student(batch)
    _, V, h, w = layout.index.shape
    for v, y, x in [(0, 0, 0), (0, h - 1, w - 1), (V - 1, 0, w - 1), (V - 1, h // 2, w // 2), (0, h // 2, 0)]:
        painted = dict(batch)
        key = f"observation.images.{CAMERAS[v]}"
        image = painted[key].clone()
        ph, pw = image.shape[-2] // h, image.shape[-1] // w
        image[..., y * ph : (y + 1) * ph, x * pw : (x + 1) * pw] = 0
        painted[key] = image
        student(painted)
        change = (seen[-1] - seen[0]).norm(dim=-1)[0]
        assert change.argmax() == layout.index[0, v, y, x]
    hook.remove()


def test_act_is_per_row_and_deterministic(student):
    observations = [observation(i) for i in range(3)]
    together = student.act(observations, torch.Generator().manual_seed(0))
    again = student.act(observations, torch.Generator().manual_seed(0))
    assert together.dtype == torch.float32
    assert together.shape[0] == 3
    assert torch.equal(together, again)
    first = student.act(observations[:1], torch.Generator().manual_seed(0))
    torch.testing.assert_close(first[0], together[0], atol=4e-6, rtol=1e-5)


def test_saved_students_act_identically(student, tmp_path):
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path)  # normalisation travels along
    a = student.act([observation(0)], torch.Generator().manual_seed(0))
    assert torch.equal(a, loaded.act([observation(0)], torch.Generator().manual_seed(0)))


def two_views(seed=0, size=40):
    return torch.rand(2, 2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_teacher_protocol_and_shapes(teacher):
    assert isinstance(teacher, Teacher)
    first, last = teacher.features(Views.create(two_views(), CAMERAS), (0, -1))
    assert first.shape == last.shape
    assert first.shape[:2] == (2, 2)
    assert first.shape[-1] == teacher.dim
    assert not first.requires_grad


def test_absent_views_get_zero_rows_and_influence_nothing(teacher):
    images = two_views()
    present = torch.tensor([[True, False], [True, True]])
    (features,) = teacher.features(Views.create(images, CAMERAS, present=present))
    images[0, 1] = 1 - images[0, 1]
    (changed,) = teacher.features(Views.create(images, CAMERAS, present=present))
    assert torch.equal(features, changed)
    assert features[0, 1].abs().max() == 0
    assert features[1, 1].abs().max() > 0


@pytest.mark.parametrize("name", [name for name in TEACHERS if name not in SINGLE_VIEW])
def test_views_attend_across_cameras(name):
    teacher = TEACHERS[name]()
    images = two_views()
    (features,) = teacher.features(Views.create(images, CAMERAS))
    images[:, 1] = 1 - images[:, 1]
    (changed,) = teacher.features(Views.create(images, CAMERAS))
    assert (features[:, 0] - changed[:, 0]).abs().max() > 0
