"""Controllers and the rate keeper, on a simulated clock."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest

from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.serving import (
    ActionChunkBroker,
    RateKeeper,
    RealTimeChunker,
    SafetyGate,
    TemporalEnsemble,
    run_episode,
)

CHUNK = 8


class Script:
    """Chunk n says n * 100 + row for every row; remembers its requests."""

    def __init__(self, chunk=CHUNK):
        self.requests, self.chunk = [], chunk

    def infer(self, observation):
        self.requests.append(observation)
        rows = 100 * (len(self.requests) - 1) + np.arange(self.chunk, dtype=np.float32)
        return {"actions": np.stack([rows, -rows], axis=1)}


class Clock:
    """Time that passes only when somebody sleeps, plus futures that finish at their time."""

    def __init__(self):
        self.now, self.waiting = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        for due, future, answer in list(self.waiting):
            if due <= self.now + 1e-9:
                self.waiting.remove((due, future, answer))
                future.set_result(answer)

    def submitter(self, seconds):
        """`submit` of an executor whose jobs take `seconds`; waiting for one lets the time pass."""
        clock = self

        class Late(Future):
            def result(self, timeout=None):
                if not self.done():
                    clock.sleep(next(due for due, future, _ in clock.waiting if future is self) - clock.now)
                return super().result(timeout)

        def submit(function, *arguments):
            future = Late()
            self.waiting.append((self.now + seconds, future, function(*arguments)))
            return future

        return submit


def first(actions):
    return [float(action[0]) for action in actions]


def test_the_broker_executes_so_many_actions_and_asks_again():
    script = Script()
    broker = ActionChunkBroker(script, execute=3)
    assert first(broker.act({"step": t}) for t in range(7)) == [0, 1, 2, 100, 101, 102, 200]
    assert [request["step"] for request in script.requests] == [0, 3, 6]
    broker.reset()
    assert broker.act({})[0] == 300
    with pytest.raises(ConfigError, match="execute is 9, but the policy's chunks hold 8"):
        ActionChunkBroker(script, execute=9).act({})
    with pytest.raises(ConfigError, match="execute is 0"):
        ActionChunkBroker(script, 0)


def test_the_ensemble_weighs_all_chunks_that_speak_about_a_step():
    ensemble = TemporalEnsemble(Script(chunk=3), decay=0.5)
    actions = first(ensemble.act({}) for _ in range(5))
    weights = np.exp(-0.5 * np.arange(3))

    def mean(values):
        return float(np.average(values, weights=weights[: len(values)]))

    # Step t: chunk t - 2 says its row 2, chunk t - 1 its row 1, chunk t its row 0; oldest first.
    expected = [0, mean([1, 100]), mean([2, 101, 200]), mean([102, 201, 300]), mean([202, 301, 400])]
    assert actions == pytest.approx(expected)
    ensemble.reset()
    assert ensemble.act({})[0] == 500
    with pytest.raises(ConfigError, match="decay is -1"):
        TemporalEnsemble(Script(), -1)


def played(chunker, clock, steps, hz=50):
    rate = RateKeeper(hz, clock=clock, sleep=clock.sleep)
    actions = []
    for step in range(steps):
        actions.append(chunker.act({"step": step}))
        rate.wait()  # here the command goes out
    return first(actions), rate


def test_real_time_chunking_never_waits_and_enters_each_chunk_at_its_delay():
    """At 50 Hz an inference of 50 ms lasts 3 steps: the chunk asked for at step 4 is entered at row 3."""
    clock, script = Clock(), Script()
    chunker = RealTimeChunker(script, execute=4, delay=2, submit=clock.submitter(0.05))
    actions, rate = played(chunker, clock, 15)
    assert actions[:11] == [0, 1, 2, 3, 4, 5, 6, 103, 104, 105, 203 - 100 + 3]
    assert (rate.misses, chunker.starved) == (0, 0)
    assert clock.now == pytest.approx(14 / 50)
    asked = script.requests[1]
    assert asked["step"] == 4
    np.testing.assert_array_equal(asked["rtc"]["previous"][:, 0], [4, 5, 6, 7])
    assert asked["rtc"]["delay"] == 2  # the forecast; afterwards the longest that was seen
    assert script.requests[2]["rtc"]["delay"] == 3
    assert max(chunker.delays) == 3


def test_a_slow_policy_starves_the_robot_and_that_is_counted():
    clock = Clock()
    chunker = RealTimeChunker(Script(), execute=4, submit=clock.submitter(0.2))
    actions, rate = played(chunker, clock, 14)
    assert actions[:8] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert actions[8] == 104  # asked for at step 4, four actions were executed since
    assert chunker.starved >= 1
    assert rate.misses >= 1
    # The second time: asked for at 0.26 s, needed four commands later (due at 0.34 s), there at 0.46 s.
    assert rate.worst == pytest.approx(0.12)


def test_policies_that_take_no_rtc_get_none():
    clock, script = Clock(), Script()
    chunker = RealTimeChunker(script, execute=2, guide=False, submit=clock.submitter(0.01))
    played(chunker, clock, 6)
    assert all("rtc" not in request for request in script.requests)


def test_executing_whole_chunks_still_works():
    clock, script = Clock(), Script()
    chunker = RealTimeChunker(script, execute=CHUNK, submit=clock.submitter(0.03))
    actions, rate = played(chunker, clock, 10)
    assert actions == [*range(8), 100, 101]
    assert chunker.starved == 1
    assert rate.misses == 1


def test_with_threads_of_its_own_and_errors_reach_the_loop():
    class Breaks(Script):
        def infer(self, observation):
            if self.requests:
                raise RuntimeError("the server is gone")
            return super().infer(observation)

    chunker = RealTimeChunker(Breaks(), execute=1)
    with pytest.raises(RuntimeError, match="the server is gone"):
        first(chunker.act({}) for _ in range(CHUNK + 1))
    chunker.reset()
    chunker.close()
    with pytest.raises(ConfigError, match="execute is 0"):
        RealTimeChunker(Script(), 0)


def test_reset_drops_an_inference_under_way():
    clock, script = Clock(), Script()
    submit = clock.submitter(0.05)

    def done_at_once(*arguments):
        future = submit(*arguments)
        clock.sleep(0.05)
        return future

    chunker = RealTimeChunker(script, execute=1, submit=done_at_once)
    chunker.act({})
    chunker.act({})
    chunker.reset()
    assert chunker.act({})[0] == 200  # a fresh chunk from row 0, not the dropped one


def test_the_rate_is_kept_without_drift():
    clock = Clock()
    rate = RateKeeper(50, clock=clock, sleep=clock.sleep)
    for step in range(1000):
        clock.now += 0.001 * (step % 19)  # work of 0 to 18 ms
        assert rate.wait()
    assert clock.now == pytest.approx(999 / 50)
    assert (rate.steps, rate.misses) == (1000, 0)


def test_misses_are_counted_and_not_caught_up_in_a_burst():
    clock = Clock()
    rate = RateKeeper(50, clock=clock, sleep=clock.sleep)
    times = []
    for work in (0.005, 0.095, 0.001, 0.001):
        clock.now += work
        rate.wait()
        times.append(clock.now)
    assert rate.misses == 1
    assert rate.worst == pytest.approx(0.075)
    assert times == pytest.approx([0.005, 0.1, 0.12, 0.14])
    with pytest.raises(ConfigError, match="0 Hz"):
        RateKeeper(0)


def test_the_gate_limits_range_and_change_and_stops_on_nonsense():
    class Says:
        def __init__(self, *actions):
            self.actions = [np.array(a, np.float32) for a in actions]

        def act(self, observation):
            return self.actions.pop(0)

        def reset(self):
            pass

    low, high = np.float32([-1, -1]), np.float32([1, 1])
    gate = SafetyGate(Says([0, 0], [0.5, 3], [0.6, 0.4], [np.nan, 0]), low, high, max_change=0.3)
    np.testing.assert_allclose([gate.act({}) for _ in range(3)], [[0, 0], [0.3, 0.3], [0.6, 0.4]])
    assert gate.limited == 1
    with pytest.raises(DataError, match="expected 2 finite numbers"):
        gate.act({})
    with pytest.raises(ConfigError, match=r"\[1\.0, 1\.0\] to \[-1\.0, -1\.0\]"):
        SafetyGate(Says(), high, low)


class Cart:
    """A robot that succeeds when its position passes 1000."""

    def reset(self, *, seed=None):
        self.position = float(seed)
        return {"state": np.float32([self.position])}, {}

    def step(self, action):
        self.position += float(action[0])
        return {"state": np.float32([self.position])}, 1.0, False, False, {"success": self.position > 1000}


def test_an_episode_runs_at_its_rate_until_success():
    clock, seen = Clock(), []
    rate = RateKeeper(50, clock=clock, sleep=clock.sleep)
    broker = ActionChunkBroker(Script(), 2)
    result = run_episode(
        Cart(), broker, rate, max_steps=100, seed=3, on_step=lambda o, a: seen.append((o["state"][0], a[0]))
    )
    assert seen[:4] == [(3, 0), (3, 1), (4, 100), (104, 101)]
    assert result.success
    assert (result.steps, result.misses, result.reward) == (len(seen), 0, len(seen))
    short = run_episode(Cart(), ActionChunkBroker(Script(), 2), rate, max_steps=3, seed=0)
    assert (short.steps, short.success) == (3, False)


def test_answers_without_actions_are_refused():
    class Mute:
        def infer(self, observation):
            return {"action": 1}

    with pytest.raises(DataError, match=r"expected \(chunk, action_dim\)"):
        ActionChunkBroker(Mute(), 1).act({})
