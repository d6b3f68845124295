"""The six checks on a small VLA: what is found, and that each fault is told by name."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from spatial_forcing import TokenLayout, Views, as_student, layout_from_offset
from spatial_forcing.doctor import DoctorOptions, Subject, examine
from spatial_forcing.doctor.cost import kept_bytes
from spatial_forcing.doctor.examine import STEPS
from spatial_forcing.doctor.grid import find_grid
from spatial_forcing.errors import LayoutError
from spatial_forcing.students import NanoConfig, NanoVLA, Pi0
from tests.doctor.toys import tower, toy, toy_batch
from tests.fakes import CAMERAS, FakeStudent, FakeTeacher, fake_batch
from tests.students.pi0_fixtures import small_config

QUICK = DoctorOptions(teacher_dim=16)


def inspect(subject, **options):
    return examine(subject, replace(QUICK, **options))


def failed(report):
    """(step, remedy) of the check that failed; the later ones may be skipped."""
    wrong = [check for check in report.checks if check.state == "FAIL"]
    assert len(wrong) == 1
    assert not report.ok
    assert not report.verified
    return wrong[0].name, wrong[0].remedy


def built(report, subject):
    """The printed lines, run in a fresh namespace."""
    namespace = {"model": subject.bare, "teacher": FakeTeacher()}
    exec(report.adapter, namespace)
    return namespace["forcing"]


LAYOUTS = {
    "offset": ({}, 'layout_from_offset(len(batch["pixel_values"]), 2, (4, 4), start=1)'),
    "one view": ({"views": 1}, "1, (4, 4), start=1)"),
    "wide": ({"grid": (2, 8)}, "2, (2, 8), start=1)"),
    "tall": ({"grid": (6, 3)}, "2, (6, 3), start=1)"),
    "row ends": ({"breaks": 1}, "torch.tensor([[1, 21], [5, 5], [1, 1]])"),
    "column-major": ({"column_major": True}, "torch.tensor([[1, 17], [1, 1], [4, 4]])"),
}


@pytest.mark.parametrize(("settings", "expected"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_are_found_and_the_printed_adapter_trains(settings, expected):
    subject = toy(**settings)
    report = inspect(subject)
    assert report.ok, report.text()
    assert report.verified
    assert expected in report.adapter
    forcing = built(report, subject)
    optimizer = torch.optim.AdamW(forcing.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss, metrics = forcing(subject.batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(metrics["align_loss"]))
    assert subject.model.embed.weight.grad.abs().max() > 0
    assert losses[-1] < 0.8 * losses[0]
    assert forcing.export() is subject.model


SEQUENCES = {
    "rows": "lambda calls: calls[0].unflatten(0, (-1, 2)).flatten(1, 2)",
    "views": "lambda calls: calls[0].unflatten(0, (2, -1)).transpose(0, 1).flatten(1, 2)",
    "calls": "lambda calls: torch.cat(calls, 1)",
    "maps": "lambda calls: calls[0].flatten(2).transpose(1, 2).unflatten(0, (-1, 2)).flatten(1, 2)",
    "first": "lambda calls: calls[0].transpose(0, 1)",
}


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("samples", [2, 3])
def test_an_encoder_that_holds_the_tokens_is_proposed(kind, samples):
    """The decoder reads the images by cross-attention; what is aligned is the vision tower."""
    subject = tower(kind, samples=samples)
    report = inspect(subject)
    assert report.ok, report.text()
    assert report.facts["blocks"] == "tower"
    assert report.facts["positions"] == torch.arange(32).view(2, 4, 4).tolist()
    assert f"sequence={SEQUENCES[kind]}" in report.adapter
    forcing = built(report, subject)
    optimizer = torch.optim.AdamW(forcing.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss, metrics = forcing(subject.batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(metrics["align_loss"]))
    assert losses[-1] < 0.8 * losses[0]
    again = inspect(Subject(forcing.student, subject.batch))
    assert again.ok, again.text()
    assert "# Your own: sequence, views" in again.adapter


@pytest.mark.parametrize("kind", SEQUENCES)
def test_a_token_of_an_encoder_is_compared_with_the_target_of_its_patch(kind):
    """What the projector gets is the tower's own state, view by view and row by row."""
    subject = tower(kind)
    forcing = built(inspect(subject, layer=0), subject)
    seen = []
    forcing.projector.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    forcing(subject.batch)
    maps = subject.model.embed(subject.batch["pixel_values"].flatten(0, 1))
    expected = maps.flatten(2).transpose(1, 2).unflatten(0, (2, 2)).flatten(1, 2)
    torch.testing.assert_close(seen[0], expected)


