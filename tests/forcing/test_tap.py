"""The tap reads the true residual stream, with true gradients, however the student is executed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spatial_forcing.errors import ConfigError
from spatial_forcing.forcing import ForcingConfig, SpatialForcing, resolve_pairs
from spatial_forcing.forcing.config import Pair
from spatial_forcing.forcing.layout import gather_tokens
from spatial_forcing.forcing.loss import alignment_loss
from spatial_forcing.forcing.tap import Tap, width_of
from spatial_forcing.forcing.target import make_targets, token_validity
from tests.fakes import FakeStudent, FakeTeacher, fake_batch

DEPTH = 4
PAIRS = ((1, 0), (3, -1))


class CheckpointedStudent(FakeStudent):
    """FakeStudent with activation checkpointing, and its residual stream returned the plain way."""

    reentrant: bool | None = None

    def predict(self, images, state):
        return self.trace(images, state)[0]

    def trace(self, images, state):
        B = len(images)
        patches = nn.functional.adaptive_avg_pool2d(images.flatten(0, 1), self.grid)
        tokens = patches.flatten(2).transpose(1, 2).reshape(B, -1, 3)
        hidden = torch.cat(
            [self.state(state)[:, None], self.embed(tokens), self.action_query.expand(B, -1, -1)], 1
        )
        states = [hidden]
        for block in self.layers:
            if self.reentrant is None:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=self.reentrant)
            states.append(hidden)
        output = self.norm(hidden) if self.norm is not None else hidden
        return self.head(output[:, -1]).view(B, self.chunk, self.action_dim), states

    @property
    def final_norm(self):
        return self.norm


def build(pairs=PAIRS, **settings):
    torch.manual_seed(0)
    config = ForcingConfig(pairs=pairs, **settings)
    return SpatialForcing(CheckpointedStudent(depth=DEPTH), FakeTeacher(), config, student_dim=16)


def reference(forcing, batch):
    """The loss written out, without hooks."""
    student, config = forcing.student, forcing.config
    views, layout = student.alignment(batch).views, student.alignment(batch).layout
    predicted, states = student.trace(views.images, batch["observation.state"])
    action = (predicted - batch["action"]).abs().mean()
    valid = token_validity(layout, views)
    losses = []
    for k, layer in config.pairs:
        features = FakeTeacher().features(views, (layer,))
        (target,) = make_targets(features, views, layout, valid=valid, pe_scale=config.pe_scale)
        mask = valid.flatten(1)
        projected = forcing.projector(gather_tokens(states[k], layout), mask)
        losses.append(alignment_loss(projected, target.flatten(1, 3), mask))
    return action + config.alpha * sum(losses) / len(losses)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def compare(run, expected_of, atol=1e-6):
    """`run(forcing, batch)` gives the loss whose value and gradients must equal the reference's."""
    batch = fake_batch()
    expected = expected_of(plain := build(), batch)
    expected.backward()
    forcing = build()
    loss = run(forcing, batch)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), atol=atol, rtol=1e-5)
    ours, theirs = gradients(forcing), gradients(plain)
    assert ours.keys() == theirs.keys()
    assert {n for n, _ in forcing.named_parameters()} == set(ours)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=atol, rtol=1e-5, msg=name)


def test_plain():
    compare(lambda forcing, batch: forcing(batch)[0], reference)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    def run(forcing, batch):
        forcing.student.reentrant = reentrant
        return forcing(batch)[0]

    compare(run, reference)


@pytest.mark.parametrize("scope", ["module", "student", "blocks"])
def test_compiled(scope):
    def run(forcing, batch):
        if scope == "module":
            return torch.compile(forcing, backend="aot_eager")(batch)[0]
        parts = [forcing.student] if scope == "student" else forcing.student.blocks
        for part in parts:
            part.compile(backend="aot_eager")
        return forcing(batch)[0]

    torch._dynamo.reset()
    compare(run, reference)


