"""Open-loop error: how far predicted actions are from those of demonstrations that were not trained on.

It needs no simulator and no robot, and varies far less over training seeds than success does. It says how
well demonstrations are predicted, not how often a task is solved: errors that a policy makes where no
demonstration has been are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from spatial_forcing.data import Dataset
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.evaluation.rollout import Policy
from spatial_forcing.protocols import Observation

CONSTANT = 1e-6
"""Standard deviation below which a dimension of the action counts as constant and is left out."""


def open_loop_errors(
    policy: Policy,
    dataset: Dataset,
    episodes: Sequence[int],
    *,
    cameras: Sequence[str],
    execute: int = 8,
    frames: int = 16,
    batch_size: int = 32,
) -> dict[tuple[str, int], float]:
    """Mean absolute error of the actions that would be carried out, by (instruction, episode).

    In standard deviations of the dataset's actions, a mean over the dimensions that vary, the first `execute`
    actions of a chunk (fewer at the end of an episode), and `frames` frames spread evenly over each episode.
    A policy that samples draws its noise from the frame's index, so that two policies meet the same noise.

    Args:
        policy: in evaluation mode.
        dataset: with the policy's cameras and sizes.
        episodes: their numbers.
        cameras: what the policy sees.
        execute, frames, batch_size: see above.

    Raises:
        ConfigError: no episode, or `execute` or `frames` below 1.
        DataError: no dimension of the action varies, or the policy's actions have another size.
    """
    if not episodes or execute < 1 or frames < 1:
        raise ConfigError(
            f"open-loop error over {len(episodes)} episodes, {frames} frames of each and {execute} actions "
            "of a chunk; each must be at least 1."
        )
    scale = dataset.action.std(0)
    if not (scale > CONSTANT).any():
        raise DataError(f"no dimension of the actions in {dataset.root} varies; there is nothing to predict.")
    chosen = [(number, index) for number in episodes for index in _spread(dataset, number, frames)]
    found: dict[int, list[float]] = {number: [] for number in episodes}
    for start in range(0, len(chosen), batch_size):
        part = chosen[start : start + batch_size]
        seen = [_observation(dataset, index, cameras) for _, index in part]
        noise = [torch.Generator().manual_seed(index) for _, index in part]
        for (number, index), chunk in zip(part, policy.act(seen, noise).numpy(), strict=True):
            truth = dataset.action[index : min(index + execute, dataset.episodes[number].stop)]
            found[number].append(_error(chunk[: len(truth)], truth[: len(chunk)], scale))
    return {(dataset.episodes[n].task, n): float(np.mean(errors)) for n, errors in found.items()}


def _spread(dataset: Dataset, number: int, frames: int) -> list[int]:
    episode = dataset.episodes[number]
    even = np.linspace(episode.start, episode.stop - 1, min(frames, episode.length))
    return [int(index) for index in even.round()]


def _observation(dataset: Dataset, index: int, cameras: Sequence[str]) -> Observation:
    images = {camera: dataset.image(index, camera) for camera in cameras}
    return {"images": images, "state": dataset.state[index], "task": dataset.episode_of(index).task}


def _error(chunk: NDArray[np.float32], truth: NDArray[np.float32], scale: NDArray[np.float32]) -> float:
    if chunk.shape != truth.shape:
        raise DataError(
            f"the policy predicts actions of {chunk.shape[-1]} numbers, the dataset holds {truth.shape[-1]}; "
            "give the dataset that it was trained for."
        )
    varies = scale > CONSTANT
    return float((np.abs(chunk - truth)[:, varies] / scale[varies]).mean())
