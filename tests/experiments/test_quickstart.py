from __future__ import annotations

import pytest

from spatial_forcing.data.record import SEED_STRIDE, RecordConfig
from spatial_forcing.envs.base import DEMONSTRATION_SEEDS, EVALUATION_SEEDS
from spatial_forcing.errors import ConfigError
from spatial_forcing.experiments.config import cells, evaluated_steps, train_config
from spatial_forcing.experiments.quickstart import (
    CONTROL,
    PROBE_FIRST_SEED,
    QuickstartConfig,
    rebuild_report,
    smoke,
)
from spatial_forcing.nano_teacher.tasks import TRAIN_TASKS, check_held_out
from spatial_forcing.training.fields import from_plain, to_plain


@pytest.mark.parametrize("name", ["demos", "steps", "episodes", "workers", "horizon", "probe_demos"])
def test_counts_must_be_positive(name):
    with pytest.raises(ConfigError, match=f"quickstart.{name} is 0"):
        QuickstartConfig(**{name: 0})


def test_checkpoints_are_evenly_spaced_and_end_at_the_last_step():
    config = QuickstartConfig(steps=90, evaluations=3, episodes=10).comparison
    checkpoints = evaluated_steps(90, config.checkpoints)
    assert checkpoints == (30, 60, 90)
    assert [config.episodes_at(step, 90) for step in checkpoints] == [5, 5, 10]
    with pytest.raises(ConfigError, match=r"100.*\(3\)"):
        QuickstartConfig(steps=100, evaluations=3)


def test_settings_survive_json():
    config = QuickstartConfig(steps=90, evaluations=3)
    assert from_plain(QuickstartConfig, to_plain(config)) == config


def test_demonstration_probe_and_evaluation_episodes_are_disjoint():
    config = QuickstartConfig()
    attempts = [range(k * SEED_STRIDE, k * SEED_STRIDE + config.demos) for k in range(10)]
    probes = [
        range(a.start + PROBE_FIRST_SEED, a.start + PROBE_FIRST_SEED + config.probe_demos) for a in attempts
    ]
    used = {seed for part in attempts + probes for seed in part}
    assert len(used) == 10 * (config.demos + config.probe_demos)
    assert used <= set(DEMONSTRATION_SEEDS)
    first = config.comparison.first_episode
    assert first in EVALUATION_SEEDS
    assert not used & set(range(first, first + config.episodes))


def test_no_quickstart_task_taught_the_teacher():
    assert QuickstartConfig().tasks
    check_held_out(QuickstartConfig().tasks)
    with pytest.raises(ConfigError, match=TRAIN_TASKS[0]):
        check_held_out((*QuickstartConfig().tasks, TRAIN_TASKS[0]))


def test_arms_differ_only_in_what_they_are_named_for(tmp_path):
    config = smoke(tmp_path).comparison
    cache = {"vggt-nano": tmp_path / "features"}
    plain = {c.arm.name: train_config(config, c, cache).to_plain() for c in cells(config)}
    assert {name: run.pop("output").rpartition("/")[2] for name, run in plain.items()} == {
        name: f"{name}-seed0" for name in ("alpha0", "SF", "blind")
    }
    base = plain.pop(CONTROL)
    differing = {name: {key for key in base if base[key] != other[key]} for name, other in plain.items()}
    assert differing == {"SF": {"forcing", "teacher", "cache"}, "blind": {"student"}}


def test_a_report_is_made_again_only_of_a_quickstart(tmp_path):
    with pytest.raises(ConfigError, match=r"quickstart\.json does not exist"):
        rebuild_report(tmp_path)


def test_the_smoke_variant_can_be_probed(tmp_path):
    """The depth probe needs four episodes, and every recording names its seeds."""
    config = smoke(tmp_path)
    assert len(config.tasks) * config.probe_demos >= 4
    RecordConfig(tmp_path, config.tasks, episodes_per_task=config.probe_demos, first_seed=PROBE_FIRST_SEED)
