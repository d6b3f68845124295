"""Peak memory is what the measured call needs, whatever the process held before."""

from __future__ import annotations

import numpy as np
import pytest

from spatial_forcing import memory

MB = 2**20


def needs(megabytes):
    """A call that touches that much memory for a moment."""
    return lambda: np.ones(megabytes * MB, np.uint8).sum()


def loaded_in_parts():
    """Many freed blocks of a size that the heap keeps, with one that lives on at its end."""
    parts = [np.ones(MB // 16, np.uint8) for _ in range(16 * 200)]
    last = parts[-1]
    del parts
    return last


@pytest.mark.parametrize("permitted", [True, False])
def test_an_earlier_peak_does_not_hide_a_later_one(monkeypatch, permitted):
    if not permitted:
        monkeypatch.setattr(memory, "_reset_mark", lambda: False)
    needs(300)()
    kept = loaded_in_parts()
    for megabytes in (60, 120):
        found = memory.peak_over(needs(megabytes)) / MB
        assert 0.9 * megabytes < found < megabytes + 40
    assert kept.size


def test_small_parts_count_too():
    kept = loaded_in_parts()
    found = memory.peak_over(loaded_in_parts) / MB
    assert 150 < found < 260
    assert kept.size
