"""Depth Anything 3 against vectors of the original code, at the tolerance that each file states."""

import re

import pytest
import torch
from torch import nn

from spatial_forcing.teachers.da3 import DA3, DA3Config, DA3HeadConfig
from spatial_forcing.teachers.da3.backbone import Backbone, reference_order, reordered, select_reference
from spatial_forcing.teachers.da3.camera import (
    CameraDecoder,
    CameraEncoder,
    decode_cameras,
    normalise_extrinsics,
)
from spatial_forcing.teachers.da3.heads import DualDPT, SkyDPT, without_sky
from tests.golden import golden

BACKBONES = ("da3_backbone_base_like", "da3_backbone_giant_like", "da3_backbone_mono_like")
TINY_HEAD = DA3HeadConfig((1, 2, 3, 3), features=16, out_channels=(8, 12, 16, 16))


def close(found, wanted, *, atol=2e-5, rtol=1e-5):
    torch.testing.assert_close(found, wanted, atol=atol, rtol=rtol, check_dtype=False)


def cases(name):
    return [(name, case) for case in golden(name).config["cases"]]


def tiny_config(vectors):
    c = vectors.config["config"]
    layers = (vectors.config["out_layers"] * 4)[:4]
    return DA3Config(
        embed_dim=c["embed_dim"], depth=c["depth"], num_heads=c["num_heads"], mlp_ratio=c["mlp_ratio"],
        swiglu=c["ffn_layer"] == "swiglufused", start=c["alt_start"] if c["alt_start"] > 0 else None,
        img_size=c["img_size"], head=DA3HeadConfig(tuple(layers), 16, (8, 12, 16, 16)),
    )  # fmt: skip


def backbone(vectors):
    model = Backbone(tiny_config(vectors))
    model.load_state_dict(vectors.under("w."))
    return model.eval()


@pytest.mark.golden
@pytest.mark.parametrize(("name", "case"), [pair for name in BACKBONES for pair in cases(name)])
def test_the_backbone_gives_the_originals_features(name, case):
    vectors = golden(name)
    model, layers = backbone(vectors), vectors.config["out_layers"]
    with torch.no_grad():
        for strategy in ("saddle_balanced", "first", "middle"):
            known = case if strategy == "saddle_balanced" else f"{case}@{strategy}"
            found = model(vectors.tensors[f"x.{case}"], layers, reference=strategy)
            for number, output in enumerate(found):
                if f"out.{known}.{number}" in vectors.tensors:
                    close(output[:, :, 1:], vectors.tensors[f"out.{known}.{number}"])
                    close(output[:, :, 0], vectors.tensors[f"cam.{known}.{number}"])


@pytest.mark.golden
@pytest.mark.parametrize(("name", "case"), [pair for name in BACKBONES for pair in cases(name)])
def test_every_block_gives_the_originals_state(name, case):
    vectors = golden(name)
    model, states = backbone(vectors), []
    hooks = [b.register_forward_hook(lambda _, __, out: states.append(out)) for b in model.blocks]
    with torch.no_grad():
        model(vectors.tensors[f"x.{case}"])
    for hook in hooks:
        hook.remove()
    known = [key for key in vectors.tensors if re.fullmatch(rf"block\.{case}\.\d+", key)]
    assert known
    for key in known:
        wanted = vectors.tensors[key]
        close(states[int(key.rsplit(".", 1)[1])].reshape(wanted.shape), wanted)


@pytest.mark.golden
@pytest.mark.parametrize(("name", "case"), [pair for name in BACKBONES for pair in cases(name)])
def test_gradients_and_no_gradients_agree(name, case):
    vectors = golden(name)
    with torch.enable_grad():
        found = backbone(vectors)(vectors.tensors[f"x.{case}"], vectors.config["out_layers"])
    close(found[-1][:, :, 1:], vectors.tensors[f"out.{case}.{len(found) - 1}"])


