"""VGGT against the original code's numbers, and as a trainable network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.teachers.layers import resolve_layers
from spatial_forcing.teachers.vggt import VGGT, CameraHeadConfig, DinoV2Config, DPTConfig, VGGTConfig
from spatial_forcing.teachers.vggt.keys import from_published, key_map
from tests.golden import Golden, golden

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
TINY = VGGTConfig(
    img_size=28,
    patch_size=14,
    embed_dim=32,
    depth=4,
    num_heads=4,
    patch_embed="conv",
    camera=CameraHeadConfig(trunk_depth=1, num_heads=4),
    dpt=DPTConfig(features=8, out_channels=(8, 8, 8, 8), layers=(0, 1, 2, 3), hidden_channels=8),
)


def golden_model(vectors: Golden) -> VGGT:
    """The model of an aggregator vector, with its weights."""
    values = dict(vectors.config["config"])
    vit = values.pop("patch_embed_vit")
    values["patch_embed"] = "dinov2" if vit else "conv"
    if vit:
        values["dinov2"] = DinoV2Config(
            vit["depth"], vit["num_heads"], vit["mlp_ratio"], vit["num_register_tokens"]
        )
    config = VGGTConfig(**values, enable_camera=False, enable_depth=False, enable_point=False)
    model = VGGT(config).eval()
    weights = {f"aggregator.{key}": tensor for key, tensor in vectors.under("w.").items()}
    names = list(model.state_dict())
    assert set(key_map(names)) == set(weights)
    model.load_state_dict(from_published(weights, names))
    return model


@pytest.mark.golden
@pytest.mark.parametrize("name", ["vggt_aggregator_conv", "vggt_aggregator_dinov2"])
@torch.no_grad()
def test_every_aggregator_layer_equals_the_original(name):
    vectors = golden(name)
    aggregator = golden_model(vectors).aggregator
    assert aggregator.patch_start_idx == vectors.config["patch_start_idx"]
    for case, facts in vectors.config["cases"].items():
        outputs = aggregator(vectors.tensors[f"{case}.images"], range(facts["n_layers"]))
        assert len(outputs) == facts["n_layers"]
        for layer, output in enumerate(outputs):
            torch.testing.assert_close(output, vectors.tensors[f"{case}.out.{layer}"], **TOLERANCE)


@pytest.mark.golden
@torch.no_grad()
def test_dinov2_intermediates_equal_the_original():
    vectors = golden("vggt_aggregator_dinov2")
    embedder = golden_model(vectors).aggregator.patch_embed
    prenorm = []
    embedder.model.layernorm.register_forward_pre_hook(lambda module, args: prenorm.append(args[0]))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    patches = embedder((vectors.tensors["s1.images"][0] - mean) / std)
    torch.testing.assert_close(patches, vectors.tensors["s1.patch_tokens"], **TOLERANCE)
    torch.testing.assert_close(prenorm[0], vectors.tensors["s1.x_prenorm"], **TOLERANCE)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["sq", "nonsq"])
@torch.no_grad()
def test_heads_equal_the_original(case):
    vectors = golden("vggt_heads")
    facts = vectors.config["config"]
    camera, dpt = facts["camera_head"], facts["dpt"]
    config = VGGTConfig(
        **facts["aggregator"],
        camera=CameraHeadConfig(
            camera["trunk_depth"], camera["num_heads"], iterations=camera["num_iterations"]
        ),
        dpt=DPTConfig(
            dpt["features"],
            tuple(dpt["out_channels"]),
            tuple(dpt["intermediate_layer_idx"]),
            dpt["down_ratio"],
            dpt["pos_embed"],
        ),
    )
    model = VGGT(config).eval()
    model.load_state_dict(vectors.under("w."))
    images = vectors.tensors[f"{case}.images"]
    result = model(images)
    for name in ("depth", "depth_conf", "world_points", "world_points_conf"):
        torch.testing.assert_close(result[name], vectors.tensors[f"{case}.{name}"], **TOLERANCE)
    assert len(result["pose_enc_iterations"]) == camera["num_iterations"]
    for i, encoding in enumerate(result["pose_enc_iterations"]):
        torch.testing.assert_close(encoding, vectors.tensors[f"{case}.pose_enc.{i}"], **TOLERANCE)
    torch.testing.assert_close(result["pose_enc"], vectors.tensors[f"{case}.pose_enc.3"], **TOLERANCE)
    torch.testing.assert_close(model.aggregator(images)[0], vectors.tensors[f"{case}.agg_last"], **TOLERANCE)


def test_only_blocks_up_to_the_last_asked_layer_run():
    aggregator = VGGT(TINY).aggregator
    calls = []
    for kind in ("frame", "global"):
        for index, block in enumerate(getattr(aggregator, f"{kind}_blocks")):
            block.register_forward_hook(lambda *_, tag=(kind, index): calls.append(tag))
    outputs = aggregator(torch.rand(1, 2, 3, 28, 28), layers=(1, 0))
    assert calls == [("frame", 0), ("global", 0), ("frame", 1), ("global", 1)]
    everything = aggregator(torch.rand(1, 2, 3, 28, 28), layers=(-1, -1))
    assert len(outputs) == len(everything) == 2
    assert len(calls) == 4 + 8


def test_layers_come_in_the_asked_order():
    aggregator = VGGT(TINY).eval().aggregator
    images = torch.rand(1, 2, 3, 28, 28)
    first, last = aggregator(images, (0, 3))
    reverse_last, reverse_first = aggregator(images, (-1, -4))
    assert torch.equal(first, reverse_first)
    assert torch.equal(last, reverse_last)
    assert not torch.equal(first, last)


@pytest.mark.parametrize("layers", [(4,), (-5,), (0, 9), ()])
def test_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(ConfigError, match="layer"):
        resolve_layers(layers, 4)


@pytest.mark.parametrize("patch_embed", ["conv", "dinov2", "stem"])
def test_training_reaches_every_parameter(patch_embed):
    torch.manual_seed(0)
    size = {"patch_size": 8, "img_size": 32} if patch_embed == "stem" else {}
    config = replace(TINY, patch_embed=patch_embed, dinov2=DinoV2Config(depth=1, num_heads=4), **size)
    model = VGGT(config).train()
    result = model(torch.rand(2, 2, 3, config.img_size, config.img_size))
    loss = result["pose_enc_iterations"].square().mean() + sum(
        result[name].log1p().mean() for name in ("depth", "depth_conf", "world_points_conf")
    )
    (loss + result["world_points"].square().mean()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # The mask token is DINOv2's own pretraining; nothing else may stay behind.
    assert [n for n in silent if not n.endswith("mask_token")] == []


def test_a_stem_tells_places_apart_and_takes_other_sizes():
    torch.manual_seed(0)
    model = VGGT(replace(TINY, patch_embed="stem", patch_size=8, img_size=32)).eval()
    grey = torch.full((1, 3, 32, 32), 0.5)
    with torch.no_grad():
        patches = model.aggregator.patch_embed(grey)
        wide = model.aggregator.patch_embed(torch.full((1, 3, 32, 64), 0.5))
    assert patches.shape == (1, 16, TINY.embed_dim)
    assert len(patches[0].unique(dim=0)) == 16  # one patch looks like the other: only its place differs
    assert wide.shape == (1, 32, TINY.embed_dim)


def test_one_optimizer_step_lowers_the_loss():
    torch.manual_seed(0)
    model = VGGT(TINY).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images = torch.rand(2, 2, 3, 28, 28)
    losses = []
    for _ in range(6):
        result = model(images, heads=("depth", "camera"))
        loss = (result["depth"] - 3).square().mean() + (result["pose_enc_iterations"] - 0.5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_heads_are_optional_and_asked_for_by_name():
    images = torch.rand(1, 1, 3, 28, 28)
    model = VGGT(replace(TINY, enable_point=False))
    assert set(model(images, heads=("depth",))) == {"depth", "depth_conf"}
    assert set(model(images, heads=("camera",))) == {"pose_enc", "pose_enc_iterations"}
    assert model(images, heads=()) == {}
    with pytest.raises(ConfigError, match=r"enable_point=True"):
        model(images)
    with pytest.raises(ConfigError, match="no head 'tracks'"):
        model(images, heads=("tracks",))
    bare = VGGT(TINY, heads=False)
    assert {name.split(".")[0] for name in bare.state_dict()} == {"aggregator"}


def test_dense_maps_shrink_by_the_down_ratio():
    model = VGGT(replace(TINY, dpt=replace(TINY.dpt, down_ratio=2)))
    assert model(torch.rand(1, 2, 3, 28, 42), heads=("depth",))["depth"].shape == (1, 2, 14, 21, 1)


def test_images_must_be_whole_patches():
    with pytest.raises(DataError, match="30 x 28"):
        VGGT(TINY)(torch.rand(1, 1, 3, 30, 28))


def test_config_survives_json_and_reads_the_published_file():
    odd = replace(TINY, patch_embed="dinov2", dinov2=DinoV2Config(depth=1, num_heads=4))
    assert VGGTConfig.from_dict(odd.to_dict()) == odd
    assert VGGTConfig.from_dict({"img_size": 518, "patch_size": 14, "embed_dim": 1024}) == VGGTConfig()
    assert VGGTConfig.from_dict({"enable_track": True}) == VGGTConfig()
    with pytest.raises(ConfigError, match=r"'embed_dims'.*Did you mean 'embed_dim'"):
        VGGTConfig.from_dict({"embed_dims": 3})
    with pytest.raises(ConfigError, match="unknown key 'layer'"):
        VGGTConfig.from_dict({"dpt": {"layer": [1]}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": 30}, "multiple of patch_size"),
        ({"embed_dim": 36}, "4 x num_heads"),
        ({"depth": 2}, "dpt.layers"),
        ({"patch_embed": "vit"}, "conv, dinov2 or stem"),
        ({"patch_embed": "stem"}, "4 times a power of two"),
        ({"patch_embed": "dinov2", "dinov2": DinoV2Config(num_heads=5)}, "dinov2.num_heads"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)
