import json
import multiprocessing as mp

import numpy as np
import pytest
import torch

from spatial_forcing.errors import ConfigError, DataError, EnvironmentSetupError
from spatial_forcing.evaluation import WorkerPool, evaluate, read_results, rollout
from spatial_forcing.evaluation.workers import EpisodeSpec
from tests.evaluation.arena import SeekingPolicy, make_arena
from tests.fakes import FakeStudent

TASKS = ("easy", "hard")


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(2, make_arena) as shared:
        yield shared


@pytest.fixture(scope="module")
def lone():
    """For tests that break off: only one process has to be started again."""
    with WorkerPool(1, make_arena) as shared:
        yield shared


def run(policy, workers, **kwargs):
    defaults = {"tasks": TASKS, "episodes": 4, "seed": 0, "execute": 3, "make": make_arena, "progress": False}
    return evaluate(policy, workers=workers, **(defaults | kwargs))


def outcome(result):
    return [(e.task, e.seed, e.success, e.steps, e.reward) for e in result.episodes]


def test_every_episode_is_played_once_and_in_order(pool):
    result = run(SeekingPolicy(), pool)
    assert [(e.task, e.seed) for e in result.episodes] == [(t, s) for t in TASKS for s in range(4)]
    assert result.errors == ()
    assert result.per_task["easy"].value == 1.0
    assert result.per_task["hard"].value < 1.0
    assert result.success.trials == 8
    assert result.steps_run == sum(e.steps for e in result.episodes)
    assert 0 < result.busy <= 1
    assert all(e.steps <= 20 and e.sim_seconds > 0 for e in result.episodes)
    assert mp.active_children()  # a lent pool stays open


def test_results_do_not_depend_on_workers_slots_or_batching(pool):
    batched = SeekingPolicy()
    expected = outcome(run(batched, pool))
    assert max(batched.batches) > 1
    assert outcome(run(SeekingPolicy(), pool, batch_size=1)) == expected
    with WorkerPool(1, make_arena, slots=1) as alone:
        single = SeekingPolicy()
        assert outcome(run(single, alone)) == expected
    assert set(single.batches) == {1}
    assert sum(batched.batches) == sum(single.batches)


def test_fresh_processes_play_one_task_each_with_the_same_results(pool):
    expected = outcome(run(SeekingPolicy(), pool))
    processes = {}
    with WorkerPool(1, make_arena, slots=1, fresh=True) as alone:
        start = alone.start

        def noting(seat, spec):
            start(seat, spec)
            processes.setdefault(spec.task, set()).add(alone._workers[seat.worker].process.pid)

        alone.start = noting
        assert outcome(run(SeekingPolicy(), alone)) == expected
    assert [len(pids) for pids in processes.values()] == [1, 1]
    assert len(set.union(*processes.values())) == 2
    with pytest.raises(ConfigError, match="slots=1"):
        WorkerPool(1, make_arena, fresh=True)


def test_a_policy_that_misses_the_goal_fails(pool):
    assert run(SeekingPolicy(bias=-0.9), pool).success.value == 0


def test_a_module_is_evaluated_in_eval_mode_and_put_back(pool):
    class Student(FakeStudent):
        def act(self, observations, generator=None):
            modes.append((self.training, len(observations)))
            return super().act(observations, generator)

    modes = []
    student = Student(state_dim=1, action_dim=1, chunk=4).train()
    run(student, pool, tasks=("hard",), episodes=2)
    assert set(modes) == {(False, 1)}  # on the CPU single calls: exact whatever the number of workers
    assert student.training


def test_an_interrupted_evaluation_resumes(tmp_path, pool):
    out = tmp_path / "episodes.jsonl"
    tags = {"arm": "sf", "step": 500}
    whole = run(SeekingPolicy(), pool, out=out, tags=tags)
    rows = out.read_text().splitlines(keepends=True)
    assert len(rows) == 8
    out.write_text("".join(rows[:5]) + rows[5][:20])
    again = run(SeekingPolicy(), pool, out=out, tags=tags)
    assert outcome(again) == outcome(whole)
    assert again.steps_run < whole.steps_run
    assert len(out.read_text().splitlines()) == 8
    finished = SeekingPolicy()
    assert outcome(run(finished, pool, out=out, tags=tags)) == outcome(whole)
    assert finished.batches == []


def test_an_exception_in_the_policy_loses_no_finished_episode(tmp_path, lone):
    class Breaking(SeekingPolicy):
        def act(self, observations, generator=None):
            if len(self.batches) == 12:
                raise KeyboardInterrupt
            return super().act(observations, generator)

    out = tmp_path / "episodes.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(Breaking(), lone, out=out)
    kept = read_results(out)
    expected = outcome(run(SeekingPolicy(), lone))
    assert 0 < len(kept) < 8
    assert outcome(run(SeekingPolicy(), lone, out=out)) == expected


def test_other_tags_are_other_episodes_and_other_settings_are_refused(tmp_path, pool):
    out = tmp_path / "episodes.jsonl"
    run(SeekingPolicy(), pool, out=out, episodes=2, tags={"step": 1})
    run(SeekingPolicy(), pool, out=out, episodes=2, tags={"step": 2})
    assert len(read_results(out)) == 8
    before = out.read_bytes()
    with pytest.raises(ConfigError, match=r"'execute': 3.*'execute': 2"):
        run(SeekingPolicy(), pool, out=out, episodes=2, tags={"step": 2}, execute=2)
    assert out.read_bytes() == before


