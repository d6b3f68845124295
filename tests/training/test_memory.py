"""The memory estimate counts what is there."""

from __future__ import annotations

import torch

from spatial_forcing.forcing import ForcingConfig, Projector, SpatialForcing
from spatial_forcing.students import LoraSettings, LoraStudent
from spatial_forcing.students.openvla_oft import OpenVLAOFT, OpenVLAOFTConfig
from spatial_forcing.training.memory import estimate_memory
from tests.fakes import FakeStudent, FakeTeacher
from tests.students.openvla_oft.small import small


def test_weights_gradients_and_moments_are_counted():
    student = FakeStudent()
    student.embed.requires_grad_(False)
    found = estimate_memory(student, 4)
    all_bytes = 4 * sum(p.numel() for p in student.parameters())
    trained = all_bytes - 4 * sum(p.numel() for p in student.embed.parameters())
    assert (found.weights, found.gradients, found.optimizer) == (all_bytes, trained, 2 * trained)
    assert found.activations is None
    assert "activations unknown" in str(found)


def test_processes_that_share_weights_hold_a_part_each():
    alone, both = (estimate_memory(small(), 1, shards=shards) for shards in (1, 2))
    assert 2 * both.optimizer == alone.optimizer
    assert (both.weights, both.gradients) == (alone.weights // 2, alone.gradients // 2)
    assert both.activations == alone.activations


def test_projectors_are_counted():
    student, pairs = FakeStudent(), ((1, -1), (2, -1))
    sizes = []
    for projectors in ("shared", "independent"):
        config = ForcingConfig(pairs=pairs, projectors=projectors)
        found = estimate_memory(student, 4, SpatialForcing(student, FakeTeacher(), config).projector)
        sizes.append(found.total - estimate_memory(student, 4).total)
    one = sum(p.numel() for p in Projector(16, 8).parameters())
    assert sizes == [16 * one, 32 * one]  # weight, gradient and two moments, float32


def test_activations_grow_with_samples_and_shrink_with_recomputation():
    plain, recomputing = small(), small(gradient_checkpointing=True)
    one, four = (estimate_memory(plain, n).activations for n in (1, 4))
    assert four == 4 * one
    assert estimate_memory(recomputing, 1).activations < one
    wrapped = LoraStudent(plain, LoraSettings(rank=2), base="nowhere")
    assert estimate_memory(wrapped, 1).activations == one
    assert estimate_memory(wrapped, 1).gradients < 4 * sum(p.numel() for p in plain.parameters())


def test_the_published_size_is_estimated_without_weights():
    with torch.device("meta"):
        student = OpenVLAOFT(OpenVLAOFTConfig(tokenizer="words", gradient_checkpointing=True))
    found = estimate_memory(student, 8)
    assert 15e9 < found.weights < 16e9
    assert 1e9 < found.activations < 20e9