def test_positions_are_those_of_the_model():
    """Row 1, column 2 of view 1 lies behind a word, a view of 4 x 5 and a row of 5."""
    report = inspect(toy(breaks=1))
    assert report.facts["positions"][1][1][2] == 1 + 20 + 5 + 2


def test_settings_are_used():
    report = inspect(toy(), layer=1, grid=(4, 4), image_key=("pixel_values",), blocks="layers")
    assert report.ok
    assert report.facts["layer"] == 1
    assert "ForcingConfig(pairs=((1, -1),))" in report.adapter
    assert inspect(toy(), layer=-2).facts["layer"] == 3


def test_the_cost_adds_up():
    subject = toy()
    cost = inspect(subject).facts["cost"]
    width, dim, tokens = 16, 16, 2 * 2 * 16
    assert cost["projector"] == width * dim + dim + dim * dim + dim + 2 * width
    assert cost["projector_weights"] == 4 * 4 * cost["projector"]
    assert cost["parameters"] == sum(p.numel() for p in subject.model.parameters())
    assert cost["weights"] == 4 * 4 * cost["parameters"]
    assert cost["tokens"] == tokens
    assert cost["projector_flops"] == 2 * tokens * (width * dim + dim * dim)
    assert cost["flops"] > 0
    assert 4 * tokens * dim < cost["projector_activations"] < 4 * 20 * tokens * dim


def test_weights_are_not_taken_for_activations():
    """Two products with 4 MB of weights: trained they keep their inputs, frozen ones keep nothing."""
    layer, x = torch.nn.Linear(1000, 1000, bias=False), torch.ones(1, 1000, requires_grad=True)
    assert kept_bytes(layer, lambda: layer(layer(x)).sum()) == 2 * 4000
    layer.requires_grad_(False)
    assert kept_bytes(layer, lambda: layer(layer(x)).sum()) == 0


def test_the_model_is_left_as_it_was():
    subject = toy()
    subject.model.embed.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    batch = {name: value.clone() for name, value in subject.batch.items()}
    state = torch.get_rng_state()
    assert inspect(subject).ok
    assert torch.equal(torch.get_rng_state(), state)
    assert [n for n, p in subject.model.named_parameters() if not p.requires_grad] == ["embed.weight"]
    assert all(p.grad is None for p in subject.model.parameters())
    assert all(torch.equal(v, before[n]) for n, v in subject.model.state_dict().items())
    assert all(torch.equal(v, batch[n]) for n, v in subject.batch.items())
    assert not any(m._forward_pre_hooks for m in subject.model.modules())
    assert subject.model.layers.training


# ---- claims


def claimed(index):
    """A claim about two views of 4 x 4 tokens behind one word: (V, h, w) positions -> layout function."""
    return lambda batch: TokenLayout(index.expand(2, *index.shape), (index >= 0).expand(2, *index.shape))


RIGHT = layout_from_offset(1, 2, (4, 4), start=1).index[0]
CLAIMS = {
    "shifted": (RIGHT + 1, "28 of 28 painted patches", "1 too late: add -1"),
    "early": (RIGHT - 1, "28 of 28", "1 too early: add \\+1"),
    "transposed": (RIGHT.transpose(1, 2), "painted patches", "Rows and columns are swapped"),
    "views swapped": (RIGHT.flip(0), "28 of 28", "view 0 lies where view 1 is claimed"),
    "other grid": (RIGHT.view(2, 2, 8), "painted patches", "claimed as 2 x 8 tokens, but has 4 x 4"),
    "stride": (
        RIGHT + torch.tensor([0, 1])[:, None, None],
        "14 of 28",
        r"between the views \(view 0: \+0, view 1: -1\)",
    ),
    "too far": (RIGHT + 5, "position 37", "has 37"),
    "one view": (RIGHT[:1], "1 views", "holds 2"),
}


