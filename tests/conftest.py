"""Fixtures and rules for every test."""

from __future__ import annotations

import os

import pytest
import torch

# Two cores are shared by worker processes in several tests; more threads than cores only wait for each other.
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
