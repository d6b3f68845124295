"""VGGT as a frozen teacher: layers, absent views, precision, fingerprint, isolation."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from spatial_forcing.alignment import Views
from spatial_forcing.errors import ConfigError
from spatial_forcing.forcing import layout_from_offset
from spatial_forcing.forcing.target import make_targets
from spatial_forcing.protocols import Teacher
from spatial_forcing.teachers import load_teacher
from spatial_forcing.teachers.layers import attention
from spatial_forcing.teachers.preprocess import frame, resize
from spatial_forcing.teachers.vggt import VGGT, CameraHeadConfig, DPTConfig, VGGTConfig, VGGTTeacher

CONFIG = VGGTConfig(
    img_size=28,
    embed_dim=16,
    depth=3,
    num_heads=2,
    patch_embed="conv",
    camera=CameraHeadConfig(trunk_depth=1, num_heads=2),
    dpt=DPTConfig(features=8, out_channels=(8, 8, 8, 8), layers=(0, 1, 2, 2), hidden_channels=8),
)


def tiny_model(seed: int = 0, heads: bool = True) -> VGGT:
    torch.manual_seed(seed)
    model = VGGT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    if heads:
        return model
    bare = VGGT(CONFIG, heads=False)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if k.startswith("aggregator.")})
    return bare


def tiny_teacher(**options) -> VGGTTeacher:
    return VGGTTeacher(tiny_model(), name="tiny", licence="Apache-2.0", **options)


@pytest.fixture
def teacher() -> VGGTTeacher:
    return tiny_teacher()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 3, 20, 20, generator=torch.Generator().manual_seed(1))


def test_it_implements_the_contract(teacher, images):
    assert isinstance(teacher, Teacher)
    assert (teacher.dim, teacher.depth, teacher.patch, teacher.resolution) == (32, 3, 14, 28)
    (features,) = teacher.features(Views.create(images))
    assert features.shape == (3, 3, 2, 2, 32)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.model.training


def test_features_are_the_aggregators_patch_tokens(teacher, images):
    resized = resize(images.flatten(0, 1), 28, 14).unflatten(0, (3, 3))
    assert resized.max() > 1  # bicubic overshoot reaches the model unclamped
    expected = teacher.model.aggregator(resized, (0, 2))
    features = teacher.features(Views.create(images), (0, -1))
    for ours, tokens in zip(features, expected, strict=True):
        torch.testing.assert_close(ours.flatten(2, 3), tokens[:, :, 5:])


def test_targets_can_be_used_in_a_loss_that_trains_the_student(teacher, images):
    (target,) = teacher.features(Views.create(images))
    student = torch.randn(target.shape, requires_grad=True)
    (1 - torch.cosine_similarity(student, target, dim=-1)).mean().backward()
    assert student.grad.abs().sum() > 0


def test_blocks_after_the_asked_layer_do_not_run(teacher, images):
    calls = []
    for block in (*teacher.model.aggregator.frame_blocks, *teacher.model.aggregator.global_blocks):
        block.register_forward_hook(lambda *_: calls.append(1))
    teacher.features(Views.create(images), (1,))
    assert len(calls) == 4


@pytest.mark.parametrize("present", [[True, False, True], [False, True, True], [False, False, True]])
def test_absent_views_neither_influence_nor_appear(teacher, images, present):
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1] = torch.tensor(present)
    changed = images.clone()
    changed[~mask] = -1.0  # out of range, as some datasets write it
    (first,) = teacher.features(Views.create(images, present=mask))
    (second,) = teacher.features(Views.create(changed, present=mask))
    assert torch.equal(first, second)
    assert (first[~mask] == 0).all()
    assert (first[mask].flatten(1).abs().sum(1) > 0).all()
    (alone,) = teacher.features(Views.create(images[1:2, mask[1]]))
    torch.testing.assert_close(first[1, mask[1]], alone[0])
    (full,) = teacher.features(Views.create(images))
    torch.testing.assert_close(first[[0, 2]], full[[0, 2]])


def test_pixels_of_absent_views_do_not_matter_even_unblanked(teacher, images):
    mask = torch.tensor([[True, False, True]] * 3)
    views = Views.create(images, present=mask)
    noisy = torch.rand_like(images).where(~mask[:, :, None, None, None], images)
    raw = replace(views, make=lambda: noisy)
    assert torch.equal(teacher.features(raw)[0], teacher.features(views)[0])


def test_a_sample_without_views_gets_zeros(teacher, images):
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[2] = False
    (features,) = teacher.features(Views.create(images, present=mask))
    assert (features[2] == 0).all()
    (none,) = teacher.features(Views.create(images, present=torch.zeros_like(mask)))
    assert none.shape == features.shape
    assert (none == 0).all()


def test_view_order_matters(teacher, images):
    (features,) = teacher.features(Views.create(images))
    (swapped,) = teacher.features(Views.create(images[:, [1, 0, 2]]))
    assert not torch.allclose(features[:, 0], swapped[:, 1], atol=1e-3)


def test_other_views_matter(teacher, images):
    changed = images.clone()
    changed[:, 2] = 1 - changed[:, 2]
    (first,) = teacher.features(Views.create(images))
    (second,) = teacher.features(Views.create(changed))
    assert not torch.allclose(first[:, 0], second[:, 0], atol=1e-4)


def test_non_square_views_keep_their_proportion(teacher):
    (wide,) = teacher.features(Views.create(torch.rand(1, 2, 3, 20, 40)))
    assert wide.shape == (1, 2, 1, 2, 32)
    (tall,) = tiny_teacher(resolution=56).features(Views.create(torch.rand(1, 2, 3, 40, 20)))
    assert tall.shape == (1, 2, 4, 2, 32)


def test_the_resolution_is_checked_at_once():
    assert tiny_teacher(resolution=42).resolution == 42
    with pytest.raises(ConfigError, match="resolution 30"):
        tiny_teacher(resolution=30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_close_and_returns_float32(teacher, images, dtype):
    views = Views.create(images)
    (exact,), (rough,) = teacher.features(views), tiny_teacher(dtype=dtype).features(views)
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert torch.cosine_similarity(exact, rough, dim=-1).min() > 0.99


def test_the_callers_autocast_does_not_reach_the_teacher(teacher, images):
    views = Views.create(images)
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = teacher.features(views)
    assert torch.equal(inside, teacher.features(views)[0])


def test_the_fingerprint_follows_what_changes_features():
    base = tiny_teacher().fingerprint
    assert len(base) == 64
    assert tiny_teacher().fingerprint == base
    bare = VGGTTeacher(tiny_model(heads=False), name="other", licence="MIT")
    assert bare.fingerprint == base
    assert tiny_teacher(resolution=42).fingerprint != base
    assert tiny_teacher(dtype=torch.bfloat16).fingerprint != base
    assert VGGTTeacher(tiny_model(seed=1), name="tiny", licence="MIT").fingerprint != base
    changed = tiny_teacher()
    assert changed.fingerprint == base
    with torch.no_grad():
        changed.model.aggregator.global_blocks[2].mlp.fc2.bias[3] += 1e-3
    assert changed.fingerprint != base
    heads = tiny_teacher()
    with torch.no_grad():
        heads.model.depth_head.norm.bias += 1
    assert heads.fingerprint == base


def test_it_stays_out_of_modules_that_hold_it(teacher):
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.teacher = teacher

    holder = Holder()
    assert set(holder.state_dict()) == {"layer.weight", "layer.bias"}
    assert len(list(holder.parameters())) == 2
    assert copy.deepcopy(holder).teacher is teacher
    holder.train().requires_grad_(True)
    assert not teacher.model.training
    with pytest.raises(TypeError, match="'tiny' is not pickled"):
        pickle.dumps(teacher)
    with pytest.raises(TypeError, match="load_teacher"):
        torch.save({"teacher": holder.teacher}, io.BytesIO())


def test_to_returns_itself(teacher, images):
    assert teacher.to("cpu") is teacher
    assert teacher.device == torch.device("cpu")


def test_predict_gives_the_heads_output_and_zeros_for_absent_views(teacher, images):
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[0, 1] = False
    result = teacher.predict(Views.create(images, present=mask))
    assert set(result) == {"pose_enc", "depth", "depth_conf", "world_points", "world_points_conf"}
    assert result["depth"].shape == (3, 3, 28, 28, 1)
    assert result["pose_enc"].shape == (3, 3, 9)
    assert all((values[0, 1] == 0).all() for values in result.values())
    resized = resize(images.flatten(0, 1), 28, 14).unflatten(0, (3, 3))
    with torch.no_grad():  # as the teacher computes; these random weights blow rounding up
        expected = teacher.model(resized[1:])
    torch.testing.assert_close(result["world_points"][1:], expected["world_points"])
    bare = VGGTTeacher(tiny_model(heads=False), name="bare", licence="MIT")
    with pytest.raises(ConfigError, match=r"enable_camera=True"):
        bare.predict(Views.create(images))


def batch_sizes(teacher) -> list[int]:
    """Fills with the number of scenes of every forward pass."""
    sizes: list[int] = []
    teacher.model.aggregator.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    return sizes


def test_a_memory_budget_splits_the_batch_and_changes_nothing(teacher, images):
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1, 2] = False
    views = Views.create(images, present=mask)
    whole = teacher.features(views, (0, -1))
    one = teacher.model.aggregator.activation_bytes(3, 28, 28, 2)
    for memory, expected in [(1, [1, 1, 1]), (2 * one, [1, 2]), (2 * one - 1, [1, 1, 1])]:
        small = tiny_teacher(memory=memory)
        sizes = batch_sizes(small)
        for ours, theirs in zip(small.features(views, (0, -1)), whole, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert sorted(sizes) == expected
    with pytest.raises(ConfigError, match="memory is 0 bytes"):
        tiny_teacher(memory=0)


def test_the_estimate_bounds_what_a_forward_allocates():
    """Counted by the profiler, for sizes at which tensors dominate; also with every layer kept."""
    config = replace(CONFIG, img_size=280, embed_dim=64)
    aggregator = VGGT(config, heads=False).aggregator.eval().requires_grad_(False)
    images = torch.rand(1, 2, 3, 280, 280)
    for layers in [(-1,), (0, 1, 2)]:
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            aggregator(images, layers)
        held = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        assert 0.3 < peak / aggregator.activation_bytes(2, 280, 280, len(layers)) < 1


def test_without_gradients_a_forward_is_lean_and_equal(teacher, images, monkeypatch):
    pixels = resize(images.flatten(0, 1), 28, 14).unflatten(0, (3, 3))
    before = pixels.clone()
    expected = teacher.model.aggregator(pixels, (0, -1))
    monkeypatch.setattr("spatial_forcing.teachers.layers.MLP_ROWS", 4)
    with torch.no_grad():
        lean = teacher.model.aggregator(pixels, (0, -1))
    for ours, theirs in zip(lean, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert torch.equal(pixels, before)


def test_compiled_blocks_give_the_same_features(teacher, images):
    compiled = tiny_teacher(compile="aot_eager")
    assert compiled.fingerprint == teacher.fingerprint
    views = Views.create(images)
    torch.testing.assert_close(compiled.features(views)[0], teacher.features(views)[0])
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0


def test_padding_is_encoded_but_never_returned():
    """The released recipe's white letterbox: its features are those of the whole square, cut to the view."""
    wide = 0.25 + 0.5 * torch.rand(2, 2, 3, 20, 40)  # bicubic overshoot stays in [0, 1]
    padded = tiny_teacher(resolution=56, framing="pad")
    (features,) = padded.features(Views.create(wide))
    assert features.shape == (2, 2, 2, 4, 32)
    square = frame(wide.flatten(0, 1), torch.ones(4, 20, 40, dtype=torch.bool), 56, 14, "pad")
    assert not square.valid[:, :14].any()
    (whole,) = tiny_teacher(resolution=56).features(Views.create(square.images.unflatten(0, (2, 2))))
    # 28 of 56 rows are the view's: its first and last row of pixels lie between two patches each.
    top, bottom = (whole[:, :, row] for row in (0, 3))
    share = (1 + square.from_original[1, 2] - square.from_original[1, 1]) * 1.5
    expected = top * (1 - share) + whole[:, :, 1] * share
    torch.testing.assert_close(features[:, :, 0], expected, atol=1e-4, rtol=1e-4)
    assert (features[:, :, 1] - bottom).abs().max() > 1e-3
    assert padded.fingerprint != tiny_teacher(resolution=56).fingerprint
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(padded.features(Views.create(wide))[0], features)
    (fit,) = tiny_teacher(resolution=56).features(Views.create(wide))
    assert fit.shape == features.shape
    assert not torch.allclose(fit, features, atol=1e-2)
    with pytest.raises(ConfigError, match="framing is 'crop'"):
        tiny_teacher(framing="crop")


