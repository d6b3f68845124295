"""Parity of the pi0 student with openpi and openpi-SF: values, gradients, samples, alignment."""

from __future__ import annotations

from dataclasses import replace
from operator import eq

import pytest
import torch

from spatial_forcing.alignment import IMAGE_PREFIX, Views
from spatial_forcing.errors import CheckpointError
from spatial_forcing.forcing import ForcingConfig, SpatialForcing
from spatial_forcing.forcing.layout import gather_tokens
from spatial_forcing.students.pi0.keys import PALIGEMMA, rename, to_openpi, to_transformers
from spatial_forcing.teachers.vggt import VGGT, VGGTConfig, VGGTTeacher
from tests.golden import golden
from tests.students.pi0_fixtures import CAMERAS, golden_batch, golden_student, time_in_float64

pytestmark = pytest.mark.golden


@pytest.fixture
def student(tmp_path):
    return golden_student(tmp_path)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def close_gradient(actual, expected, tolerance=5e-5):
    scale = expected.abs().max()
    assert scale > 0
    close(actual / scale, expected / scale, tolerance)


def openpi_gradients(network):
    return to_openpi({name: p.grad for name, p in network.named_parameters()})


@pytest.mark.parametrize("float64_time", [False, True])
def test_action_loss_and_samples(student, float64_time):
    """Stock transformers embeds the time in float32, which is all that separates it from the original."""
    tensors = golden("pi0_tiny").tensors
    if float64_time:
        time_in_float64(student.network)
    batch = golden_batch()
    error = student.flow_error(batch, tensors["in.actions"], tensors["in.noise"], tensors["in.time"])
    close(error, tensors["loss_none"], 2e-5 if float64_time else 5e-4)
    close(error.mean(), tensors["loss_mean"].squeeze(), 1e-5)
    for steps in (4, 10):
        close(student.sample(batch, tensors["in.noise"], steps), tensors[f"sampled_{steps}"], 2e-4)


def test_action_gradients(student):
    vectors = golden("pi0_tiny")
    tensors = vectors.tensors
    time_in_float64(student.network)
    error = student.flow_error(golden_batch(), tensors["in.actions"], tensors["in.noise"], tensors["in.time"])
    error.mean().backward()
    gradients = openpi_gradients(student.network)
    for name, expected in vectors.under("grad.").items():
        close_gradient(gradients[name], expected)


def test_hidden_states(student):
    """The tap reads the original's residual stream, and the original's unused weights are frozen here."""
    vectors = golden("pi0_tiny")
    tensors = vectors.tensors
    seen = {}
    for k, block in enumerate(student.blocks):
        block.input_layernorm.register_forward_pre_hook(lambda _, args, k=k: seen.update({k: args[0]}))
    student.flow_error(golden_batch(), tensors["in.actions"], tensors["in.noise"], tensors["in.time"])
    real = tensors["prefix_pad_masks"]
    for k, hidden in seen.items():
        close(hidden[real], tensors[f"hidden.prefix.{k}"][real], 1e-5)
    frozen = to_openpi({n: p for n, p in student.network.named_parameters() if not p.requires_grad})
    assert set(frozen) == {*vectors.config["none_grad"], *vectors.config["zero_grad"]}


def what_the_original_showed(case):
    """The original feeds absent views to its teacher; the parity test, and it alone, marks them present."""
    recorded = {
        **{c: (golden("pi0_tiny").tensors[f"in.image.{c}"] + 1) / 2 for c in CAMERAS},
        **golden("pi0_sf_align").under(f"{case}.img_wo_aug."),
    }
    return Views.create(torch.stack([recorded[camera] for camera in CAMERAS], 1), CAMERAS)


def recorded_teacher():
    vectors = golden("pi0_sf_align")
    heads = dict.fromkeys(("enable_camera", "enable_depth", "enable_point"), False)
    model = VGGT(VGGTConfig(**vectors.config["config"]["vggt"], **heads), heads=False)
    model.load_state_dict(vectors.under("vggt."))
    return VGGTTeacher(model, name="recorded", licence="none")


def case_batch(case):
    recorded = golden("pi0_sf_align").under("mixed.in.")
    batch = golden_batch()
    for camera in CAMERAS:
        if case == "mixed":
            batch[IMAGE_PREFIX + camera] = (recorded[f"image.{camera}"] + 1) / 2
            batch[f"valid.{camera}"] = recorded[f"padding_mask.{camera}"]
        elif camera == "right_wrist_0_rgb":
            batch[IMAGE_PREFIX + camera + "_is_pad"] = torch.ones(2, dtype=torch.bool)
    return batch