@pytest.mark.golden
@pytest.mark.parametrize("case", ["s2", "s3"])
def test_any_block_can_be_asked_for(case):
    vectors = golden("da3_backbone_base_like")
    known = {int(k.rsplit(".", 1)[1]): v for k, v in vectors.tensors.items() if k.startswith(f"aux.{case}.")}
    with torch.no_grad():
        found = backbone(vectors)(vectors.tensors[f"x.{case}"], sorted(known))
    for output, (block, wanted) in zip(found, sorted(known.items()), strict=True):
        half = output[:, :, 1:, output.shape[-1] // 2 :]
        if case == "s3" and block >= 3:  # the original leaves these in its own order of views
            half = reordered(half, reference_order(torch.tensor([2, 0]), 3))
        close(half, wanted)


@pytest.mark.golden
@pytest.mark.parametrize("block", [4, 5])
def test_queries_and_keys_turn_as_the_originals(block):
    vectors = golden("da3_backbone_base_like")
    model = backbone(vectors)
    for kind in ("q", "k"):
        plain, turned = (vectors.tensors[f"attn.s2_wide.{block}.{k}"] for k in (kind, f"{kind}_rot"))
        positions = vectors.tensors[f"attn.s2_wide.{block}.pos"][0]
        angles = model.rope.table(positions, plain.shape[-1])
        close(model.rope.rotate(plain.clone(), *angles), turned)


@pytest.mark.golden
def test_positions_are_scaled_as_the_originals():
    vectors = golden("da3_backbone_base_like")
    known = {key: value for key, value in vectors.tensors.items() if key.startswith("pos37.")}
    table = next(value for value in known.values() if value.shape[-2] == 1 + 37 * 37)
    model = Backbone(DA3Config(embed_dim=table.shape[-1], num_heads=1, img_size=518))
    model.pos_embed.data = table.view(1, *table.shape[-2:])
    checked = 0
    for key, wanted in known.items():
        if grid := re.search(r"(\d+)x(\d+)$", key):
            found = model.positions((int(grid[1]), int(grid[2])))
            close(found.view(wanted.shape), wanted, atol=5e-6, rtol=0)
            checked += 1
    assert checked > 2


@pytest.mark.golden
def test_norms_have_the_originals_eps():
    vectors = golden("da3_backbone_base_like")
    model = backbone(vectors)
    eps = vectors.config["norm_eps"]
    found = {
        "final": model.norm.eps, "block0_norm1": model.blocks[0].norm1.eps,
        "block4_q_norm": model.blocks[4].attn.q_norm.eps, "block4_k_norm": model.blocks[4].attn.k_norm.eps,
    }  # fmt: skip
    assert found == eps


@pytest.mark.golden
def test_the_reference_view_is_the_originals():
    vectors = golden("da3_reference_view")
    for case in vectors.config["cases"]:
        x = vectors.tensors[f"x.{case}"]
        for strategy in ("first", "middle", "saddle_balanced"):
            found = select_reference(x[:, :, 0], strategy)
            assert found.tolist() == vectors.tensors[f"idx.{case}.{strategy}"].tolist(), (case, strategy)
        order = reference_order(select_reference(x[:, :, 0], "saddle_balanced"), x.shape[1])
        if f"reordered.{case}" in vectors.tensors:
            assert torch.equal(reordered(x, order), vectors.tensors[f"reordered.{case}"])
        assert torch.equal(reordered(reordered(x, order), order.argsort(dim=1)), x)


def maps_of(module, hooked):
    """Outputs of submodules by name while `module` runs."""
    kept = {}
    for name, child in hooked.items():
        child.register_forward_hook(lambda _, __, out, name=name: kept.__setitem__(name, out))
    return kept


@pytest.mark.golden
@pytest.mark.parametrize(("name", "case"), cases("da3_head_dualdpt") + cases("da3_head_dpt"))
def test_dense_heads_give_the_originals_maps(name, case):
    vectors = golden(name)
    dual, facts = name == "da3_head_dualdpt", vectors.config["cases"][case]
    config = DA3Config(
        embed_dim=48, num_heads=3, depth=4, start=2 if dual else None, img_size=70, head=TINY_HEAD
    )
    head: nn.Module = DualDPT(config) if dual else SkyDPT(config)
    head.load_state_dict(vectors.under("head."))
    hooked = {f"stage.{k}": head.resize_layers[k] for k in range(4)}
    names = [f"refinenet{level}" for level in (1, 2, 3, 4)] + ["output_conv1"]
    hooked |= {n: getattr(head.scratch, n) for n in names}
    if dual:
        hooked |= {f"{n}_aux": getattr(head.scratch, f"{n}_aux") for n in names[:4]}
        hooked["output_conv1_aux3"] = head.scratch.output_conv1_aux[3]
    kept = maps_of(head, hooked)
    patches = [vectors.tensors[f"feat.{case}.{level}"].flatten(0, 1) for level in range(4)]
    with torch.no_grad():
        found = head(patches, (facts["H"], facts["W"]))
    for label, value in kept.items():
        close(value, vectors.tensors[f"h.{case}.{label}"], rtol=2e-5)
    for label, value in found.items():
        wanted = vectors.tensors[f"{label}.{case}"]
        close(value.view(wanted.shape), wanted, rtol=2e-5)
    if not dual:
        wanted = vectors.tensors[f"depth_after_sky.{case}"].flatten(0, 1)
        close(without_sky(found["depth"], found["sky"]), wanted, rtol=2e-5)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["dec_s1", "dec_s3"])