def test_one_patch_a_token_needs_no_interpolation(images):
    """At 14 px for each of the student's 16 tokens the target is the feature itself."""
    teacher = tiny_teacher(resolution=224)
    views = Views.create(images[:1, :2])
    (features,) = teacher.features(views)
    assert features.shape[2:4] == (16, 16)
    layout = layout_from_offset(1, 2, (16, 16), start=0)
    (target,) = make_targets([features], views, layout, valid=layout.valid, pe_scale=0.0)
    torch.testing.assert_close(target, features, atol=1e-5, rtol=1e-5)


def test_bf16_attention_on_a_cpu_is_attention(monkeypatch):
    q, k, v = torch.randn(3, 2, 3, 50, 16, generator=torch.Generator().manual_seed(0))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    monkeypatch.setattr("spatial_forcing.teachers.layers.QUERY_ROWS", 16)
    with torch.no_grad():
        assert torch.equal(attention(q, k, v), exact)
        rough = attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.02, rtol=0.05)


def test_random_weights_keep_the_architecture():
    real, random = load_teacher("vggt-nano"), load_teacher("random:vggt-nano")
    assert (random.dim, random.depth, random.resolution) == (real.dim, real.depth, real.resolution)
    assert random.fingerprint == load_teacher("random:vggt-nano").fingerprint != real.fingerprint
    assert random.name == "random:vggt-nano"
