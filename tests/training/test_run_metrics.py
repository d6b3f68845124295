"""Metrics between the step and the file, and what a person sees."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from spatial_forcing.errors import DataError
from spatial_forcing.training import DivergedError, read_metrics
from spatial_forcing.training.metrics import Meter, MetricLog
from spatial_forcing.training.progress import TrainingProgress


def scalar(value):
    return torch.tensor(float(value))


def test_a_line_averages_micro_batches_then_steps():
    meter = Meter(lambda tensor: tensor)
    two = [{"cosine": scalar(0.2)}, {"cosine": scalar(0.4)}]
    meter.add(0, [scalar(1), scalar(3)], two, scalar(5), [None, None])
    meter.add(1, [scalar(4)], [{"other": scalar("nan")}], scalar(7), [None])
    assert meter.sync() is False
    assert meter.line() == pytest.approx({"loss": 3, "grad_norm": 6, "cosine": 0.3})
    assert meter.rows == []


def test_metrics_and_the_wish_to_stop_share_one_reduction():
    calls = []

    def mean_with_a_rank_that_stops(tensor):
        calls.append(len(tensor))
        other = torch.zeros_like(tensor)
        other[-1] = 1
        return (tensor + other) / 2

    meter = Meter(mean_with_a_rank_that_stops)
    meter.add(0, [scalar(1)], [{}], scalar(2), [None])
    meter.add(1, [scalar(3)], [{}], scalar(4), [None])
    assert meter.sync(stop=False) is True
    assert len(calls) == 1
    assert meter.line() == {"loss": 1.0, "grad_norm": 1.5}


def test_another_ranks_nan_stops_this_rank_and_names_that_batch():
    meter = Meter(lambda tensor: tensor * float("nan"), gather=lambda own: [*own, [40, 41]])
    meter.add(7, [scalar(1)], [{}], scalar(2), [torch.tensor([3, 4])])
    with pytest.raises(DivergedError, match=r"step 7: .* dataset indices \[40, 41\]\."):
        meter.sync()


def test_an_infinite_gradient_of_a_finite_loss_is_told_apart():
    meter = Meter(lambda tensor: tensor)
    meter.add(2, [scalar(1)], [{}], scalar("inf"), [torch.tensor([3])])
    with pytest.raises(DivergedError, match=r"gradient norm inf although every loss was finite"):
        meter.sync()


def test_lines_after_the_checkpoint_are_cut_when_resuming(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path, 0)
    for step in (10, 20, 30):
        log.write({"step": step, "loss": 1.5})
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30]
    MetricLog(path, 20).write({"step": 30, "loss": 2.5})
    assert read_metrics(path) == [
        {"step": 10, "loss": 1.5},
        {"step": 20, "loss": 1.5},
        {"step": 30, "loss": 2.5},
    ]
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read_metrics(path)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_loss_cosine_and_time_left(terminal):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=120)
    with TrainingProgress("train a", 0, 4, True, console) as bar:
        bar.update(3)
        bar.update(4, {"loss": 0.25, "cosine": 0.5})
    assert "4/4" in shown.getvalue()
    assert "loss 0.2500, cosine 0.500" in shown.getvalue()
    assert ("s left" in shown.getvalue()) is not terminal


def test_hidden_progress_prints_nothing():
    shown = io.StringIO()
    with TrainingProgress("train a", 0, 4, False, Console(file=shown)) as bar:
        bar.update(4, {"loss": 0.25})
    assert shown.getvalue() == ""
