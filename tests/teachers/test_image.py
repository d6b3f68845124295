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


def dinov3():
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIGLIP, num_register_tokens=2))


def siglip2():
    vision = {**VIT, "patch_size": 16, "intermediate_size": 64, "num_patches": 16}
    return transformers.Siglip2Model(transformers.Siglip2Config(text_config=TEXT, vision_config=vision))


def siglip2_vision():
    vision = {**VIT, "patch_size": 16, "intermediate_size": 64, "num_patches": 16}
    return transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**vision))


def vjepa2():
    predictor = {"pred_hidden_size": 24, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2}
    return transformers.VJEPA2Model(
        transformers.VJEPA2Config(**VIT, crop_size=48, patch_size=16, **predictor)
    )


def radio():
    return transformers.RadioModel(
        transformers.RadioConfig(**VIT, patch_size=16, image_size=48, max_img_size=96)
    )


def tipsv2_vision():
    return transformers.Tipsv2VisionModel(transformers.Tipsv2VisionConfig(**DINO))


def tipsv2():
    text = {**TEXT, "hidden_size": WIDTH, "num_attention_heads": 2}
    return transformers.Tipsv2Model(transformers.Tipsv2Config(text_config=text, vision_config=DINO))


def depth_pro():
    vit = {**VIT, "model_type": "dinov2", "image_size": 48, "patch_size": 16}
    config = transformers.DepthProConfig(
        image_model_config=vit, patch_model_config=vit, fov_model_config=vit, patch_size=48,
        intermediate_hook_ids=[1, 0], intermediate_feature_dims=[8, 8], scaled_images_feature_dims=[8, 8, 8],
        fusion_hidden_size=8,
    )  # fmt: skip
    return transformers.DepthProForDepthEstimation(config)


def zoedepth():
    backbone = transformers.BeitConfig(
        **{**VIT, "intermediate_size": 64}, image_size=48, patch_size=16, out_indices=[0, 1, 2, 3],
        use_relative_position_bias=True, reshape_hidden_states=False,
    )  # fmt: skip
    sizes = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "bottleneck_features": 8}
    return transformers.ZoeDepthForDepthEstimation(
        transformers.ZoeDepthConfig(backbone_config=backbone, **sizes)
    )


KINDS = {
    "dinov2": (dinov2, 14, 70),
    "dinov2_with_registers": (with_registers, 14, 70),
    "siglip": (siglip, 16, 48),
    "siglip_vision_model": (siglip_vision, 16, 48),
    "depth_anything": (depth_anything, 14, 70),
    "depth_pro": (depth_pro, 16, 48),
    "dinov3_vit": (dinov3, 16, 48),
    "radio": (radio, 16, 48),
    "siglip2": (siglip2, 16, 256),
    "siglip2_vision_model": (siglip2_vision, 16, 256),
    "tipsv2": (tipsv2, 14, 70),
    "tipsv2_vision_model": (tipsv2_vision, 14, 70),
    "vjepa2": (vjepa2, 16, 48),
    "zoedepth": (zoedepth, 16, 48),
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
    teacher = load_teacher(checkpoints / kind, framing="pad" if image.FAMILIES[kind].fixed else "fit")
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


def outputs_of(kind, whole, pixels):
    """The first and the last block's output through the final norm, by transformers' own forward."""
    norm = image.FAMILIES[kind].norm
    if kind in ("depth_anything", "zoedepth", "depth_pro"):
        vit = whole.depth_pro.encoder.image_encoder.model if kind == "depth_pro" else whole.backbone
        hidden = vit(pixels, output_hidden_states=True).hidden_states
        return [norm(vit)(hidden[k]) for k in (1, -1)]
    if kind == "vjepa2":
        video = torch.stack([pixels, pixels], dim=1)
        output = whole(video, skip_predictor=True, output_hidden_states=True)
    elif kind.startswith("siglip2"):
        rows, columns = (side // 16 for side in pixels.shape[-2:])
        cut = [
            pixels[:, :, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16].permute(0, 2, 3, 1).flatten(1)
            for r in range(rows) for c in range(columns)
        ]  # fmt: skip
        output = whole(
            torch.stack(cut, dim=1),
            pixel_attention_mask=torch.ones(len(pixels), rows * columns),
            spatial_shapes=torch.tensor([[rows, columns]] * len(pixels)),
            output_hidden_states=True,
        )
    else:
        output = whole(pixels, output_hidden_states=True)
    return [norm(whole)(output.hidden_states[1]), output.last_hidden_state]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_are_those_of_transformers(checkpoints, kind):
    _, _, size = KINDS[kind]
    teacher = load_teacher(checkpoints / kind)
    pixels = images(B=2, V=1, size=(size, size))
    first, last = (f.flatten(2, 3)[:, 0] for f in teacher.features(Views.create(pixels), (0, -1)))
    whole = getattr(transformers, image.FAMILIES[kind].model).from_pretrained(checkpoints / kind).eval()
    inputs = normalised(teacher, pixels[:, 0])
    expected = outputs_of(kind, whole, inputs)
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


def test_a_fixed_grid_is_said_before_anything_is_encoded(checkpoints):
    with pytest.raises(ConfigError, match="encodes 48 px only, not 64"):
        load_teacher(checkpoints / "vjepa2", resolution=64)
    with pytest.raises(ConfigError, match=r"these are 40 x 60; .*framing='pad'"):
        load_teacher(checkpoints / "vjepa2").features(Views.create(images()))


def test_a_class_that_this_transformers_lacks_names_the_version_and_the_way_round(checkpoints, monkeypatch):
    monkeypatch.setattr(image.transformers, "RadioModel", None)
    with pytest.raises(CheckpointError, match=r"no RadioModel; install transformers>=5\.16.*cache"):
        load_teacher(checkpoints / "radio")


def test_missing_weights_and_foreign_kinds_are_refused(checkpoints, tmp_path):
    model = dinov2()
    state = {k: v for k, v in model.state_dict().items() if "layer.1.mlp" not in k}
    model.save_pretrained(tmp_path / "torn", state_dict=state)
    with pytest.raises(CheckpointError, match=r"lacks 4 weights of Dinov2Model: encoder\.layer\.1\.mlp"):
        load_teacher(tmp_path / "torn")
    (tmp_path / "torn" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match=r"'bert'.*2D teachers are depth_anything, depth_pro"):
        image.load_image_teacher(
            str(tmp_path / "torn"), None, resolution=None, dtype=torch.float32, device="cpu", heads=False,
            variant={},
        )  # fmt: skip


def test_controls_are_registered_with_their_licences():
    assert TEACHERS["facebook/dinov2-large"].licence == "Apache-2.0"
    assert TEACHERS["google/siglip-so400m-patch14-384"].licence == "Apache-2.0"
    large = TEACHERS["depth-anything/Depth-Anything-V2-Large-hf"]
    assert large.licence == "CC-BY-NC-4.0"
    assert TEACHERS[large.commercial_alternative].licence == "Apache-2.0"