def test_compiled_graph_keeps_working_after_the_first_step():
    torch._dynamo.reset()
    forcing = build()
    compiled = torch.compile(forcing, backend="aot_eager")
    for seed in range(3):
        plain = build()
        expected = reference(plain, fake_batch(seed=seed))
        expected.backward()
        forcing.zero_grad()
        with torch.no_grad():  # a rollout between two steps: the tap must stay quiet
            forcing.student(fake_batch(seed=9))
        loss, _ = compiled(fake_batch(seed=seed))
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected.detach())
        for name, gradient in gradients(plain).items():
            torch.testing.assert_close(gradients(forcing)[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.slow
def test_inductor():
    torch._dynamo.reset()
    compare(lambda forcing, batch: torch.compile(forcing)(batch)[0], reference, atol=1e-5)


def test_bf16_autocast():
    def under_autocast(function):
        def run(forcing, batch):
            with torch.autocast("cpu", torch.bfloat16):
                return function(forcing, batch)

        return run

    compare(under_autocast(lambda forcing, batch: forcing(batch)[0]), under_autocast(reference))


def test_projector_stays_float32_when_the_module_is_cast():
    forcing = build(standardise=True).to(torch.bfloat16)
    assert {p.dtype for p in forcing.student.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in forcing.projector.parameters()} == {torch.float32}
    assert {b.dtype for b in forcing.standardiser.buffers()} == {torch.float64}


@pytest.mark.parametrize("depth", range(DEPTH + 1))
@pytest.mark.parametrize("final_norm", [True, False])
def test_every_depth(depth, final_norm):
    student = CheckpointedStudent(depth=DEPTH)
    if not final_norm:
        student.norm = None
    tap = Tap(student.blocks, [depth], student.final_norm)
    batch = fake_batch()
    with tap.armed() as captured:
        _, states = student.trace(student.alignment(batch).views.images, batch["observation.state"])
    assert torch.equal(captured[depth][0], states[depth])


@pytest.mark.parametrize("settings", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_transformers_hidden_states(settings):
    """Our "after k blocks" is the `hidden_states[k]` of transformers."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2
    )
    model = LlamaModel(config).train()
    if settings is not None:
        model.gradient_checkpointing_enable(settings)
        model.enable_input_require_grads()
    tap = Tap(model.layers, range(3), model.norm)
    with tap.armed() as captured:
        states = model(torch.arange(10)[None], output_hidden_states=True, use_cache=False).hidden_states
    for k, (state, *_) in captured.items():
        assert torch.equal(state, states[k])
        assert state.requires_grad
    assert width_of(model.layers, model.norm) == 8


def test_blocks_whose_parts_are_called_one_by_one():
    """Joint models (pi0) never call a block; its `input_layernorm` still runs."""
    student = FakeStudent()
    block = student.blocks[2]
    tap = Tap(student.blocks, [2], student.final_norm)
    hidden = torch.randn(1, 5, 16)
    with tap.armed() as captured:
        block.input_layernorm(input=hidden)
        block.input_layernorm(input=hidden + 1)
    assert captured[2][0] is hidden


def test_making_and_running_a_tap_changes_no_global_state():
    before = torch._dynamo.config.skip_nnmodule_hook_guards
    build()(fake_batch())
    assert torch._dynamo.config.skip_nnmodule_hook_guards is before


def test_unarmed_and_detached_taps_do_nothing():
    forcing = build()
    forcing(fake_batch())
    forcing.policy(fake_batch())
    forcing.export()
    hooks = [m for m in forcing.student.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert hooks == []


def test_a_failing_forward_disarms():
    forcing = build()
    tap = Tap(forcing.blocks, [2], forcing.student.final_norm)
    hidden = torch.randn(1, 5, 16)
    with pytest.raises(KeyError), tap.armed() as captured:
        forcing.student({k: v for k, v in fake_batch().items() if k != "action"})
    forcing.blocks[2].input_layernorm(hidden)
    assert captured == {}


def test_copies_capture_into_their_own_tap():
    forcing = build()
    for twin in (copy.deepcopy(forcing), copy.deepcopy(copy.deepcopy(forcing))):
        with torch.no_grad():
            for p in twin.student.parameters():
                p.mul_(0.5)
        expected = reference(twin, fake_batch())
        loss, _ = twin(fake_batch())
        torch.testing.assert_close(loss, expected)


def test_pickled_modules_leave_the_teacher_behind():
    forcing = pickle.loads(pickle.dumps(build()))
    with pytest.raises(ConfigError, match="teacher is not there"):
        forcing(fake_batch())


def test_a_tap_that_never_fires():
    class Skipping(FakeStudent):
        def predict(self, images, state):
            return self.head(self.state(state)).view(-1, self.chunk, self.action_dim)

    forcing = SpatialForcing(Skipping(), FakeTeacher())
    with pytest.raises(ConfigError, match=r"after 3 blocks never fired.*block 3 \(FakeBlock\)"):
        forcing(fake_batch())


def test_a_tap_on_something_that_is_no_sequence():
    class Flat(FakeStudent):
        def predict(self, images, state):
            hidden = self.state(state)
            for block in self.layers:
                hidden = block.mix(block.input_layernorm(hidden))
            return self.head(hidden).view(-1, self.chunk, self.action_dim)

    with pytest.raises(ConfigError, match=r"shape \(4, 16\)"):
        SpatialForcing(Flat(), FakeTeacher())(fake_batch())


class TestFrozen:
    def test_refused_with_the_remedy(self):
        forcing = build(pairs=((3, -1),))
        forcing.student.requires_grad_(False)
        forcing.student.head.requires_grad_(True)
        forcing.student.layers[3].requires_grad_(True)
        with pytest.raises(ConfigError, match=r"after 3 blocks is trainable.*Unfreeze blocks 0\.\.2"):
            forcing(fake_batch())

    def test_refused_although_inputs_are_made_to_require_gradients(self):
        forcing = build(pairs=((3, -1),))
        forcing.student.requires_grad_(False)
        forcing.student.head.requires_grad_(True)
        forcing.student.layers[0].register_forward_pre_hook(lambda _, args: (args[0].requires_grad_(),))
        with pytest.raises(ConfigError, match="Unfreeze"):
            forcing(fake_batch())

    @pytest.mark.parametrize("reentrant", [None, True, False])
    def test_embedding_alone_is_enough(self, reentrant):
        forcing = build(pairs=((3, -1),))
        forcing.student.requires_grad_(False)
        forcing.student.embed.requires_grad_(True)
        forcing.student.reentrant = reentrant
        forcing(fake_batch())[0].backward()
        assert forcing.student.embed.weight.grad.abs().max() > 0

    def test_one_frozen_tap_among_several(self):
        forcing = build(pairs=((1, -1), (3, -1)))
        for part in (forcing.student.embed, forcing.student.state, forcing.student.layers[0]):
            part.requires_grad_(False)
        forcing.student.action_query.requires_grad_(False)
        with pytest.raises(ConfigError, match="after 1 blocks is trainable"):
            forcing(fake_batch())

    def test_a_state_captured_without_graph(self):
        class Segmented(FakeStudent):
            """One reentrant checkpoint around all blocks: their states never join the graph."""

            def predict(self, images, state):
                hidden = self.state(state)[:, None].expand(-1, 20, -1)
                hidden = checkpoint(nn.Sequential(*self.layers), hidden, use_reentrant=True)
                return self.head(self.norm(hidden)[:, -1]).view(-1, self.chunk, self.action_dim)

        with pytest.raises(ConfigError, match="use_reentrant=False"):
            SpatialForcing(Segmented(), FakeTeacher())(fake_batch())


@pytest.mark.parametrize("reentrant", [True, False])
def test_last_block_without_final_norm_inside_a_checkpoint(reentrant):
    """Its output is captured inside the checkpoint, where transformers' layers run their hooks too."""

    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __call__(self, hidden):
            return checkpoint(super().__call__, hidden, use_reentrant=reentrant)

        def forward(self, hidden):
            return self.inner(hidden)

    results = []
    for wrapped in (False, True):
        forcing = build(pairs=((2, -1),))
        student = forcing.student
        student.norm = None
        if wrapped:
            student.layers[-1] = Checkpointed(student.layers[-1])
        forcing = SpatialForcing(student, FakeTeacher(), ForcingConfig(pairs=((-1, -1),)))
        forcing.projector.load_state_dict(build(pairs=((2, -1),)).projector.state_dict())
        forcing(fake_batch())[0].backward()
        results.append([p.grad for p in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class TestResolve:
    def test_default_is_three_quarters(self):
        assert resolve_pairs(ForcingConfig(), 32, {"": 24}) == (Pair(24, 23),)
        assert resolve_pairs(ForcingConfig(), 1, {"": 1}) == (Pair(1, 0),)

    def test_negative_indices(self):
        config = ForcingConfig(pairs=((-1, -2), (0, 0)))
        assert resolve_pairs(config, 4, {"": 3}) == (Pair(4, 1), Pair(0, 0))

    @pytest.mark.parametrize(
        ("pair", "message"),
        [
            ((5, 0), r"student layer 5 does not exist in a model of 4 blocks; choose -5\.\.4"),
            ((-6, 0), "student layer -6"),
            ((1, 3), r"teacher layer 3 does not exist in a model of 3 layers; choose -3\.\.2"),
            ((1, -4), "teacher layer -4"),
        ],
    )
    def test_out_of_range(self, pair, message):
        with pytest.raises(ConfigError, match=message):
            resolve_pairs(ForcingConfig(pairs=(pair,)), 4, {"": 3})


def test_width_needs_a_norm_or_a_number():
    blocks = [nn.Linear(3, 3)]
    with pytest.raises(ConfigError, match="student_dim=WIDTH"):
        width_of(blocks, None)
    assert width_of(blocks, nn.LayerNorm(7)) == 7
    assert width_of([nn.TransformerEncoderLayer(8, 2)], None) == 8
