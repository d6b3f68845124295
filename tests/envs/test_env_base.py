"""What every simulator asks of `reset` and `step`."""

from __future__ import annotations

import numpy as np
import pytest

from spatial_forcing.envs.base import EVALUATION_SEEDS, check_step, episode_start
from spatial_forcing.errors import ConfigError, DataError

LOW, HIGH = np.full(2, -4, np.float32), np.full(2, 4, np.float32)


class Clock:
    task, horizon = "reach-v3", 3


def test_an_initial_state_is_an_evaluation_seed():
    assert episode_start(7, None) == (7, None)
    assert episode_start(None, {}) == (None, None)
    assert episode_start(7, {"init_state": 4}) == (EVALUATION_SEEDS[4], 4)


@pytest.mark.parametrize("index", [-1, 50, "4", 4.0, None])
def test_an_initial_state_that_is_not_there(index):
    with pytest.raises(ConfigError, match="expected an integer from 0 to 49"):
        episode_start(None, {"init_state": index}, count=50)


def test_another_option():
    with pytest.raises(ConfigError, match="Did you mean 'init_state'"):
        episode_start(None, {"init_stat": 1})


def test_an_action_in_time_is_taken_as_float32():
    taken = check_step(np.array([1, 2]), LOW, HIGH, Clock(), 2)
    assert taken.dtype == np.float32
    assert taken.tolist() == [1, 2]


@pytest.mark.parametrize(("steps", "state"), [(None, "has not begun"), (3, "was truncated after 3 steps")])
def test_an_action_out_of_time(steps, state):
    with pytest.raises(ConfigError, match=rf"reach-v3 {state}; call reset\(\)"):
        check_step(np.zeros(2), LOW, HIGH, Clock(), steps)


@pytest.mark.parametrize("action", [np.zeros(3), np.zeros((1, 2)), [0, np.nan], [np.inf, 0]])
def test_an_action_of_another_kind(action):
    with pytest.raises(DataError, match=r"for reach-v3; expected 2 finite numbers in \[-4, 4\]"):
        check_step(action, LOW, HIGH, Clock(), 0)