@pytest.mark.parametrize(("index", "said", "remedy"), CLAIMS.values(), ids=CLAIMS)
@pytest.mark.parametrize("as_a", ["subject", "student"])
def test_wrong_claims_are_caught_and_named(index, said, remedy, as_a):
    subject = toy()

    def views(batch):
        return Views.create(batch["pixel_values"][:, : len(index)])

    if as_a == "student":
        model = as_student(subject.model, blocks=subject.model.layers, layout=claimed(index), views=views)
        subject = Subject(model, subject.batch)
    else:
        subject = replace(subject, layout=claimed(index), views=views)
    report = inspect(subject)
    name, text = failed(report)
    assert name == "token grid"
    assert said in text
    assert re.search(remedy, text), text


def test_a_refuted_claim_is_replaced_by_what_was_found():
    report = inspect(replace(toy(), layout=claimed(RIGHT + 1)))
    failed(report)
    assert "start=1)" in report.adapter
    assert [check.state for check in report.checks] == ["pass", "pass", "FAIL", "pass", "pass", "pass"]


@pytest.mark.parametrize("views", [None, lambda batch: Views.create(batch["pixel_values"])])
def test_a_right_claim_passes_and_is_used(views):
    layout = claimed(RIGHT)
    report = inspect(replace(toy(), layout=layout, views=views))
    assert report.ok, report.text()
    assert "# Your own: layout" in report.adapter
    assert "layout=layout" in report.adapter


def test_a_claim_that_fails_is_named():
    name, text = failed(inspect(replace(toy(), layout=lambda batch: batch["tokens"])))
    assert name == "token grid"
    assert "layout or views failed on the batch: KeyError: 'tokens'" in text


def test_a_claim_that_holds_for_the_first_sample_only_is_caught():
    index = torch.stack([RIGHT, RIGHT + 1])
    subject = replace(toy(), layout=lambda batch: TokenLayout(index, index >= 0))
    assert "14 of 28" in failed(inspect(subject))[1]


def test_an_adapter_can_be_checked_again():
    subject = toy()
    forcing = built(inspect(subject), subject)
    report = inspect(Subject(forcing.student, subject.batch))
    assert report.ok, report.text()


STUDENTS = {
    "fake": FakeStudent,
    "nano": lambda: NanoVLA(
        NanoConfig(CAMERAS, chunk=2, action_dim=3, state_dim=4, width=32, depth=2, heads=2)
    ),
    "pi0": lambda: Pi0(small_config()),
}


@pytest.mark.parametrize("make", STUDENTS.values(), ids=STUDENTS)
def test_students_of_the_package_pass(make):
    torch.manual_seed(0)
    report = inspect(Subject(make(), fake_batch(2)))
    assert report.ok, report.text()
    assert "as_student" not in report.adapter
    assert len(report.facts["positions"]) == 2  # found without the claim, too


def test_a_student_with_a_wrong_layout_fails():
    class Late(FakeStudent):
        def layout(self, batch):
            layout = super().layout(batch)
            return TokenLayout(layout.index + 1, layout.valid)

    torch.manual_seed(0)
    name, text = failed(report := inspect(Subject(Late(), fake_batch(2))))
    assert name == "token grid"
    assert "1 too late" in text
    assert report.adapter == ""


def test_a_cropped_framing_is_followed():
    """Half of the image becomes the token image; the map says so."""
    subject = toy()
    model = subject.model
    affine = torch.tensor([[0.5, 0.0, -0.5], [0.0, 1.0, 0.0]]).expand(2, 2, 2, 3)

    def loss(model, batch):
        return model(**{**batch, "pixel_values": batch["pixel_values"][..., :16]}).loss

    def views(batch):
        return Views.create(batch["pixel_values"], student_to_view=affine)

    given = Subject(model, toy_batch(), loss=loss, layout=claimed(RIGHT), views=views)
    assert inspect(given).ok
    report = inspect(replace(given, views=lambda batch: Views.create(batch["pixel_values"])))
    assert failed(report)[0] == "token grid"


