from __future__ import annotations

import numpy as np
import pytest

from spatial_forcing.analysis.probe import ProbeMetrics, ProbeResult
from spatial_forcing.envs.base import DEMONSTRATION_SEEDS, EVALUATION_SEEDS
from spatial_forcing.errors import ConfigError
from spatial_forcing.experiments.config import cells, evaluated_steps, train_config
from spatial_forcing.experiments.quickstart import (
    FIRST_STATE,
    QuickstartConfig,
    depth_contrasts,
    long,
    rebuild_report,
    smoke,
)
from spatial_forcing.experiments.run import Run
from spatial_forcing.training.fields import from_plain, to_plain
from spatial_forcing.training.parts import share_of


@pytest.mark.parametrize("name", ["demos", "steps", "episodes", "workers", "horizon", "checkpoints"])
def test_counts_must_be_positive(name):
    with pytest.raises(ConfigError, match=f"quickstart.{name} is 0"):
        QuickstartConfig(**{name: 0})


def test_checkpoints_are_evenly_spaced_and_end_at_the_last_step():
    config = QuickstartConfig(steps=90, checkpoints=3).comparison
    assert evaluated_steps(90, config.checkpoints) == (30, 60, 90)
    with pytest.raises(ConfigError, match=r"100.*\(3\)"):
        QuickstartConfig(steps=100, checkpoints=3)
    with pytest.raises(ConfigError, match=r"held_out is 1\.0"):
        QuickstartConfig(held_out=1.0)


def test_settings_survive_json():
    config = QuickstartConfig(steps=90, checkpoints=3, seeds=(7, 8))
    assert from_plain(QuickstartConfig, to_plain(config)) == config


def test_demonstration_and_evaluation_episodes_are_disjoint():
    config = QuickstartConfig()
    first = config.comparison.first_episode
    assert first == EVALUATION_SEEDS[FIRST_STATE]
    assert set(range(first, first + config.episodes)) <= set(EVALUATION_SEEDS)
    assert not set(EVALUATION_SEEDS) & set(DEMONSTRATION_SEEDS)
    assert set(range(config.demonstrations.first_seed, config.demos)) <= set(DEMONSTRATION_SEEDS)


def test_the_long_one_can_show_a_difference_of_success():
    """Seeds that all agree are no stronger than Barnard's exact test: 2 x 4^-S, times the differences."""
    longer = long(QuickstartConfig())
    assert 2 * 4.0 ** -len(longer.seeds) * (len(longer.arms) - 1) < 0.05
    assert longer.episodes >= 20


def test_arms_differ_only_in_what_they_are_named_for(tmp_path):
    config = long(smoke(tmp_path)).comparison
    cache = {"vggt-nano": tmp_path / "features"}
    plain = {c.arm.name: train_config(config, c, cache).to_plain() for c in cells(config) if c.seed == 200}
    assert {name: run.pop("output").rpartition("/")[2] for name, run in plain.items()} == {
        name: f"{name}-seed200" for name in ("alpha0", "sf", "shuffled")
    }
    base = plain.pop("alpha0")
    differing = {name: {key for key in base if base[key] != other[key]} for name, other in plain.items()}
    assert differing == {name: {"forcing", "teacher", "cache"} for name in ("sf", "shuffled")}


def test_a_report_is_made_again_only_of_a_quickstart(tmp_path):
    with pytest.raises(ConfigError, match=r"quickstart\.json does not exist"):
        rebuild_report(tmp_path)


def test_the_smoke_variant_can_be_probed(tmp_path):
    """The depth probe needs four episodes: to fit, to tune and to measure on."""
    config = smoke(tmp_path)
    assert config.demos >= 4
    assert config.demos - share_of(config.held_out, config.demos) >= 2


def test_depth_at_the_aligned_layer_is_paired_by_training_seed(tmp_path):
    config = smoke(tmp_path).comparison
    runs = [Run(cell, train_config(config, cell)) for cell in cells(config)]
    rng = np.random.default_rng(0)
    metrics = []
    for run in runs:
        level = 0.1 if run.cell.arm.name == "sf" else 0.2
        for layer, factor in ((2, 5.0), (3, 1.0)):  # the other layer must not count
            errors = tuple(float(v) for v in factor * level * (1 + 0.01 * rng.standard_normal(4)))
            metrics.append(
                ProbeMetrics(
                    run.cell.name, "student", layer, "all", 0.0, 0.0, 0.0, 0.0, None, per_episode=errors
                )
            )
    probed = ProbeResult(tuple(metrics), (), 8, 4, 4, 3.0, 1.0)
    (contrast,) = depth_contrasts(probed, runs, 3, config.control_titles)
    assert (contrast.arm, contrast.control) == ("spatial forcing", "no alignment")
    assert contrast.difference.value == pytest.approx(-0.5, abs=0.02)
    assert contrast.difference.seeds == len(config.seeds)