def test_cameras_are_decoded_as_the_originals(case):
    vectors = golden("da3_camera")
    decoder = CameraDecoder(vectors.config["config"]["cam_dec"]["dim_in"])
    decoder.load_state_dict(vectors.under("cam_dec."))
    facts = vectors.config["cases"][case]
    with torch.no_grad():
        encoding = decoder(vectors.tensors[f"feat.{case}"])
        extrinsics, intrinsics = decode_cameras(encoding, (facts["H"], facts["W"]))
    close(encoding, vectors.tensors[f"pose_enc.{case}"], atol=1e-5)
    close(extrinsics, vectors.tensors[f"extrinsics.{case}"], atol=1e-5)
    close(intrinsics, vectors.tensors[f"intrinsics.{case}"], atol=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["enc_s2", "enc_s6"])
def test_cameras_are_encoded_as_the_originals(case):
    vectors = golden("da3_camera")
    encoder = CameraEncoder(DA3Config(embed_dim=48, num_heads=3))
    encoder.load_state_dict(vectors.under("cam_enc."))
    facts = vectors.config["cases"][case]
    normalised = normalise_extrinsics(vectors.tensors[f"extrinsics_in.{case}"])
    close(normalised, vectors.tensors[f"normalised.{case}"], atol=1e-5)
    with torch.no_grad():
        found = encoder(normalised, vectors.tensors[f"intrinsics_in.{case}"], (facts["H"], facts["W"]))
    close(found, vectors.tensors[f"tokens.{case}"], atol=1e-5)


def whole_net():
    config = DA3Config(
        embed_dim=48, num_heads=3, img_size=70, head=DA3HeadConfig((5, 7, 9, 11), 16, (8, 12, 16, 16))
    )
    model = DA3(config)
    stored = golden("da3_net_hub").under("model.")
    inner = {key.replace("backbone.pretrained.", "backbone."): value for key, value in stored.items()}
    lost = model.load_state_dict(inner, strict=False)
    assert not lost.unexpected_keys
    assert all(".output_conv2_aux." in key and key.split(".")[-2] == "2" for key in lost.missing_keys)
    return model.eval()


@pytest.mark.golden
@pytest.mark.parametrize(("name", "case"), cases("da3_net"))
def test_the_whole_net_gives_the_originals_predictions(name, case):
    tensors = golden(name).tensors
    posed = f"extrinsics_in.{case}" in tensors
    given = {k: tensors[f"{k}_in.{case}"] for k in ("extrinsics", "intrinsics")} if posed else {}
    with torch.no_grad():
        found = whole_net()(tensors[f"x.{case}"], **given)
    checked = 0
    for label, value in found.items():
        if f"{label}.{case}" in tensors:
            close(value, tensors[f"{label}.{case}"], atol=5e-5, rtol=5e-5)
            checked += 1
    assert checked >= 4