def test_images_that_enter_as_patches():
    """The batch is a function of the images; the views are given."""
    subject = toy()
    pixels = subject.batch["pixel_values"]

    def batch(images):
        cut = images.unfold(3, 8, 8).unfold(4, 8, 8).mean((-1, -2))
        others = {k: v for k, v in subject.batch.items() if k != "pixel_values"}
        return {**others, "patches": cut * 2 - 1, "shown": images}

    def loss(model, batch):
        images = batch["patches"] * 0.5 + 0.5
        return model(images, batch["input_ids"], batch["action"]).loss

    given = Subject(
        subject.model, batch, loss=loss, pixels=pixels, views=lambda batch: Views.create(batch["shown"])
    )
    report = inspect(given)
    assert report.ok, report.text()
    assert report.facts["positions"] == RIGHT.tolist()
    assert "views" in failed(inspect(replace(given, views=None)))[1]
    constant = failed(inspect(replace(given, views=lambda _: Views.create(pixels))))
    assert constant[0] == "token grid"
    assert "image 0 of sample 0" in constant[1]


# ---- faults

FAULTS = {
    "cross-attention": ({"crossed": True}, "decoder blocks", "do not enter the sequence"),
    "no list": ({"listed": False}, "decoder blocks", "no list of blocks"),
    "resampler": ({"resampled": True}, "token grid", "see the whole image"),
    "noise": ({"noisy": torch.Generator()}, "token grid", "differs between two runs"),
    "head reads earlier": ({"reads": 1}, "gradient path", "does not depend on the aligned tokens"),
    "graph cut": ({"cut_before": 3}, "decoder blocks", "graph is cut on the way"),
}


