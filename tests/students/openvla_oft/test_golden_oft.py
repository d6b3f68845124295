"""Parity with the original OpenVLA-OFT: hidden states, losses, gradients, actions, units."""

from __future__ import annotations

import pytest
import torch

from spatial_forcing.forcing import ForcingConfig, SpatialForcing
from spatial_forcing.students.heads import masked_mean
from spatial_forcing.students.openvla_oft.heads import ActionTokens, regression_loss
from spatial_forcing.students.openvla_oft.sequence import EOS, TextTokens, assemble, gather
from spatial_forcing.students.openvla_oft.statistics import Bounds, set_from_published
from spatial_forcing.teachers.vggt import VGGT, VGGTConfig, VGGTTeacher
from tests.forcing.test_golden_alignment import RecordedStudent, original_images
from tests.golden import golden
from tests.students.openvla_oft.small import recorded

pytestmark = pytest.mark.golden
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def original():
    return recorded()


def close(ours, expected, name=""):
    torch.testing.assert_close(ours, expected, **CLOSE, msg=lambda text: f"{name}: {text}")


def text_of(vectors, rows):
    """The recorded tokens, cut where the longest row ends."""
    ids, keep = vectors.tensors["input_ids"][rows], vectors.tensors["attention_mask"][rows]
    actions = (vectors.tensors["labels"][rows] > 31743) & keep
    return TextTokens(ids, keep, actions)


def pixels_of(vectors, rows):
    return vectors.tensors["pixel_values"][rows].unflatten(1, (2, 6))


def run(student, vectors, rows):
    """Hidden states before each block and after the norm, and the L1 prediction."""
    text = text_of(vectors, rows)
    states = []
    hooks = [b.register_forward_pre_hook(lambda _, args: states.append(args[0])) for b in student.blocks]
    embedded = student.embed(pixels_of(vectors, rows), text, vectors.tensors["proprio"][rows])
    last = student.decode(embedded, text)
    for hook in hooks:
        hook.remove()
    read = gather(last, student._before(text))
    return text, [*states, last], read, student.predict(read)


CASES = {"padded": [0, 1], "nopad": [0]}


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_predictions(original, case):
    student, vectors, _ = original
    rows = CASES[case]
    text, states, read, predicted = run(student, vectors, rows)
    expected = vectors.under(f"{case}.")
    patches = student.visual(pixels_of(vectors, rows))
    close(patches, expected["projector_features"][:, :-1], "patches")
    valid = torch.cat([text.keep[:, :1], text.keep.new_ones(len(rows), 33), text.keep[:, 1:]], 1)
    for index, state in enumerate(states):
        close(state[valid], expected[f"hidden_states.{index}"][valid], f"hidden state {index}")
    close(read, expected["actions_hidden_states"])
    close(predicted, expected["predicted_actions"])
    rows_of_logits = vectors.tensors["w.lm_head_rows.ids"]
    assert len(rows_of_logits) >= 256


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(original, case):
    student, vectors, entries = original
    expected = vectors.under(f"{case}.")
    student.zero_grad()
    text, states, _, predicted = run(student, vectors, CASES[case])
    actions = vectors.tensors["actions"][CASES[case]]
    loss = masked_mean((predicted - actions).abs(), torch.zeros(actions.shape[:2], dtype=torch.bool))
    close(loss, expected["l1_loss"][0], "L1")
    ce = student._token_loss(states[-1], text, torch.zeros(actions.shape[:2], dtype=torch.bool))
    close(ce, expected["ce_loss"][0], "cross-entropy")
    loss.backward()
    own = dict(student.named_parameters())
    grads = {k.removeprefix("grad."): v for k, v in expected.items() if k.startswith("grad.")}
    assert len(grads) >= 7
    for key, gradient in grads.items():
        names = entries[key].ours if key in entries else (key,)
        ours = [own[name].grad for name in names]
        value = torch.cat(ours) if len(ours) > 1 else ours[0]
        scale = gradient.abs().max()
        torch.testing.assert_close(value / scale, gradient / scale, atol=2e-5, rtol=0, msg=key)


def test_vision_features(original):
    student, vectors, _ = original
    pixels = pixels_of(vectors, [0, 1])
    features = student.vision(pixels.flatten(0, 1)).unflatten(0, (2, 2)).flatten(1, 2)
    close(features, vectors.tensors["vision_features_pre_projector"])


