"""Depth Anything 3 as a teacher: the contract, views, variants, memory, precision."""

from dataclasses import replace

import pytest
import torch

from spatial_forcing.alignment import Views
from spatial_forcing.errors import ConfigError
from spatial_forcing.protocols import Teacher
from spatial_forcing.teachers import load_teacher
from spatial_forcing.teachers.da3 import DA3, DA3Teacher, save_da3
from spatial_forcing.teachers.da3.preprocess import resize
from spatial_forcing.teachers.preprocess import IMAGENET_MEAN, IMAGENET_STD
from tests.teachers.da3.small import ANY_VIEW, ONE_VIEW, small


def make(config=ANY_VIEW, heads=True, seed=0, name="small", **options) -> DA3Teacher:
    return DA3Teacher(small(config, heads, seed), name=name, licence="Apache-2.0", **options)


@pytest.fixture
def teacher() -> DA3Teacher:
    return make()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 3, 20, 20, generator=torch.Generator().manual_seed(1))


def normal(images, resolution=70):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (resize(images.flatten(0, 1), resolution, 14).unflatten(0, images.shape[:2]) - mean) / std


def test_it_implements_the_contract(teacher, images):
    assert isinstance(teacher, Teacher)
    assert (teacher.dim, teacher.depth, teacher.patch, teacher.resolution) == (64, 6, 14, 70)
    (features,) = teacher.features(Views.create(images))
    assert features.shape == (3, 3, 5, 5, 64)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_features_are_the_backbones_patch_tokens_with_the_first_view_as_reference(teacher, images):
    with torch.no_grad():
        expected = teacher.model.backbone(normal(images), (0, 5), reference="first")
    for ours, tokens in zip(teacher.features(Views.create(images), (0, -1)), expected, strict=True):
        torch.testing.assert_close(ours.flatten(2, 3), tokens[:, :, 1:])


def test_halves_are_the_two_parts_of_a_feature(images):
    views = Views.create(images)
    (both,) = make().features(views)
    (local,), (across,) = make(half="local").features(views), make(half="global").features(views)
    assert make(half="global").dim == 32
    assert torch.equal(torch.cat([local, across], dim=-1), both)


def test_the_reference_view_changes_features_of_three_views_and_not_of_two(images):
    for count, changes in ((3, True), (2, False)):
        views = Views.create(images[:, :count])
        first, middle = (make(reference=kind).features(views)[0] for kind in ("first", "middle"))
        assert torch.equal(first, middle) is not changes


def test_views_alone_are_each_a_scene_of_its_own(images):
    (alone,) = make(views="alone").features(Views.create(images))
    (single,) = make().features(Views.create(images[:, 1:2]))
    torch.testing.assert_close(alone[:, 1:2], single)
    assert not torch.allclose(alone, make().features(Views.create(images))[0], atol=1e-3)


def test_a_single_view_model_refuses_several_views_at_once(images):
    teacher = make(ONE_VIEW, name="depth-anything/DA3METRIC-LARGE")
    assert teacher.dim == 32
    with pytest.raises(
        ConfigError, match=r"view0, view1, view2.*'depth-anything/DA3METRIC-LARGE\?views=alone'"
    ):
        teacher.features(Views.create(images))
    with pytest.raises(ConfigError, match="DA3-BASE"):
        teacher.predict(Views.create(images))
    (one,) = teacher.features(Views.create(images[:, :1]))
    (alone,) = make(ONE_VIEW, views="alone").features(Views.create(images))
    torch.testing.assert_close(alone[:, :1], one)
    with pytest.raises(ConfigError, match="no 'global' half"):
        make(ONE_VIEW, half="global")


@pytest.mark.parametrize("present", [[True, False, True], [False, True, True], [False, False, True]])
def test_absent_views_neither_influence_nor_appear(teacher, images, present):
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1] = torch.tensor(present)
    changed = images.clone()
    changed[~mask] = -1.0
    (first,) = teacher.features(Views.create(images, present=mask))
    (second,) = teacher.features(Views.create(changed, present=mask))
    assert torch.equal(first, second)
    assert (first[~mask] == 0).all()
    (alone,) = teacher.features(Views.create(images[1:2, mask[1]]))
    torch.testing.assert_close(first[1, mask[1]], alone[0])
    (full,) = teacher.features(Views.create(images))
    torch.testing.assert_close(first[[0, 2]], full[[0, 2]])


def test_blocks_after_the_asked_layer_do_not_run(teacher, images):
    calls = []
    for block in teacher.model.backbone.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    teacher.features(Views.create(images), (3,))
    assert len(calls) == 4