@pytest.mark.parametrize("case", ["mixed", "all_missing"])
def test_alignment(student, case):
    vectors = golden("pi0_sf_align")
    expected = vectors.under(f"{case}.")
    batch = case_batch(case)
    time_in_float64(student.network)
    layout = student.alignment(batch).layout
    assert torch.equal(layout.valid.flatten(1), expected["align_mask"])

    shown = replace(student.alignment(batch), views=what_the_original_showed(case))
    student.alignment = lambda batch: shown
    forcing = SpatialForcing(student, recorded_teacher(), ForcingConfig(pairs=((2, -1),)))
    forcing.projector.load_state_dict(vectors.under("proj."))
    tensors = golden("pi0_tiny").tensors
    seen = []
    student.blocks[2].input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    student.forward = lambda batch, alignment: (
        student.flow_error(batch, tensors["in.actions"], tensors["in.noise"], tensors["in.time"]).mean(),
        {},
    )
    loss, metrics = forcing(batch)
    result = vectors.config["results"][case]
    close(metrics["action_loss"], torch.tensor(result["action_loss"]), 2e-5)
    close(metrics["align_loss"], torch.tensor(result["align_loss"]), 2e-5)
    hidden = gather_tokens(seen[0].detach(), layout)
    mask = expected["align_mask"]
    close(hidden[mask], expected["vision_hidden"][mask], 2e-5)
    loss.backward()
    for name, parameter in forcing.projector.named_parameters():
        close_gradient(parameter.grad, expected[f"grad.proj.{name}"])
    gradients = openpi_gradients(student.network)
    compared = [name for name in expected if name.startswith("grad.paligemma_with_expert.")]
    assert compared
    for name in compared:
        close_gradient(gradients[name.removeprefix("grad.")], expected[name])


def test_absent_views_influence_neither_policy_nor_teacher(student):
    """Unlike in the original: their pixels change no loss at all."""
    losses = []
    for value in (0.2, 0.9):
        batch = case_batch("all_missing")
        batch[IMAGE_PREFIX + CAMERAS[2]] = torch.full((2, 3, 56, 56), value)
        torch.manual_seed(0)
        forcing = SpatialForcing(student, recorded_teacher(), ForcingConfig(pairs=((2, -1),)))
        losses.append(forcing(batch)[0])
    assert torch.equal(*losses)


KEYS = "pi0_state_dict_keys"
TIED = (PALIGEMMA + "lm_head.weight", PALIGEMMA + "model.language_model.embed_tokens.weight")


def test_key_map_of_the_real_checkpoint():
    found = golden(KEYS).config
    expected = found["transformers_native"]["map_from_openpi"]
    assert {name: rename(name) for name in found["openpi_pi0"]["keys"]} == expected
    native = set(found["transformers_native"]["keys"])
    shapes = {name: facts["shape"] for name, facts in found["openpi_pi0"]["keys"].items()}
    for prefix in ("", "model."):
        for dropped in ((), (TIED[0],), (TIED[1],)):
            stored = {prefix + name: shape for name, shape in shapes.items() if name not in dropped}
            renamed = to_transformers(stored, native, "file", eq)
            for name, shape in renamed.items():
                assert shape == found["transformers_native"]["keys"][name]["shape"]
    assert to_transformers(to_openpi(renamed), native, "file", eq) == renamed
    assert set(to_openpi(renamed)) == set(shapes) - {TIED[1]}


def test_keys_that_do_not_fit_are_named():
    found = golden(KEYS).config
    native = set(found["transformers_native"]["keys"])
    stored = dict.fromkeys(found["openpi_pi0"]["keys"], 0)
    del stored["action_out_proj.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing .*action_out_proj\.bias"):
        to_transformers(stored, native, "file", eq)
    for tied in TIED:
        del stored[tied]
    with pytest.raises(CheckpointError, match=r"2 missing .*embed_tokens"):
        to_transformers(stored, native, "file", eq)
    with pytest.raises(CheckpointError, match=r"pi0\.5.*pi05_sf"):
        to_transformers(dict.fromkeys(found["openpi_pi05"]["keys"], 0), native, "file", eq)
    with pytest.raises(CheckpointError, match=r"'lm\.weight'"):
        to_transformers({"lm.weight": 0}, native, "file", eq)
