"""Two processes and accumulated micro-batches give the gradient of one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from spatial_forcing.forcing import ForcingConfig, SpatialForcing
from tests.fakes import CAMERAS, FakeStudent, FakeTeacher, fake_batch

RANKS = 2
SCENARIOS = {
    # name: (settings, micro-batches a rank)
    "plain": ({}, 1),
    "accumulated": ({}, 2),
    "several_layers": ({"pairs": ((1, 0), (3, -1)), "gate": False}, 2),
    "independent": ({"pairs": ((1, 0), (3, -1)), "projectors": "independent"}, 1),
    "gate": ({"pairs": ((1, -1), (3, -1)), "gate": True}, 1),
    "standardised": ({"standardise": True}, 1),
    "centred": ({"subtract_cell_mean": True}, 1),
    "paused": ({"schedule": "linear", "end": 0.5}, 1),
    "alpha_zero": ({"alpha": 0.0}, 2),
}


def whole_batch():
    """Eight samples; valid tokens are uneven, and samples 4 to 6 (two of rank 1's micro-batches) have few."""
    batch = fake_batch(8)
    absent = {"front": [1, 4, 5, 6], "wrist": [0, 4, 5]}
    for camera in CAMERAS:
        key = f"observation.images.{camera}"
        pad = torch.zeros(8, dtype=torch.bool)
        pad[absent[camera]] = True
        batch |= {key + "_is_pad": pad}
    return batch


def rows(batch, start, stop):
    return {k: v[start:stop] for k, v in batch.items()}


def build(settings):
    torch.manual_seed(0)
    forcing = SpatialForcing(FakeStudent(), FakeTeacher(), ForcingConfig(**settings))
    forcing.set_progress(6, 10)
    return forcing


def outcome(forcing, metrics):
    result = {name: p.grad for name, p in forcing.named_parameters()}
    result |= dict(forcing.named_buffers())
    return result | {f"metric {k}": torch.stack([m[k] for m in metrics]).mean() for k in metrics[0]}


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results = {}
    for name, (settings, steps) in SCENARIOS.items():
        forcing = build(settings)
        parallel = DistributedDataParallel(forcing)
        size = 8 // (RANKS * steps)
        first = rank * steps
        batches = [rows(whole_batch(), i * size, (i + 1) * size) for i in range(first, first + steps)]
        if steps > 1:
            forcing.begin_accumulation(batches)
        metrics = []
        for i, batch in enumerate(batches):
            parallel.require_backward_grad_sync = i == steps - 1
            loss, measured = parallel(batch)
            (loss / steps).backward()
            metrics.append(measured)
        results[name] = outcome(forcing, metrics)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def spawned(worker, folder):
    """What each rank's `worker(rank, folder)` saved as RANK.pt."""
    mp.spawn(worker, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def assert_as_in_one_process(outcomes, name):
    """`outcomes`: of each rank, of scenario `name`."""
    forcing = build(SCENARIOS[name][0])
    loss, metrics = forcing(whole_batch())
    loss.backward()
    for key, value in outcome(forcing, [metrics]).items():
        if key.startswith("metric"):
            ours = torch.stack([found[key] for found in outcomes]).mean()
            if key == "metric samples_without_tokens":
                ours = ours * RANKS * SCENARIOS[name][1]
            torch.testing.assert_close(ours, value, msg=key)
        else:
            for found in outcomes:
                torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-5, msg=key)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return spawned(worker, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_equals_one_process(ranks, name):
    assert_as_in_one_process([results[name] for results in ranks], name)


def test_accumulation_in_one_process():
    """`begin_accumulation` works without any process group, and its window ends with its batches."""
    whole, parts = build({}), build({})
    whole(whole_batch())[0].backward()
    batches = [rows(whole_batch(), i, i + 2) for i in range(0, 8, 2)]
    parts.begin_accumulation(batches)
    for batch in batches:
        (parts(batch)[0] / len(batches)).backward()
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-6, rtol=1e-5, msg=name)
    assert torch.equal(parts(whole_batch())[0], whole(whole_batch())[0])


def test_a_short_window_is_divided_as_the_loop_divides():
    """Accelerate divides the last, incomplete window by the full number of steps."""
    losses = []
    for divisor in (None, 4):
        forcing = build({})
        batches = [rows(whole_batch(), 0, 2)]
        forcing.begin_accumulation(batches, divisor)
        losses.append(forcing(batches[0])[1]["align_loss"])
    torch.testing.assert_close(losses[1], 4 * losses[0])


def test_a_batch_that_was_not_announced_gets_its_own_alignment():
    """A new mapping of the announced tensors is the announced batch; another batch is not."""
    first, second = rows(whole_batch(), 0, 2), rows(whole_batch(), 2, 4)
    losses = []
    for announced, given in (
        ([second, first], second),
        ([second, first], dict(second)),
        ([first, second], second),
    ):
        forcing = build({})
        forcing.begin_accumulation(announced)
        _, metrics = forcing(given)
        losses.append((metrics["align_loss"], metrics["action_loss"]))
    assert losses[0] == losses[1] == losses[2]