@pytest.mark.parametrize(("settings", "step", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named(settings, step, message):
    name, text = failed(inspect(toy(**settings)))
    assert name == step
    assert re.search(message, text), text


def test_frozen_below_the_tap_names_what_is_frozen():
    subject = toy()
    subject.model.requires_grad_(False)
    subject.model.head.requires_grad_(True)
    subject.model.layers[3].requires_grad_(True)
    name, text = failed(inspect(subject))
    assert name == "gradient path"
    assert "nothing below the tap after 3 blocks is trainable" in text
    assert "layers.0" in text


def test_a_frozen_decoder_under_a_trainable_connector_passes():
    subject = toy()
    subject.model.layers.requires_grad_(False)
    report = inspect(subject)
    assert report.ok, report.text()
    assert list(report.facts["reached"]) == ["before the blocks"]


OPTIONS = {
    "blocks": ({"blocks": "layer"}, "decoder blocks", "Did you mean 'layers'"),
    "not blocks": ({"blocks": "head"}, "decoder blocks", "name the nn.ModuleList"),
    "key": ({"image_key": ("pixel_value",)}, "images", "Did you mean 'pixel_values'"),
    "no image": ({"image_key": ("input_ids",)}, "images", "images are"),
    "layer": ({"layer": 9}, "decoder blocks", "student layer 9 does not exist"),
    "grid": ({"grid": (2, 8)}, "token grid", "tried 2 x 8"),
}


@pytest.mark.parametrize(("options", "step", "message"), OPTIONS.values(), ids=OPTIONS)
def test_wrong_options_are_named(options, step, message):
    name, text = failed(inspect(toy(), **options))
    assert name == step
    assert message in text


def test_after_the_last_block_the_actions_need_not_read_the_aligned_tokens():
    report = inspect(toy(), layer=4)
    assert report.ok, report.text()
    assert "no longer read the aligned tokens" in report.text()


@pytest.mark.parametrize("path", ["layers", "model.layers"])
def test_blocks_are_named_as_in_the_model_or_as_printed(path):
    assert "blocks=model.layers" in inspect(toy(), blocks=path).adapter


def test_a_batch_that_the_model_does_not_take_is_named():
    batch = {key: value for key, value in toy_batch().items() if key != "action"}
    name, text = failed(inspect(replace(toy(), batch=batch)))
    assert name == "decoder blocks"
    assert "failed on the batch: TypeError" in text
    assert "'action'" in text


def test_masked_tokens_are_not_painted_and_others_take_their_place():
    """Absent views and letterbox bars: what is valid is painted, and nothing valid is an error."""
    valid = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    valid[:, 0, 1:3] = True
    index = RIGHT.expand(2, *RIGHT.shape)
    subject = replace(toy(), layout=lambda batch: TokenLayout(index, valid))
    report = inspect(subject)
    assert report.ok, report.text()
    assert "the layout as given holds for 10 painted patches" in report.text()
    nothing = replace(subject, layout=lambda batch: TokenLayout(index, torch.zeros_like(valid)))
    assert "no token of the layout is valid" in failed(inspect(nothing))[1]


def test_what_depends_on_a_failed_step_is_skipped():
    states = [check.state for check in inspect(toy(listed=False)).checks]
    assert states == ["pass", "FAIL"] + ["skipped"] * (len(STEPS) - 2)


def test_a_view_without_positions_of_its_own_is_refused_in_words():
    """Each position belongs to the view that changes it most; one may be left with none."""
    pictures = SimpleNamespace(size=lambda view: (32, 32))
    with pytest.raises(LayoutError, match=r"view 1 changes 0 positions \(none\)"):
        find_grid(None, pictures, 1, torch.tensor([], dtype=torch.long), None)


# ---- what views show, folded views, losses, and reports that are not lost


def merged(images, order):
    """Patches of 8 px, 2 x 2 of them a token, cut in this order: (B, V, tokens, 4, 3, 8, 8)."""
    cut = images.unfold(3, 16, 16).unfold(4, 16, 16)  # B, V, 3, h, w, 16, 16
    parts = cut.unflatten(-1, (2, 8)).unflatten(-3, (2, 8))  # ..., h, w, 2, 8, 2, 8
    patches = parts.permute(0, 1, 3, 4, 5, 7, 2, 6, 8).flatten(4, 5).flatten(2, 3)
    return patches[:, :, :, order]


def unmerged(patches, order):
    back = patches[:, :, :, torch.tensor(order).argsort()]
    h = int(patches.shape[2] ** 0.5)
    grid = back.unflatten(2, (h, h)).unflatten(4, (2, 2))  # B, V, h, w, 2, 2, 3, 8, 8
    return grid.permute(0, 1, 6, 2, 4, 7, 3, 5, 8).flatten(6, 8).flatten(3, 5)


def patched(order=(0, 1, 2, 3), shown=(0, 1, 2, 3), swap=False):
    subject = toy(grid=(2, 2))
    others = {k: v for k, v in subject.batch.items() if k != "pixel_values"}

    def loss(model, batch):
        return model(unmerged(batch["patches"], order), batch["input_ids"], batch["action"]).loss

    def views(batch):
        pixels = unmerged(batch["patches"], shown)
        return Views.create(pixels.flip(1) if swap else pixels)

    return Subject(
        subject.model, lambda images: {**others, "patches": merged(images, order)}, loss=loss,
        pixels=subject.batch["pixel_values"], views=views,
    )  # fmt: skip


def test_patches_are_cut_and_put_back():
    images = torch.rand(2, 2, 3, 32, 32)
    assert torch.equal(unmerged(merged(images, [0, 2, 1, 3]), [0, 2, 1, 3]), images)


def test_views_that_show_other_pixels_than_the_model_sees_are_refused():
    assert inspect(patched()).ok
    assert inspect(patched((0, 2, 1, 3), (0, 2, 1, 3))).ok
    step, remedy = failed(inspect(patched((0, 2, 1, 3), (0, 1, 2, 3))))
    assert step == "token grid"
    assert "elsewhere" in remedy
    assert "merged" in remedy
    assert "image 0 of sample 0 as view 1" in failed(inspect(patched(swap=True)))[1]


def test_swapped_cameras_are_found_in_a_plain_batch_too():
    subject = toy()
    swapped = replace(subject, views=lambda batch: Views.create(batch["pixel_values"].flip(1)))
    assert "image 0 of sample 0 as view 1" in failed(inspect(swapped))[1]
    other = replace(subject, views=lambda batch: Views.create(batch["pixel_values"].flip(0)))
    assert "as view 0 of sample 1" in failed(inspect(other))[1]


class Folded(torch.nn.Module):
    """Every view is a row of the decoder, with a prompt of its own; the head reads all rows of a sample."""

    def __init__(self, views=2):
        super().__init__()
        self.views, self.inner = views, toy().model
        self.head = torch.nn.Linear(16, 3)

    def forward(self, pixel_values, input_ids, action):
        words, model = self.inner.words(input_ids), self.inner
        pooled = torch.nn.functional.adaptive_avg_pool2d(pixel_values, model.grid)
        hidden = torch.cat([words[:, :1], model.embed(pooled.movedim(1, -1)).flatten(1, 2), words[:, 1:]], 1)
        for block in model.layers:
            hidden = block(hidden)
        read = hidden[:, -1].unflatten(0, (-1, self.views)).mean(1)
        return {"loss": (self.head(read) - action).abs().mean()}


def test_views_folded_into_the_batch_are_one_multi_view_sample():
    torch.manual_seed(0)
    batch = toy_batch()
    folded = {
        "pixel_values": batch["pixel_values"].flatten(0, 1),
        "input_ids": batch["input_ids"].repeat_interleave(2, 0),
        "action": batch["action"],
    }
    subject = Subject(Folded(), folded)
    report = inspect(subject)
    assert report.ok, report.text()
    assert report.facts["views"] == 2
    assert any("4 rows for 2 samples" in line for line in report.checks[2].lines)
    assert "sequence=lambda calls: calls[0].unflatten(0, (-1, 2)).flatten(1, 2)" in report.adapter
    forcing = built(report, subject)
    assert forcing.aligned_tokens(folded).shape == (2, 2, 4, 4)
    forcing(folded)[0].backward()


class Queries(torch.nn.Module):
    """As ACT: an encoder over all tokens, and a decoder whose queries are expanded to the batch."""

    def __init__(self, returns):
        super().__init__()
        layer = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "batch_first": True}
        self.returns, self.conv = returns, torch.nn.Conv2d(3, 16, 8, 8)
        self.encoder = torch.nn.ModuleList(torch.nn.TransformerEncoderLayer(**layer) for _ in range(4))
        self.decoder = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(**layer), 2)
        self.queries, self.state = torch.nn.Embedding(4, 16), torch.nn.Linear(5, 16)
        self.head = torch.nn.Linear(16, 3)

    def forward(self, images, state, action):
        tokens = self.conv(images.flatten(0, 1)).flatten(2).transpose(1, 2)
        tokens = tokens.unflatten(0, images.shape[:2]).flatten(1, 2)
        hidden = torch.cat([self.state(state)[:, None], tokens], 1)
        for block in self.encoder:
            hidden = block(hidden)
        found = self.decoder(self.queries.weight.expand(len(images), -1, -1), hidden)
        return self.returns((self.head(found) - action).abs().mean())