@pytest.mark.parametrize("case", ["predict", "predict_no_29871"])
def test_actions(original, case):
    """From the prompt's ids on, as the original's `predict_action` (which appends the space token)."""
    student, vectors, _ = original
    sample = vectors.config["predict"][case]["sample"]
    expected = vectors.under(f"{case}.")
    prompt = expected["input_ids"][0].tolist()
    prompt = prompt if prompt[-1] == 29871 else [*prompt, 29871]
    text = assemble([prompt], torch.zeros(1, 56, dtype=torch.long))
    with torch.no_grad():
        embedded = student.embed(pixels_of(vectors, [sample]), text, vectors.tensors["proprio"][[sample]])
        read = gather(student.decode(embedded, text), student._before(text))
        values = student.predict(read)
        tokens = student.logits(read).argmax(-1)
    close(read, expected["actions_hidden_states"])
    close(values[0], expected["normalized_actions"])
    entry = vectors.config["norm_stats"]["libero_tiny"]
    set_from_published(student.action_bounds, entry, "action", "quantile", "recorded")
    close(student.unnormalize(values)[0], expected["actions_unnormalized"])
    discrete = student.tokens.decode(tokens).unflatten(1, (8, 7))
    torch.testing.assert_close(student.unnormalize(discrete)[0], expected["actions_discrete_unnormalized"])
    if "actions_env" in expected:
        close(student.to_environment(values)[0], expected["actions_env"])


def test_states_are_normalised_and_clipped(original):
    _, vectors, _ = original
    bounds = Bounds(8)
    entry = vectors.config["norm_stats"]["libero_tiny"]
    set_from_published(bounds, entry, "proprio", "quantile", "recorded")
    normalised = bounds.normalize(vectors.tensors["proprio_raw"])
    torch.testing.assert_close(normalised, vectors.tensors["proprio_normalized"])


def test_recorded_labels_are_the_actions_tokens(original):
    _, vectors, _ = original
    text = text_of(vectors, [0, 1])
    tokens = ActionTokens(32000)
    recorded_ids = text.ids[text.actions].view(2, 8, 7)
    decoded = tokens.decode(recorded_ids)
    assert torch.equal(tokens.encode(decoded), recorded_ids.clamp(min=32000 - 255))
    assert all(ids[keep][-1] == EOS for ids, keep in zip(text.ids, text.keep, strict=True))


class RecordedOFT(RecordedStudent):
    """Reads recorded last hidden states where our student would, with its loss and rounding."""

    def __init__(self, inputs, head, case, images, grid):
        super().__init__(inputs["hidden_states.1"], images, grid, start=case["vision_positions"][0])
        self.inputs, self.head = inputs, head
        self.visual = case["N"] * grid[0] * grid[1] + int(case["use_proprio"])

    def forward(self, batch, alignment=None):
        connected, _ = super().forward(batch)
        labels = self.inputs["labels"]
        text = TextTokens(self.inputs["input_ids"], torch.ones_like(labels, dtype=torch.bool), labels > 31743)
        read = gather(self.inputs["hidden_states.last"], text.positions + self.visual - 1)
        is_pad = torch.zeros(self.inputs["actions"].shape[:2], dtype=torch.bool)
        loss = regression_loss(self.head, read, self.inputs["actions"], is_pad, torch.bfloat16)
        return connected + loss, {}


@pytest.mark.parametrize("name", ["official", "nogain", "noproprio_n1", "n1_nope"])
def test_total_loss_of_run_forward_pass(name):
    vectors = golden("align_run_forward_pass")
    normalize = golden("align_preprocess_normed").config["normalize_params"][0]
    case = vectors.config["cases"][name]
    inputs = vectors.under(f"{case['shares_inputs_with'] or name}.")
    weight, bias = vectors.tensors["head.l.weight"], vectors.tensors["head.l.bias"]

    def head(hidden):
        return torch.nn.functional.linear(hidden.unflatten(1, (-1, 7)).flatten(2), weight, bias)

    no_heads = dict.fromkeys(("enable_camera", "enable_depth", "enable_point"), False)
    model = VGGT(VGGTConfig(**vectors.config["vggt"], **no_heads), heads=False)
    model.load_state_dict(vectors.under("vggt."))
    images = original_images(inputs["pixel_values"], case["N"], normalize)
    config = ForcingConfig(
        pairs=((1, -1),),
        norm="layer" if case["use_vlm_norm"] else "none",
        pe_scale=0.1 if case["use_vggt_pe"] else 0.0,
        token_shift=int(case["gain_feat_1move"]),
    )
    student = RecordedOFT(inputs, head, case, images, (16, 16))
    teacher = VGGTTeacher(model, name="recorded", licence="none")
    forcing = SpatialForcing(student, teacher, config, student_dim=student.hidden.shape[-1])
    weights = vectors.under(f"{name}.proj.")
    forcing.projector.load_state_dict(weights)
    loss, metrics = forcing({})
    torch.testing.assert_close(metrics["action_loss"], torch.tensor(case["action_l1"]), **CLOSE)
    torch.testing.assert_close(loss.detach(), torch.tensor(case["loss_total"]), atol=2e-5, rtol=1e-5)
