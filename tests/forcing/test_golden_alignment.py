"""Parity of target, projector, loss and masks with the released code, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spatial_forcing.alignment import Alignment, Views
from spatial_forcing.forcing import (
    ForcingConfig,
    Projector,
    SpatialForcing,
    layout_from_offset,
    tokens_valid,
)
from spatial_forcing.forcing.loss import alignment_loss
from spatial_forcing.forcing.target import make_targets, sincos_table, token_validity
from tests.golden import golden

pytestmark = pytest.mark.golden


def assert_gradient(ours, expected, name=""):
    """Within 2e-5 of the largest entry: gradients are small, an absolute tolerance would accept all."""
    scale = expected.abs().max().clamp(min=1e-12)
    torch.testing.assert_close(ours / scale, expected / scale, atol=2e-5, rtol=0, msg=name or None)


PE_SCALE = {"pe0": 0.0, "pe1": 0.1}


def pool(features, tokens, pe_scale):
    """Teacher patch tokens (B, V, H, W, C) -> targets (B, V * h * w, C) on grids of `tokens` = (h, w)."""
    B, V = features.shape[:2]
    views = Views.create(torch.rand(B, V, 3, 8, 8))
    layout = layout_from_offset(B, V, tokens, start=0)
    valid = token_validity(layout, views)
    assert bool(valid.all())
    (target,) = make_targets([features], views, layout, valid=valid, pe_scale=pe_scale)
    return target.flatten(1, 3)


@pytest.mark.parametrize("pe", PE_SCALE)
def test_pooling(pe):
    vectors = golden("align_pooling")
    for name, case in vectors.config["cases"].items():
        rows, columns = case["patch_hw"]
        ratio = (case["reference_tokens"] / (case["N"] * rows * columns)) ** 0.5
        hidden = vectors.tensors[f"{name}.hidden"].unflatten(2, (rows, columns))
        target = pool(hidden, (round(rows * ratio), round(columns * ratio)), PE_SCALE[pe])
        torch.testing.assert_close(target, vectors.tensors[f"{name}.out.{pe}"], atol=2e-5, rtol=0, msg=name)


def test_positional_embedding_tables():
    vectors = golden("align_pooling")
    tables = {k: v for k, v in vectors.tensors.items() if k.startswith("pos_embed_")}
    assert tables
    for name, table in tables.items():
        dim, rows, columns = table.shape[1:]
        ours = sincos_table(rows, columns, dim, torch.device("cpu")).permute(2, 0, 1)
        # Stored as it is added.
        torch.testing.assert_close(PE_SCALE["pe1"] * ours, table[0], atol=1e-6, rtol=0, msg=name)


def loaded_projector(weights):
    dim_out, dim_in = weights["fc1.weight"].shape
    projector = Projector(dim_in, dim_out, "layer" if "vlm_norm.weight" in weights else "none")
    projector.load_state_dict(weights)
    return projector


def check_projector(vectors, prefix, mask=None):
    tensors = vectors.under(prefix)
    projector = loaded_projector({k.removeprefix("w."): v for k, v in tensors.items() if k.startswith("w.")})
    hidden = tensors["vision_hidden"].clone().requires_grad_()
    valid = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else tensors[mask]
    projected = projector(hidden, valid)
    loss = alignment_loss(projected, tensors["vggt_hidden"], valid)
    loss.backward()
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(loss.detach(), tensors["loss"].squeeze(), **close)
    assert_gradient(hidden.grad, tensors["grad.vision_hidden"])
    for name, parameter in projector.named_parameters():
        assert_gradient(parameter.grad, tensors[f"grad.{name}"], name)
    if "projected" in tensors:
        torch.testing.assert_close(projected.detach(), tensors["projected"], **close)


@pytest.mark.parametrize("name", ["align_projector_norm0", "align_projector_norm1"])
def test_projector(name):
    check_projector(golden(name), "")


@pytest.mark.parametrize("name", ["align_projector_norm0", "align_projector_norm1"])
def test_projector_computes_in_float32_under_autocast(name):
    vectors = golden(name)
    projector = loaded_projector(vectors.under("w."))
    hidden = vectors.tensors["vision_hidden"]
    valid = torch.ones(hidden.shape[:2], dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        projected = projector(hidden, valid)
        loss = alignment_loss(projected, vectors.tensors["vggt_hidden"], valid)
    assert projected.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), vectors.tensors["loss"].squeeze(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["projector_norm0", "projector_norm1"])
def test_masked_projector(name):
    check_projector(golden("openpi_extras"), f"{name}.", mask="mask")


def test_token_mask_from_pixels():
    vectors = golden("pi0_sf_align")
    padding = vectors.under("mixed.in.padding_mask.")
    cameras = ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"]
    pixels = torch.stack([padding[c] for c in cameras], dim=1)
    expected = vectors.tensors["mixed.align_mask"]
    side = round((expected.shape[1] / len(cameras)) ** 0.5)
    expected = expected.unflatten(1, (len(cameras), side, side))
    present = expected.flatten(2).any(2)
    assert bool((pixels != pixels[..., :1, :1]).any()), "the vector letterboxes one view"
    assert torch.equal(tokens_valid(pixels, (side, side)) & present[..., None, None], expected)
    # The same rule, as SpatialForcing applies it to the views at the identity map.
    views = Views.create(torch.rand(*pixels.shape[:2], 3, *pixels.shape[2:]), present=present, valid=pixels)
    layout = layout_from_offset(len(pixels), len(cameras), (side, side), start=0)
    assert torch.equal(token_validity(layout, views), expected)


class RecordedStudent(nn.Module):
    """Two blocks that pass on recorded hidden states, so that the tap reads what the original read."""

    def __init__(self, hidden, images, grid, start):
        super().__init__()
        self.hidden = nn.Parameter(hidden)
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.images, self.grid, self.start = images, grid, start
        self.final_norm = None

    @property
    def blocks(self):
        return list(self.layers)

    def alignment(self, batch):
        layout = layout_from_offset(len(self.images), self.images.shape[1], self.grid, start=self.start)
        return Alignment(layout, Views.create(self.images))

    def forward(self, batch, alignment=None):
        hidden = self.hidden
        for block in self.layers:
            hidden = block(hidden)
        return 0 * hidden.sum(), {}


def original_images(pixel_values, views, normalize):
    """Undo the first normalisation of (B, views * 6, H, W)."""
    mean, std = (torch.tensor(normalize[k]).view(3, 1, 1) for k in ("mean", "std"))
    return pixel_values.unflatten(1, (views, 6))[:, :, :3] * std + mean


CASES = ["official", "nogain", "noproprio_n1", "n1_nope"]


def test_every_recorded_case_is_tested():
    assert sorted(CASES) == sorted(golden("align_run_forward_pass").config["cases"])


@pytest.mark.parametrize("name", CASES)
def test_run_forward_pass(name):
    from spatial_forcing.teachers.vggt import VGGT, VGGTConfig, VGGTTeacher

    vectors = golden("align_run_forward_pass")
    normalize = golden("align_preprocess_normed").config["normalize_params"][0]
    case = vectors.config["cases"][name]
    inputs = vectors.under(f"{case['shares_inputs_with'] or name}.")
    no_heads = dict.fromkeys(("enable_camera", "enable_depth", "enable_point"), False)
    model = VGGT(VGGTConfig(**vectors.config["vggt"], **no_heads), heads=False)
    model.load_state_dict(vectors.under("vggt."))
    side = round(vectors.config["dims"]["patches_per_image"] ** 0.5)
    student = RecordedStudent(
        inputs["hidden_states.1"],
        original_images(inputs["pixel_values"], case["N"], normalize),
        (side, side),
        start=case["vision_positions"][0],
    )
    config = ForcingConfig(
        pairs=((1, -1),),
        norm="layer" if case["use_vlm_norm"] else "none",
        pe_scale=0.1 if case["use_vggt_pe"] else 0.0,
        token_shift=int(case["gain_feat_1move"]),
    )
    teacher = VGGTTeacher(model, name="recorded", licence="none")
    forcing = SpatialForcing(student, teacher, config, student_dim=student.hidden.shape[-1])
    expected = vectors.under(f"{name}.")
    forcing.projector.load_state_dict({k[5:]: v for k, v in expected.items() if k.startswith("proj.")})
    loss, metrics = forcing({})
    loss.backward()
    close = {"atol": 2e-5, "rtol": 1e-5}
    torch.testing.assert_close(metrics["align_loss"], torch.tensor(case["align_loss"]), **close)
    assert_gradient(student.hidden.grad, expected["grad.hidden_states.1"])
    for key, parameter in forcing.projector.named_parameters():
        assert_gradient(parameter.grad, expected[f"grad.proj.{key}"], key)
    (features,) = teacher.features(student.alignment({}).views, (-1,))
    target = pool(features, (side, side), config.pe_scale)
    torch.testing.assert_close(target, expected["vggt_pooled"], **close)
