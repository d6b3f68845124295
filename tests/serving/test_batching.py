"""Which requests share a call of the policy, by counts; the clock is out of it."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from spatial_forcing.serving import batching
from spatial_forcing.serving.batching import Batcher
from spatial_forcing.serving.metrics import Counters

CHUNK = np.zeros((2, 3), np.float32)


class Policy:
    """Notes its batches."""

    def __init__(self, seconds=0.0):
        self.batches, self.seconds = [], seconds

    def act(self, requests):
        time.sleep(self.seconds)
        self.batches.append(list(requests))
        return [CHUNK] * len(requests)


def run(scenario, max_batch=16, seconds=0.0):
    """`await scenario(ask)`; `ask(*names)` lets clients ask together. The batches that were computed."""
    policy = Policy(seconds)

    async def main():
        batcher = Batcher(policy.act, Counters(), max_batch)

        async def ask(*names, apart=0.0):
            waiting = []
            for name in names:
                waiting.append(batcher.submit(name, client=name))
                await asyncio.sleep(apart)
            return await asyncio.gather(*waiting)

        try:
            await asyncio.wait_for(scenario(ask), 30)
        finally:
            batcher.close()

    asyncio.run(main())
    return policy.batches


@pytest.fixture
def patient(monkeypatch):
    """Waits are long enough for a slow machine."""
    monkeypatch.setattr(batching, "GATHER_PART", 1e9)
    monkeypatch.setattr(batching, "GATHER_SECONDS", 0.5)


async def in_lock_step(ask, names, rounds):
    """Each client asks again as soon as it is answered, one a little later than the other."""

    async def client(number, name):
        for _ in range(rounds):
            await asyncio.sleep(0.003 * number)
            await ask(name)

    await asyncio.gather(*(client(number, name) for number, name in enumerate(names)))


@pytest.mark.parametrize("seconds", [0.5, 0.0])
def test_clients_in_lock_step_share_their_batches(patient, monkeypatch, seconds):
    monkeypatch.setattr(batching, "GATHER_SECONDS", seconds)
    batches = run(lambda ask: in_lock_step(ask, "abcd", 12), seconds=0.03)
    assert sum(map(len, batches)) == 48
    if seconds:
        assert [sorted(batch) for batch in batches].count(list("abcd")) >= 8
    else:  # so the wait is what brings them together
        assert len(batches) > 18


def test_a_full_batch_waits_for_nobody(patient):
    # The call takes longer than the clients are apart, so that some wait while it runs.
    batches = run(lambda ask: in_lock_step(ask, "abcd", 6), max_batch=2, seconds=0.03)
    assert max(map(len, batches)) == 2
    assert sum(map(len, batches)) == 24


def test_batches_of_one_never_wait(patient):
    async def scenario(ask):
        for _ in range(3):
            await ask(*"ab", apart=0.01)

    assert run(scenario, max_batch=1) == [["a"], ["b"]] * 3


def test_waits_that_bring_nobody_are_rare(monkeypatch):
    """Two robots out of step cost no wait, a client that left costs one."""
    monkeypatch.setattr(batching, "GATHER_SECONDS", 0.001)
    monkeypatch.setattr(batching, "GATHER_PART", 1e9)
    waits = []
    take = Batcher._take

    def counted(self, batch, seconds=0.0):
        if seconds:
            waits.append(batch[0].client)
        return take(self, batch, seconds)

    monkeypatch.setattr(Batcher, "_take", counted)

    async def scenario(ask):
        await ask("warm-up")
        await asyncio.gather(ask("a"), ask("b"))
        for _ in range(50):
            await ask("a")
            await ask("b")

    assert len(run(scenario)) >= 101
    assert len(waits) <= 2


def test_a_lone_client_is_never_held_back(patient, monkeypatch):
    take = Batcher._take

    def unhurried(self, batch, seconds=0.0):
        assert seconds == 0, "waited"
        return take(self, batch, seconds)

    monkeypatch.setattr(Batcher, "_take", unhurried)

    async def scenario(ask):
        for _ in range(5):
            await ask("a")

    assert run(scenario) == [["a"]] * 5
