"""Fixtures and rules for every test."""

from __future__ import annotations

import os

# One thread, here and in every process that a test starts: results that are compared bit for bit depend on
# the number of threads, and workers that share two cores only wait for each other. Before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A golden test that is skipped is a failure: parity with the original is never optional."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and item.get_closest_marker("golden") is not None and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: golden tests are never skipped ({report.longrepr})"