def test_a_dead_worker_costs_one_repetition(tmp_path):
    kwargs = {"marker": str(tmp_path / "died")}
    result = run(SeekingPolicy(), 1, tasks=("kill-once",), env_kwargs=kwargs)
    assert (tmp_path / "died").exists()
    assert [e.seed for e in result.episodes] == [0, 1, 2, 3]
    assert result.errors == ()


def test_an_episode_that_dies_twice_is_an_error_not_a_failure(tmp_path):
    out = tmp_path / "episodes.jsonl"
    kwargs = {"marker": str(tmp_path / "died")}
    result = run(SeekingPolicy(), 1, tasks=("kill-always", "raise"), env_kwargs=kwargs, out=out, episodes=3)
    assert [(e.task, e.seed) for e in result.errors] == [("kill-always", 1), ("raise", 1)]
    by_task = {e.task: e.message for e in result.errors}
    assert "exit code 7" in by_task["kill-always"]
    assert "the renderer is gone" in by_task["raise"]
    assert [e.seed for e in result.episodes] == [0, 2, 0, 2]
    assert len(read_results(out)) == 4


def test_a_worker_that_dies_while_it_waits_is_to_blame():
    """Its question and its end are found together: it must not be taken for another's victim for ever."""
    others = set(mp.active_children())
    with WorkerPool(1, make_arena, slots=1) as pool:
        pool.start(pool.free_seats()[0], EpisodeSpec("idle", 0, 3))
        (worker,) = set(mp.active_children()) - others
        worker.join(60)
        ((_, spec, report),) = pool.receive()
    assert spec.task == "idle"
    assert not report.bystander
    assert "exit code 9" in report.message


def test_no_episode_at_all_is_refused(lone):
    with pytest.raises(EnvironmentSetupError, match="the renderer is gone"):
        run(SeekingPolicy(), lone, tasks=("raise",), seed=1, episodes=1)


def test_a_broken_environment_stops_early(pool, monkeypatch):
    monkeypatch.setattr(rollout, "HOPELESS", 2)
    tried = SeekingPolicy()
    with pytest.raises(EnvironmentSetupError, match=r"broken seed \d+ failed twice"):
        run(tried, pool, tasks=("broken",), episodes=50)
    assert tried.batches == []


def test_an_error_that_the_user_must_mend_arrives_as_it_is(lone):
    with pytest.raises(ConfigError, match="unknown task 'refused'"):
        run(SeekingPolicy(), lone, tasks=("refused",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ()}, "at least one task"),
        ({"tasks": ("easy", "easy")}, "each once"),
        ({"episodes": 0}, "episodes is 0"),
        ({"execute": 0}, "execute is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"videos": 1}, "give `out`"),
        ({"execute": 9}, "chunks of 4"),
    ],
)
def test_bad_settings_are_refused(lone, change, message):
    with pytest.raises(ConfigError, match=message):
        run(SeekingPolicy(), lone, **change)


@pytest.mark.parametrize(("workers", "slots"), [(0, 1), (1, 0)])
def test_an_empty_pool_is_refused(workers, slots):
    with pytest.raises(ConfigError, match="1 or more"):
        WorkerPool(workers, make_arena, slots=slots)


def test_bad_actions_never_reach_an_environment(lone):
    class Bad(SeekingPolicy):
        def act(self, observations, generator=None):
            return self.damage(super().act(observations, generator))

    policy = Bad()
    policy.damage = lambda actions: actions * float("nan")
    with pytest.raises(DataError, match="not finite"):
        run(policy, lone)
    policy.damage = lambda actions: torch.cat([actions, actions])
    with pytest.raises(DataError, match="observations"):
        run(policy, lone)
    assert len(run(SeekingPolicy(), lone).episodes) == 8  # the pool is clean again


def test_the_first_episodes_of_each_task_are_filmed(tmp_path, pool):
    out = tmp_path / "episodes.jsonl"
    filmed = run(SeekingPolicy(), pool, out=out, videos=1, tags={"step": 3})
    assert outcome(filmed) == outcome(run(SeekingPolicy(), pool))
    videos = {(e.task, e.seed): e.video for e in filmed.episodes if e.video}
    assert set(videos) == {("easy", 0), ("hard", 0)}
    assert all((tmp_path / video).stat().st_size > 0 for video in videos.values())
    row = json.loads(out.read_text().splitlines()[0])
    assert row["tags"] == {"step": 3}
    assert row["setup"] == {"execute": 3, "env": {}}
    assert row["threads"] == torch.get_num_threads()


def test_states_and_images_reach_the_policy_as_arrays(pool):
    seen = []

    class Looking(SeekingPolicy):
        def act(self, observations, generator=None):
            seen.extend(observations)
            return super().act(observations, generator)

    run(Looking(), pool, tasks=("easy",), episodes=1)
    assert seen[0]["task"] == "easy"
    assert {c: i.shape for c, i in seen[0]["images"].items()} == {"front": (8, 8, 3), "wrist": (8, 8, 3)}
    assert seen[0]["state"].dtype == np.float32
