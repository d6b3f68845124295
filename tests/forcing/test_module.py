"""SpatialForcing as a whole: alpha 0, several layers, gate, widths, schedule, empty masks, export, state."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from spatial_forcing import ForcingConfig, SpatialForcing, as_student
from spatial_forcing.errors import CheckpointError, ConfigError, DataError, LayoutError
from spatial_forcing.forcing import AlphaSchedule, Projector, TokenLayout, distributed, gradient_audit
from spatial_forcing.forcing.extras.gate import GatedProjector
from tests.fakes import CAMERAS, FakeStudent, FakeTeacher, fake_batch


def build(seed=0, teacher=None, **settings):
    torch.manual_seed(seed)
    return SpatialForcing(FakeStudent(), teacher or FakeTeacher(), ForcingConfig(**settings))


def without_views(batch, samples, cameras=CAMERAS):
    """The batch with the cameras of some samples marked absent and filled with what LeRobot writes."""
    batch = dict(batch)
    for camera in cameras:
        key = f"observation.images.{camera}"
        image = batch[key].clone()
        image[samples] = -1
        absent = batch.get(key + "_is_pad", torch.zeros(len(image), dtype=torch.bool)).clone()
        absent[samples] = True
        batch |= {key: image, key + "_is_pad": absent}
    return batch


def train(module, steps=4):
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        torch.rand(3)  # a stand-in for dropout and augmentation: any draw out of step shows
        loss, _ = module(fake_batch(seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), optimizer.state_dict()


class TestAlphaZero:
    def test_whole_run_is_bit_identical_to_the_bare_student(self):
        torch.manual_seed(0)
        bare = FakeStudent()
        losses, optimizer = train(bare)
        stream = torch.get_rng_state()

        forcing = build(alpha=0.0)
        ours, our_optimizer = train(forcing)
        assert torch.equal(torch.get_rng_state(), stream)
        assert torch.equal(ours, losses)
        expected = {f"student.{k}": v for k, v in bare.state_dict().items()}
        assert forcing.state_dict().keys() == expected.keys()
        assert all(torch.equal(v, expected[k]) for k, v in forcing.state_dict().items())
        for index, state in optimizer["state"].items():
            assert all(torch.equal(v, our_optimizer["state"][index][k]) for k, v in state.items())

    def test_nothing_is_attached_and_the_teacher_is_not_called(self):
        teacher = FakeTeacher()
        forcing = build(alpha=0.0, teacher=teacher)
        _, metrics = forcing(fake_batch())
        assert not forcing.active
        assert forcing.projector is None
        assert teacher.calls == 0
        assert forcing.projector_state_dict() == {}
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in forcing.modules())
        assert metrics["alpha"] == 0
        assert "action_loss" in metrics

    def test_needs_no_teacher_and_nothing_to_align(self):
        forcing = SpatialForcing(nn.Linear(2, 2), None, ForcingConfig(alpha=0))
        assert forcing.export() is forcing.student

    def test_otherwise_the_teacher_is_needed(self):
        with pytest.raises(ConfigError, match=r"alpha is 0\.5, but there is no teacher"):
            SpatialForcing(FakeStudent(), None)


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_creating_a_projector_leaves_the_random_stream_alone(norm):
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    projector = GatedProjector(8, 8, norm, 2)
    assert torch.equal(torch.rand(5), expected)
    bound = math.sqrt(6 / 16)  # Xavier uniform
    assert 0.8 * bound < projector.fc1.weight.abs().max() <= bound
    assert projector.fc1.bias.abs().max() == 0


def test_loss_is_the_sum_and_the_metrics_name_its_parts():
    forcing = build(alpha=0.3)
    loss, metrics = forcing(fake_batch())
    torch.testing.assert_close(loss.detach(), metrics["action_loss"] + 0.3 * metrics["align_loss"])
    torch.testing.assert_close(metrics["align_loss"], 1 - metrics["cosine"])
    assert metrics["alpha"] == pytest.approx(0.3)
    assert {"action_l1", "cosine/block3_teacher2", "samples_without_tokens"} <= metrics.keys()
    assert all(m.ndim == 0 and not m.requires_grad for m in metrics.values())


def test_training_raises_the_cosine():
    forcing = build(alpha=1.0)
    before = forcing(fake_batch())[1]["cosine"]
    train(forcing, steps=30)
    assert forcing(fake_batch())[1]["cosine"] > before + 0.2


class TestTeacherOutside:
    class ModuleTeacher(FakeTeacher, nn.Module):
        def __init__(self):
            nn.Module.__init__(self)
            FakeTeacher.__init__(self)
            self.weights = nn.Parameter(torch.ones(3))

    def test_not_in_the_module_tree(self):
        forcing = build(teacher=(teacher := self.ModuleTeacher()))
        assert teacher not in set(forcing.modules())
        assert all(p is not teacher.weights for p in forcing.parameters())
        assert not any("teacher" in k or "weights" in k for k in forcing.state_dict())

    def test_copies_share_it_and_casts_do_not_reach_it(self):
        forcing = build(teacher=(teacher := self.ModuleTeacher()))
        copy.deepcopy(forcing.to(torch.float64))(fake_double())
        assert teacher.calls == 1
        assert teacher.weights.dtype == torch.float32

    def test_no_gradient_and_no_training_mode(self):
        teacher = self.ModuleTeacher().eval()
        forcing = build(teacher=teacher).train()
        forcing(fake_batch())[0].backward()
        assert teacher.weights.grad is None
        assert not teacher.training


def fake_double():
    return {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in fake_batch().items()
    }


class TestSeveralLayers:
    def test_one_shared_projector_and_the_mean_of_losses(self):
        pairs = ((1, 0), (2, 1), (4, -1))
        together = build(pairs=pairs)
        _, metrics = together(fake_batch())
        single = []
        for pair in pairs:
            alone = build(pairs=(pair,))
            alone.projector.load_state_dict(together.projector.state_dict())
            single.append(alone(fake_batch())[1]["align_loss"])
        torch.testing.assert_close(metrics["align_loss"], torch.stack(single).mean())
        torch.testing.assert_close(1 - metrics["cosine/block2_teacher1"], single[1])
        assert len(together.projector_state_dict()) == 6

    def test_independent_projectors_start_equal_and_part(self):
        pairs = ((1, 0), (3, -1))
        shared, own = build(pairs=pairs), build(pairs=pairs, projectors="independent")
        torch.testing.assert_close(own(fake_batch())[0], shared(fake_batch())[0])
        train(own, steps=2)
        first, second = own.projector
        assert not torch.equal(first.fc1.weight, second.fc1.weight)
        # Each learns from its own pair alone.
        alone = build(pairs=pairs[1:])
        alone.student.load_state_dict(own.student.state_dict())
        alone.projector.load_state_dict(second.state_dict())
        _, metrics = own(fake_batch())
        torch.testing.assert_close(metrics["cosine/block3_teacher2"], alone(fake_batch())[1]["cosine"])

    def test_independent_projectors_take_matryoshka_widths(self):
        forcing = build(pairs=((1, -1), (3, -1)), widths=(0.5, 0.25), projectors="independent")
        forcing(fake_batch())[0].backward()
        used = [(projector.fc1.weight.grad.abs().sum(1) > 0).sum().item() for projector in forcing.projector]
        assert used == [4, 2]

    def test_one_student_layer_for_two_teacher_layers(self):
        _, metrics = build(pairs=((2, 0), (2, 1)))(fake_batch())
        assert {"cosine/block2_teacher0", "cosine/block2_teacher1"} <= metrics.keys()

    def test_matryoshka_widths_use_a_prefix_of_the_hidden_layer(self):
        forcing = build(pairs=((1, -1), (3, -1)), widths=(0.5, 0.25))
        forcing(fake_batch())[0].backward()
        used = forcing.projector.fc1.weight.grad.abs().sum(1) > 0
        assert used.tolist() == [True] * 4 + [False] * 4

    def test_gate_mixes_states_before_the_projector(self):
        forcing = build(pairs=((1, -1), (3, -1)), gate=True)
        with torch.no_grad():
            forcing.projector.gate.copy_(torch.tensor([-30.0, 30.0]))
        _, metrics = forcing(fake_batch())
        alone = build(pairs=((3, -1),))
        alone.projector.load_state_dict(forcing.projector.state_dict(), strict=False)
        # The chosen layer is normalised once more, which its LayerNorm does not see.
        torch.testing.assert_close(
            metrics["align_loss"], alone(fake_batch())[1]["align_loss"], atol=1e-4, rtol=0
        )

    def test_gate_is_trained(self):
        forcing = build(pairs=((1, -1), (3, -1)), gate=True)
        forcing(fake_batch())[0].backward()
        assert forcing.projector.gate.grad.abs().max() > 0


class TestNorms:
    def test_batch_norm_uses_valid_tokens_only(self):
        projector = Projector(4, 4, "batch")
        hidden, valid = torch.randn(2, 6, 4), torch.ones(2, 6, dtype=torch.bool)
        expected = projector(hidden[:, :4], valid[:, :4])
        mean = projector.vlm_norm.running_mean.clone()
        hidden[:, 4:], valid[:, 4:] = math.nan, False
        projector = copy.deepcopy(projector)
        projector.vlm_norm.reset_running_stats()
        torch.testing.assert_close(projector(hidden, valid)[:, :4], expected)
        torch.testing.assert_close(projector.vlm_norm.running_mean, mean)

    @pytest.mark.parametrize("norm", ["layer", "batch", "none"])
    def test_no_valid_token_gives_a_connected_zero(self, norm):
        forcing = build(norm=norm)
        batch = without_views(fake_batch(), slice(None))
        loss, metrics = forcing(batch)
        loss.backward()
        assert torch.equal(loss.detach(), metrics["action_loss"])
        assert metrics["samples_without_tokens"] == 4
        for name, parameter in forcing.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
        assert all(p.grad.abs().max() == 0 for p in forcing.projector.parameters())


class GarbageTeacher(FakeTeacher):
    def features(self, views, layers=(-1,)):
        absent = ~views.present[:, :, None, None, None]
        return tuple(f.masked_fill(absent, math.nan) for f in super().features(views, layers))


class TestEmptyMasks:
    def test_mean_over_tokens_then_over_samples_that_have_any(self):
        batch = fake_batch()
        each = []
        for i in range(2, 4):
            row = {k: v[i : i + 1] for k, v in batch.items()}
            each.append(build()(row)[1]["align_loss"])
        _, metrics = build()(without_views(batch, slice(0, 2)))
        torch.testing.assert_close(metrics["align_loss"], torch.stack(each).mean())
        assert metrics["samples_without_tokens"] == 2

    @pytest.mark.parametrize(
        "settings", [{}, {"standardise": True}, {"norm": "batch"}, {"pairs": ((1, 0), (3, 2))}]
    )
    def test_garbage_of_absent_views_does_not_leak(self, settings):
        batch = without_views(fake_batch(), slice(0, 1), CAMERAS[1:])
        batch = without_views(batch, slice(2, 3))
        clean = build(**settings)
        dirty = build(teacher=GarbageTeacher(), **settings)
        losses = []
        for forcing in (clean, dirty):
            loss, _ = forcing(batch)
            loss.backward()
            losses.append(loss.detach())
        assert torch.equal(*losses)
        for a, b in zip(clean.parameters(), dirty.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)

    def test_the_teacher_is_not_called_for_nothing(self):
        teacher = FakeTeacher()
        build(teacher=teacher)(without_views(fake_batch(), slice(None)))
        assert teacher.calls == 0

    def test_too_many_empty_steps_are_an_error(self, monkeypatch):
        monkeypatch.setattr(distributed, "MAX_EMPTY_STEPS", 3)
        forcing, empty = build(), without_views(fake_batch(), slice(None))
        for batch in (empty, empty, fake_batch(), empty, empty):
            forcing(batch)
        with pytest.raises(LayoutError, match="3 consecutive steps"):
            forcing(empty)

    def test_evaluation_does_not_count(self, monkeypatch):
        monkeypatch.setattr(distributed, "MAX_EMPTY_STEPS", 2)
        forcing, empty = build().eval(), without_views(fake_batch(), slice(None))
        for _ in range(3):
            forcing(empty)

    def test_the_limit_is_a_hundred(self):
        assert distributed.MAX_EMPTY_STEPS == 100


class TestRefused:
    class Lying(FakeStudent):
        change = staticmethod(lambda layout: layout)

        def layout(self, batch):
            return self.change(super().layout(batch))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x: TokenLayout(x.index[:, :0], x.valid[:, :0]), "no view tokens"),
            (lambda x: TokenLayout(x.index + 2, x.valid), "position 20 of a sequence of 20"),
            (lambda x: TokenLayout(x.index[:, :1], x.valid[:, :1]), "4 samples x 1 views.*4 x 2"),
        ],
    )
    def test_layouts_that_do_not_fit(self, change, message):
        student = self.Lying()
        student.change = change
        with pytest.raises(LayoutError, match=message):
            SpatialForcing(student, FakeTeacher())(fake_batch())

    def test_token_shift_past_the_end(self):
        build(token_shift=1)(fake_batch())
        with pytest.raises(LayoutError, match="token_shift"):
            build(token_shift=2)(fake_batch())

    def test_images_out_of_range(self):
        batch = fake_batch()
        batch["observation.images.front"] = batch["observation.images.front"] * 2 - 1
        with pytest.raises(DataError, match=r"expected \[0, 1\]"):
            build()(batch)


class TestSchedule:
    def test_constant_needs_no_progress(self):
        assert build().alpha == 0.5

    def test_progress_drives_alpha(self):
        forcing = build(alpha=2.0, schedule="linear", warmup=0.25, end=0.75, floor=0.5)
        values = []
        for step in range(9):
            forcing.set_progress(step, 8)
            values.append(forcing.alpha)
        assert values == pytest.approx([0, 1, 2, 1.75, 1.5, 1.25, 1, 1, 1])

    def test_cosine_is_half_way_in_the_middle(self):
        schedule = AlphaSchedule("cosine")
        assert [schedule.factor(x) for x in (0, 0.5, 1, 2)] == pytest.approx([1, 0.5, 0, 0])

    def test_forgotten_progress_is_an_error(self):
        with pytest.raises(ConfigError, match="set_progress"):
            build(schedule="cosine")(fake_batch())

    def test_a_pause_costs_nothing_but_keeps_every_gradient(self):
        teacher = FakeTeacher()
        forcing = build(teacher=teacher, schedule="linear", end=0.5)
        forcing.set_progress(5, 10)
        loss, metrics = forcing(fake_batch())
        loss.backward()
        assert teacher.calls == 0
        assert torch.equal(loss.detach(), metrics["action_loss"])
        assert all(p.grad is not None and p.grad.abs().max() == 0 for p in forcing.projector.parameters())

    @pytest.mark.parametrize("arguments", [(-1, 5), (0, 0)])
    def test_impossible_progress(self, arguments):
        with pytest.raises(ConfigError, match="expected step >= 0"):
            build().set_progress(*arguments)


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"alpha": -0.1}, "alpha"),
            ({"alpha": math.nan}, "alpha"),
            ({"pe_scale": -1}, "pe_scale"),
            ({"norm": "group"}, "layer, batch, none"),
            ({"registration": "centre"}, "corner, pixel"),
            ({"schedule": "step"}, "constant, linear or cosine"),
            ({"warmup": 1.5}, "warmup is 1.5"),
            ({"schedule": "linear", "warmup": 0.5, "end": 0.5}, "must come after warmup"),
            ({"pairs": ()}, "empty"),
            ({"pairs": ((1, 0), (1, 0))}, "twice"),
            ({"pairs": ((1, 0), (2, 1)), "gate": True}, "several teacher layers"),
            ({"gate": True, "widths": (1.0,)}, "exclude"),
            ({"gate": True, "projectors": "independent"}, "mixes the layers before one projector"),
            ({"projectors": "one each"}, "projectors is 'one each'; choose one of shared, independent"),
            ({"pairs": ((1, 0),), "widths": (0.5, 0.5)}, "2 entries for 1 pairs"),
            ({"widths": (0.0,)}, r"\(0, 1\]"),
        ],
    )
    def test_refused(self, settings, message):
        with pytest.raises(ConfigError, match=message):
            ForcingConfig(**settings)

    def test_survives_json(self):
        config = ForcingConfig(pairs=((1, 0), (3, -1)), widths=(0.5, 1.0), schedule="cosine")
        assert ForcingConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


class TestState:
    def test_projector_state_round_trip(self):
        trained = build(standardise=True, norm="batch", pairs=((1, -1), (2, -1)), gate=True)
        train(trained, steps=2)
        state = trained.projector_state_dict()
        assert not any(k.startswith("student.") for k in state)
        fresh = build(seed=1, standardise=True, norm="batch", pairs=((1, -1), (2, -1)), gate=True)
        fresh.load_projector_state_dict(state)
        fresh.student.load_state_dict(trained.student.state_dict())
        assert torch.equal(fresh.eval()(fake_batch())[0], trained.eval()(fake_batch())[0])

    def test_independent_projectors_round_trip(self):
        pairs = ((1, -1), (2, -1))
        trained = build(pairs=pairs, projectors="independent")
        train(trained, steps=2)
        state = trained.projector_state_dict()
        assert {k.rsplit(".", 2)[0] for k in state} == {"projector.0", "projector.1"}
        fresh = build(seed=1, pairs=pairs, projectors="independent")
        fresh.load_projector_state_dict(state)
        fresh.student.load_state_dict(trained.student.state_dict())
        assert torch.equal(fresh(fake_batch())[0], trained(fake_batch())[0])
        assert list(trained.export().state_dict()) == list(FakeStudent().state_dict())
        with pytest.raises(CheckpointError, match=r"projector\.0"):
            build(pairs=pairs).load_projector_state_dict(state)

    def test_keys_of_the_shared_projector_are_those_of_older_runs(self):
        names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "vlm_norm.weight", "vlm_norm.bias")
        state = build(pairs=((1, -1), (2, -1))).projector_state_dict()
        assert set(state) == {f"projector.{name}" for name in names}

    def test_state_of_another_configuration(self):
        with pytest.raises(CheckpointError, match="vlm_norm"):
            build(norm="none").load_projector_state_dict(build().projector_state_dict())

    def test_export_is_the_student_itself(self):
        forcing = build()
        names = list(forcing.student.state_dict())
        loss = forcing(fake_batch())[0]
        student = forcing.export()
        assert student is forcing.student
        assert list(student.state_dict()) == names
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in student.modules())
        assert torch.equal(forcing(fake_batch())[0], loss), "training goes on after an export"


class TestStandardise:
    def test_targets_are_standardised_in_training_and_frozen_in_evaluation(self):
        forcing = build(standardise=True)
        forcing(fake_batch())
        count = forcing.standardiser.count.clone()
        assert count == 4 * 2 * 9
        forcing.eval()(fake_batch())
        assert torch.equal(forcing.standardiser.count, count)

    def test_it_changes_the_loss(self):
        losses = [build(standardise=on)(fake_batch())[1]["align_loss"] for on in (False, True)]
        assert (losses[0] - losses[1]).abs() > 1e-3


class TestCellMean:
    def test_a_state_with_its_earlier_name_is_read(self):
        trained, fresh = build(subtract_cell_mean=True), build(seed=1, subtract_cell_mean=True)
        train(trained, steps=1)
        state = trained.projector_state_dict()
        fresh.load_projector_state_dict({k.replace("cell_mean.", "centre."): v for k, v in state.items()})
        assert torch.equal(fresh.projector_state_dict()["cell_mean.total"], state["cell_mean.total"])

    def test_a_fresh_module_takes_over_the_means(self):
        trained = build(subtract_cell_mean=True, pairs=((1, 0), (3, -1)))
        train(trained, steps=2)
        state = trained.projector_state_dict()
        assert state["cell_mean.count"].tolist() == [8, 8]
        fresh = build(seed=1, subtract_cell_mean=True, pairs=((1, 0), (3, -1)))
        fresh.load_projector_state_dict(state)
        fresh.student.load_state_dict(trained.student.state_dict())
        assert torch.equal(fresh.eval()(fake_batch())[0], trained.eval()(fake_batch())[0])

    def test_other_cameras_do_not_fit(self):
        trained, other = build(subtract_cell_mean=True), build(subtract_cell_mean=True)
        train(trained, steps=1)
        other.cell_mean([torch.zeros(1, 3, 2, 2, 8)], torch.ones(1, 3, dtype=torch.bool))
        with pytest.raises(CheckpointError, match=r"cell_mean\.total"):
            other.load_projector_state_dict(trained.projector_state_dict())

    def test_it_changes_the_loss(self):
        losses = [build(subtract_cell_mean=on)(fake_batch())[1]["align_loss"] for on in (False, True)]
        assert (losses[0] - losses[1]).abs() > 1e-3


class TestGradientAudit:
    def test_compares_both_losses_where_both_reach(self):
        forcing = build()
        audit = gradient_audit(forcing, fake_batch())
        tapped = forcing.eval()
        loss, _ = tapped(fake_batch())
        assert all(p.grad is None for p in forcing.parameters())
        shared = [
            p for n, p in forcing.student.named_parameters() if not n.startswith(("layers.3", "norm", "head"))
        ]
        action_only = SpatialForcing(forcing.student, None, ForcingConfig(alpha=0))
        action = torch.autograd.grad(action_only(fake_batch())[0], shared)
        total = torch.autograd.grad(loss, shared)
        a = torch.cat([g.flatten() for g in action])
        b = (torch.cat([g.flatten() for g in total]) - a) / 0.5
        assert audit["cosine"] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-4)
        assert audit["action_norm"] == pytest.approx(float(a.norm()), rel=1e-4)
        assert audit["align_norm"] == pytest.approx(float(b.norm()), rel=1e-3)

    def test_leaves_modes_and_moments_alone(self):
        forcing = build(standardise=True)
        forcing.student.layers[0].eval()
        gradient_audit(forcing, fake_batch())
        assert forcing.training
        assert not forcing.student.layers[0].training
        assert forcing.standardiser.count == 0

    def test_needs_the_alignment(self):
        with pytest.raises(ConfigError, match="alpha is 0"):
            gradient_audit(build(alpha=0.0), fake_batch())


class TestAsStudent:
    def wrap(self, **changes):
        torch.manual_seed(0)
        model = FakeStudent()
        settings = {
            "blocks": model.layers,
            "layout": model.layout,
            "views": model.views,
            "loss": lambda m, batch: m(batch),
            "final_norm": model.norm,
        }
        return model, as_student(model, **{**settings, **changes})

    def test_same_loss_and_gradients_as_the_student_itself(self):
        model, student = self.wrap()
        forcing, direct = SpatialForcing(student, FakeTeacher()), build()
        forcing.projector.load_state_dict(direct.projector.state_dict())
        for module in (forcing, direct):
            module(fake_batch())[0].backward()
        for (name, a), (_, b) in zip(
            model.named_parameters(), direct.student.named_parameters(), strict=True
        ):
            assert torch.equal(a.grad, b.grad), name

    def test_names_are_saved_once_and_export_gives_the_model_back(self):
        model, student = self.wrap()
        names = list(model.state_dict())
        forcing = SpatialForcing(student, FakeTeacher())
        assert [k for k in forcing.state_dict() if k.startswith("student.")] == [
            f"student.model.{n}" for n in names
        ]
        assert forcing.export() is model
        assert list(model.state_dict()) == names

    def test_copies_are_independent(self):
        _, student = self.wrap()
        twin = copy.deepcopy(SpatialForcing(student, FakeTeacher()))
        assert twin.student.blocks[0] is twin.student.model.layers[0]
        assert twin.student.final_norm is twin.student.model.norm

    def test_blocks_of_another_model(self):
        with pytest.raises(ConfigError, match=r"blocks \[0, 1, 2, 3\] of 4 are not modules of FakeStudent"):
            self.wrap(blocks=FakeStudent().layers)
        with pytest.raises(ConfigError, match="not modules"):
            self.wrap(blocks=[])

    def test_a_model_without_loss(self):
        _, student = self.wrap(loss=lambda m, batch: None)
        with pytest.raises(ConfigError, match="labels"):
            SpatialForcing(student, FakeTeacher())(fake_batch())
