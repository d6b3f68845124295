"""2D teachers, on small random checkpoints in transformers' layout."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from spatial_forcing.alignment import Views
from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.protocols import Teacher
from spatial_forcing.teachers import TEACHERS, cards, image, load_teacher

WIDTH, LAYERS = 32, 3
VIT = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
DINO = {**VIT, "image_size": 70, "patch_size": 14}
SIGLIP = {**VIT, "image_size": 48, "patch_size": 16, "intermediate_size": 64}
TEXT = {**VIT, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 20}


def dinov2():
    return transformers.Dinov2Model(transformers.Dinov2Config(**DINO))


def with_registers():
    config = transformers.Dinov2WithRegistersConfig(**DINO, num_register_tokens=4)
    return transformers.Dinov2WithRegistersModel(config)


def siglip():
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=SIGLIP))


def siglip_vision():
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP))


def depth_anything():
    backbone = transformers.Dinov2Config(**DINO, out_indices=[0, 1, 2, 3], reshape_hidden_states=False)
    sizes = {"reassemble_hidden_size": WIDTH, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    config = transformers.DepthAnythingConfig(backbone_config=backbone, patch_size=14, **sizes)
    return transformers.DepthAnythingForDepthEstimation(config)


KINDS = {
    "dinov2": (dinov2, 14, 70),
    "dinov2_with_registers": (with_registers, 14, 70),
    "siglip": (siglip, 16, 48),
    "siglip_vision_model": (siglip_vision, 16, 48),
    "depth_anything": (depth_anything, 14, 70),
}


@pytest.fixture(autouse=True)
def _nothing_announced(monkeypatch):
    monkeypatch.setattr(cards, "_announced", set())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    for name, (make, *_) in KINDS.items():
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
        model.save_pretrained(root / name)
    return root


def images(B=2, V=2, size=(40, 60)):
    return torch.rand(B, V, 3, *size, generator=torch.Generator().manual_seed(1))


def test_every_family_is_tested():
    assert set(KINDS) == set(image.FAMILIES)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_become_teachers(checkpoints, kind):
    _, patch, resolution = KINDS[kind]
    teacher = load_teacher(checkpoints / kind)
    assert isinstance(teacher, Teacher)
    facts = (teacher.dim, teacher.depth, teacher.patch, teacher.resolution)
    assert facts == (WIDTH, LAYERS, patch, resolution)
    assert teacher.licence == "LicenseRef-unknown"
    first, last = teacher.features(Views.create(images()), (0, -1))
    grid = (round(40 / 60 * resolution / patch), resolution // patch)
    assert first.shape == last.shape == (2, 2, *grid, WIDTH)
    assert not torch.equal(first, last)
    assert last.dtype == torch.float32
    assert not last.requires_grad


def normalised(teacher, pixels):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (teacher.mean, teacher.std))
    return (pixels - mean) / std


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_are_those_of_transformers(checkpoints, kind):
    _, _, size = KINDS[kind]
    teacher = load_teacher(checkpoints / kind)
    pixels = images(B=2, V=1, size=(size, size))
    first, last = (f.flatten(2, 3)[:, 0] for f in teacher.features(Views.create(pixels), (0, -1)))
    whole = getattr(transformers, image.FAMILIES[kind].model).from_pretrained(checkpoints / kind).eval()
    inputs = normalised(teacher, pixels[:, 0])
    if kind == "depth_anything":
        backbone = whole.backbone
        hidden = backbone(inputs, output_hidden_states=True).hidden_states
        expected = [backbone.layernorm(hidden[k]) for k in (1, -1)]
    else:
        output = whole(inputs, output_hidden_states=True)
        norm = image.FAMILIES[kind].norm(whole)
        expected = [norm(output.hidden_states[1]), output.last_hidden_state]
    for ours, theirs in zip((first, last), expected, strict=True):
        torch.testing.assert_close(ours, theirs[:, -ours.shape[1] :], atol=1e-5, rtol=1e-5)


def test_blocks_after_the_asked_layer_do_not_run(checkpoints):
    teacher, calls = load_teacher(checkpoints / "dinov2"), []
    for number, block in enumerate(teacher.model.encoder.layer):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    views = Views.create(images(B=1))
    (second,) = teacher.features(views, (1,))
    assert calls == [0, 1]
    assert torch.equal(teacher.features(views, (-1, 1, 1))[2], second)
    assert calls == [0, 1, 0, 1, 2]


def test_views_are_independent_and_absent_ones_do_not_reach_it(checkpoints):
    teacher = load_teacher(checkpoints / "siglip")
    pixels, present = images(), torch.tensor([[True, False], [True, True]])
    (features,) = teacher.features(Views.create(pixels, present=present))
    pixels[0, 1] = -1.0
    assert torch.equal(teacher.features(Views.create(pixels, present=present))[0], features)
    assert features[0, 1].abs().max() == 0
    pixels[1, 1] = 1 - pixels[1, 1]
    (changed,) = teacher.features(Views.create(pixels, present=present))
    torch.testing.assert_close(changed[:, 0], features[:, 0])
    assert (changed[1, 1] - features[1, 1]).abs().max() > 0.01


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_lower_precision_is_close(checkpoints, dtype):
    views = Views.create(images())
    (exact,) = load_teacher(checkpoints / "dinov2").features(views)
    (rough,) = load_teacher(checkpoints / "dinov2", dtype=dtype).features(views)
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert torch.cosine_similarity(exact, rough, dim=-1).min() > 0.99


def test_little_memory_gives_the_same_features(checkpoints):
    views = Views.create(images(B=5))
    teacher = load_teacher(checkpoints / "dinov2", memory=1)
    sizes = []
    teacher.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    (one_by_one,) = teacher.features(views)
    assert sizes == [2] * 5
    torch.testing.assert_close(one_by_one, load_teacher(checkpoints / "dinov2").features(views)[0])


def test_pixels_follow_the_checkpoints_image_processor(checkpoints, tmp_path):
    folder = tmp_path / "own"
    dinov2().save_pretrained(folder)
    settings = {"crop_size": {"height": 45, "width": 45}, "image_mean": [0.1] * 3, "image_std": [0.4] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    teacher = load_teacher(folder)
    assert (teacher.mean, teacher.std, teacher.resolution) == ((0.1,) * 3, (0.4,) * 3, 42)
    assert load_teacher(checkpoints / "siglip").mean == (0.5, 0.5, 0.5)
    with pytest.raises(ConfigError, match="resolution 45"):
        load_teacher(folder, resolution=45)


def test_fingerprints_follow_weights_and_preprocessing(checkpoints):
    base_print = load_teacher(checkpoints / "dinov2").fingerprint
    assert load_teacher(checkpoints / "dinov2").fingerprint == base_print
    others = [
        load_teacher(checkpoints / "dinov2", resolution=56),
        load_teacher(checkpoints / "dinov2", dtype="bf16"),
        load_teacher(checkpoints / "dinov2", framing="pad"),
        load_teacher(f"random:{checkpoints / 'dinov2'}"),
    ]
    assert len({base_print, *(teacher.fingerprint for teacher in others)}) == 5


@pytest.mark.parametrize("kind", ["dinov2", "siglip", "depth_anything"])
def test_random_weights_are_the_same_every_time_and_leave_the_stream_alone(checkpoints, kind, caplog):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    name = f"random:{checkpoints / kind}"
    teacher, again = load_teacher(name), load_teacher(name)
    assert torch.equal(torch.rand(1), expected)
    assert teacher.fingerprint == again.fingerprint != load_teacher(checkpoints / kind).fingerprint
    assert (teacher.name, teacher.licence) == (name, "Apache-2.0")
    assert "weights under Apache-2.0" not in caplog.text  # there is no one's licence to announce


def test_missing_weights_and_foreign_kinds_are_refused(checkpoints, tmp_path):
    model = dinov2()
    state = {k: v for k, v in model.state_dict().items() if "layer.1.mlp" not in k}
    model.save_pretrained(tmp_path / "torn", state_dict=state)
    with pytest.raises(CheckpointError, match=r"lacks 4 weights of Dinov2Model: encoder\.layer\.1\.mlp"):
        load_teacher(tmp_path / "torn")
    (tmp_path / "torn" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match=r"'bert'.*2D teachers are depth_anything, dinov2"):
        image.load_image_teacher(
            str(tmp_path / "torn"), None, resolution=None, dtype=torch.float32, device="cpu", heads=False
        )


def test_controls_are_registered_with_their_licences():
    assert TEACHERS["facebook/dinov2-large"].licence == "Apache-2.0"
    assert TEACHERS["google/siglip-so400m-patch14-384"].licence == "Apache-2.0"
    large = TEACHERS["depth-anything/Depth-Anything-V2-Large-hf"]
    assert large.licence == "CC-BY-NC-4.0"
    assert TEACHERS[large.commercial_alternative].licence == "Apache-2.0"
