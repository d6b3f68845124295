from __future__ import annotations

import io

import pytest
from rich.console import Console

from spatial_forcing.quickstart.stages import Stages, digest


def stages(folder):
    return Stages(folder, Console(file=io.StringIO()))


def test_a_finished_stage_is_not_run_again(tmp_path):
    calls = []

    def work(output):
        calls.append(output)
        return {"frames": 3}

    assert stages(tmp_path).run("record", {"demos": 2}, work) == {"frames": 3}
    again = stages(tmp_path)
    assert again.run("record", {"demos": 2}, work) == {"frames": 3}
    assert len(calls) == 1
    assert again.seconds["record"] >= 0


def test_other_inputs_get_another_folder(tmp_path):
    runner = stages(tmp_path)
    outputs = []
    for demos in (2, 3):
        runner.run("record", {"demos": demos}, lambda output: outputs.append(output) or {})
    assert outputs[0] != outputs[1]


def test_an_interrupted_stage_leaves_no_stamp(tmp_path):
    def interrupted(output):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages(tmp_path).run("train", {}, interrupted)
    assert stages(tmp_path).run("train", {}, lambda output: {"ok": True}) == {"ok": True}


def test_digest_ignores_the_order_of_keys():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