def test_a_memory_budget_splits_the_batch_and_changes_nothing(teacher, images):
    views = Views.create(images)
    whole = teacher.features(views, (0, -1))
    split, sizes = make(memory=1), []
    split.model.backbone.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    for ours, theirs in zip(split.features(views, (0, -1)), whole, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert sizes == [1, 1, 1]


def test_the_estimate_bounds_what_a_forward_allocates():
    config = replace(ANY_VIEW, embed_dim=128)
    backbone = DA3(config, heads=False).backbone.eval().requires_grad_(False)
    images = torch.rand(1, 2, 3, 280, 280)
    for layers in [(-1,), (1, 3, 5)]:
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            backbone(images, layers)
        held = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        assert 0.3 < peak / backbone.activation_bytes(2, 280, 280, len(layers)) < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_close_and_returns_float32(teacher, images, dtype):
    views = Views.create(images)
    (exact,), (rough,) = teacher.features(views), make(dtype=dtype).features(views)
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert torch.cosine_similarity(exact, rough, dim=-1).min() > 0.99


def test_compiled_blocks_give_the_same_features(teacher, images):
    views = Views.create(images)
    compiled = make(compile="aot_eager")
    torch.testing.assert_close(compiled.features(views)[0], teacher.features(views)[0])
    assert compiled.fingerprint == teacher.fingerprint


def test_views_that_are_not_square_keep_their_proportion_or_are_padded(images):
    wide = torch.rand(1, 2, 3, 30, 50, generator=torch.Generator().manual_seed(2))
    assert make().features(Views.create(wide))[0].shape == (1, 2, 3, 5, 64)
    padded = make(framing="pad")
    sizes = []
    padded.model.backbone.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[-2:]))
    assert padded.features(Views.create(wide))[0].shape == (1, 2, 3, 5, 64)
    assert sizes == [(70, 70)]
    with pytest.raises(ConfigError, match="resolution 500 is not a positive multiple"):
        make(resolution=500)


def test_the_fingerprint_follows_what_changes_features():
    base = make().fingerprint
    assert make(heads=False).fingerprint == base
    others = [
        make(seed=1), make(half="global"), make(reference="middle"), make(views="alone"),
        make(resolution=56), make(dtype=torch.bfloat16), make(framing="pad"),
    ]  # fmt: skip
    assert len({base, *(teacher.fingerprint for teacher in others)}) == 8


def test_predict_gives_depth_and_cameras_and_zeros_for_absent_views(teacher, images):
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[0, 1] = False
    found = teacher.predict(Views.create(images, present=mask))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "depth": (3, 3, 70, 70, 1), "depth_conf": (3, 3, 70, 70), "pose_enc": (3, 3, 9),
    }  # fmt: skip
    assert all((value[0, 1] == 0).all() for value in found.values())
    with torch.no_grad():
        whole = teacher.model(normal(images), reference="first")
    torch.testing.assert_close(found["depth"][1:, ..., 0], whole["depth"][1:])
    one = make(ONE_VIEW, views="alone").predict(Views.create(images))
    assert set(one) == {"depth", "sky"}
    with pytest.raises(ConfigError, match="heads=True"):
        make(heads=False).predict(Views.create(images))


def test_a_name_carries_its_settings(tmp_path):
    save_da3(small(), tmp_path / "da3", licence="MIT")
    name = f"{tmp_path / 'da3'}?half=global&reference=middle"
    teacher = load_teacher(name)
    assert (teacher.half, teacher.reference, teacher.views) == ("global", "middle", "together")
    assert (teacher.name, teacher.dim) == (name, 32)
    for settings, message in (
        ("halves=global", "no setting 'halves'; it has half, reference, views"),
        ("half=globl", "Did you mean 'global'"),
        ("half", r"write `name\?half=global"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_teacher(f"{tmp_path / 'da3'}?{settings}")
    with pytest.raises(ConfigError, match="'vggt-nano' has no setting 'half'; this kind of teacher has none"):
        load_teacher("vggt-nano?half=global")


def test_random_weights_of_a_published_model_need_no_download():
    teacher = load_teacher("random:depth-anything/DA3-SMALL?half=local", resolution=28)
    assert (teacher.name, teacher.dim, teacher.depth) == (
        "random:depth-anything/DA3-SMALL?half=local", 384, 12,
    )  # fmt: skip
    assert teacher.features(Views.create(torch.rand(1, 2, 3, 28, 28)))[0].shape == (1, 2, 2, 2, 384)
