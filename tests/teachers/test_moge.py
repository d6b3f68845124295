"""MoGe-2's encoder: names and arithmetic of DINOv2's own code, which `da3.Backbone` shares."""

import pytest
import torch

from spatial_forcing.alignment import Views
from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.protocols import Teacher
from spatial_forcing.teachers import TEACHERS, load_teacher, moge
from spatial_forcing.teachers.da3 import DA3Config, DA3HeadConfig
from spatial_forcing.teachers.da3.backbone import Backbone
from spatial_forcing.teachers.frozen import random_stream
from spatial_forcing.teachers.preprocess import IMAGENET_MEAN, IMAGENET_STD

TINY = "dinov2_tiny14"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(moge.SIZES, TINY, (32, 3, 2))


@pytest.fixture(scope="module")
def original():
    """DINOv2 by its own names, every parameter random."""
    sizes = DA3Config(embed_dim=32, depth=3, num_heads=2, start=None, head=DA3HeadConfig((0, 1, 1, 2)))
    with random_stream(0):
        model = Backbone(sizes)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.norm.eps = 1e-6  # Depth Anything 3 changed it
    return model.eval()


def write(folder, original, edit=None, backbone=TINY):
    weights = {f"encoder.backbone.{k}": v for k, v in original.state_dict().items()}
    weights |= {"encoder.backbone.mask_token": torch.zeros(1, 32), "neck.0.weight": torch.ones(2)}
    if edit is not None:
        edit(weights)
    config = {"encoder": {"backbone": backbone, "intermediate_layers": 4, "dim_out": 32}, "neck": {}}
    folder.mkdir(exist_ok=True)
    torch.save({"model_config": config, "model": weights}, folder / "model.pt")
    return folder


def images(side=518):
    return torch.rand(1, 2, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_every_layer_is_dinov2s_at_its_own_size(tmp_path, original):
    teacher = load_teacher(write(tmp_path / "moge", original))
    assert isinstance(teacher, Teacher)
    assert (teacher.dim, teacher.depth, teacher.patch, teacher.resolution) == (32, 3, 14, 518)
    found = teacher.features(Views.create(images()), (0, 1, 2))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        expected = original(((images() - mean) / std).flatten(0, 1)[:, None], (0, 1, 2))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[0], theirs[:, 0, 1:].unflatten(1, (37, 37)), atol=2e-5, rtol=1e-4)


def test_a_file_alone_and_another_size_work(tmp_path, original):
    folder = write(tmp_path / "moge", original)
    teacher = load_teacher(folder / "model.pt", resolution=70)
    (found,) = teacher.features(Views.create(images(70)))
    assert found.shape == (1, 2, 5, 5, 32)
    other = load_teacher(folder, resolution=70)
    assert other.fingerprint == teacher.fingerprint
    assert load_teacher(folder).fingerprint != teacher.fingerprint
    random = load_teacher(f"random:{folder}", resolution=70)
    assert random.fingerprint != teacher.fingerprint
    assert random.licence == "Apache-2.0"


def test_cards_are_free_and_random_weights_need_no_download():
    names = [name for name in TEACHERS if "moge-2" in name]
    assert len(names) == 4
    assert {TEACHERS[name].commercial for name in names} == {"yes"}
    teacher = load_teacher("random:Ruicheng/moge-2-vits-normal", resolution=28)
    assert teacher.dim == TEACHERS["Ruicheng/moge-2-vits-normal"].facts.channels == 384


def drop(key):
    return lambda weights: weights.pop(f"encoder.backbone.{key}")


@pytest.mark.parametrize(
    ("edit", "backbone", "message"),
    [
        (drop("norm.weight"), TINY, "missing keys: layernorm.weight"),
        (drop("blocks.1.ls1.gamma"), TINY, r"encoder\.layer\.1\.layer_scale1\.lambda1"),
        (lambda w: w.update({"encoder.backbone.extra": torch.ones(1)}), TINY, "unexpected keys: extra"),
        (
            lambda w: w.update({"encoder.backbone.norm.bias": torch.ones(3)}),
            TINY,
            r"mismatched keys: .*layernorm\.bias",
        ),
        (lambda w: w.clear(), TINY, "missing keys"),
        (None, "dinov2_vitx14", "dinov2_vitx14.*dinov2_vits14"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, original, edit, backbone, message):
    with pytest.raises(CheckpointError, match=message):
        load_teacher(write(tmp_path / "moge", original, edit, backbone))


def test_other_files_and_settings_are_refused(tmp_path, original):
    folder = write(tmp_path / "moge", original)
    with pytest.raises(ConfigError, match="views"):
        load_teacher(f"{folder}?views=alone")
    with pytest.raises(ConfigError, match="multiple of the teacher's patch size 14"):
        load_teacher(folder, resolution=100)
    torch.save({"model_config": {"encoder": "dinov2"}, "model": {}}, folder / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt is no MoGe-2"):
        load_teacher(folder)
    (folder / "model.pt").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        load_teacher(folder)