@pytest.mark.parametrize(
    "returns", [lambda loss: {"loss": loss}, lambda loss: (loss, {"l1": 0.0}), lambda loss: loss],
    ids=["dict", "tuple", "scalar"],
)  # fmt: skip
def test_a_loss_may_come_in_a_dict_or_a_tuple(returns):
    torch.manual_seed(0)
    batch = {
        "images": torch.rand(2, 2, 3, 32, 32), "state": torch.randn(2, 5), "action": torch.randn(2, 4, 3),
    }  # fmt: skip
    subject = Subject(Queries(returns), batch)
    report = inspect(subject)
    assert report.ok, report.text()
    assert report.facts["cost"]["flops"] > 0
    assert "loss=" not in report.adapter
    built(report, subject)(batch)[0].backward()


def test_a_cost_that_cannot_be_measured_does_not_lose_the_report(monkeypatch):
    def broken(forcing, batch):
        raise AssertionError("no hooks here")

    monkeypatch.setattr(sys.modules[examine.__module__], "measure", broken)
    report = inspect(toy())
    assert report.ok
    assert report.verified
    assert report.checks[-1].state == "skipped"
    assert "AssertionError: no hooks here" in report.text()
    assert "5 of 6 checks passed" in report.text()


def test_a_fault_in_a_step_keeps_what_was_found_before(monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(sys.modules[examine.__module__], "follow", broken)
    report = inspect(toy())
    step, remedy = failed(report)
    assert step == "gradient path"
    assert "ZeroDivisionError: by zero" in remedy
    assert "as_student" in report.adapter


def test_ignored_images_and_weights_of_zero_are_named():
    deaf = toy()
    deaf.model.embed.weight.data.zero_()
    step, remedy = failed(inspect(deaf))
    assert step == "decoder blocks"
    assert "ignores pixel_values" in remedy
    assert "embed.weight" in remedy

    def without(model, batch):
        return model(torch.zeros_like(batch["pixel_values"]), batch["input_ids"], batch["action"]).loss

    step, remedy = failed(inspect(replace(toy(), loss=without)))
    assert "ignores pixel_values" in remedy
    assert "image_grid_thw" in remedy
    assert "all zero" not in remedy
