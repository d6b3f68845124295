"""The command: what it prints, writes and returns, and every way in which a factory can be named wrongly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spatial_forcing import cli
from spatial_forcing.doctor import Subject, load_subject
from spatial_forcing.errors import ConfigError

TOYS = str(Path(__file__).parent / "toys.py")


def run(*arguments):
    """Exit status."""
    try:
        cli.main(["doctor", *arguments])
    except SystemExit as done:
        return done.code
    return 0


def test_a_healthy_model(tmp_path, capsys):
    file = tmp_path / "found.json"
    assert run(f"{TOYS}:healthy", "--teacher-dim", "16", "--json", str(file)) == 0
    shown, found = capsys.readouterr().out, json.loads(file.read_text())
    assert "6 of 6 checks passed" in shown
    assert found["adapter"] in shown
    assert found["ok"]
    assert [check["state"] for check in found["checks"]] == ["pass"] * 6
    assert found["facts"]["layer"] == 3
    assert found["facts"]["positions"][1][0][0] == 17


def test_a_failed_check_exits_with_one(capsys):
    assert run(f"{TOYS}:frozen", "--teacher-dim", "16") == 1
    shown = capsys.readouterr().out
    assert "5. gradient path  FAIL" in shown
    assert "Unfreeze blocks 0..2" in shown
    assert "a check failed" in shown


def test_options_reach_the_doctor(capsys):
    options = ["--teacher-dim", "16", "--layer", "2", "--blocks", "layers", "--image-key", "pixel_values"]
    assert run(f"{TOYS}:pair", *options, "--grid", "4", "4") == 0
    assert "after 2 of 4 blocks" in capsys.readouterr().out


def test_bad_numbers_exit_with_two(capsys):
    assert run(f"{TOYS}:healthy", "--teacher-dim", "0") == cli.USER_ERROR
    assert "--teacher-dim is 0" in capsys.readouterr().err


WRONG = {
    "no colon": ("toys.py", "MODULE:FACTORY or FILE.py:FACTORY"),
    "no file": (TOYS.replace("toys", "toy") + ":healthy", "there is no file .*Did you mean .*toys.py"),
    "no module": ("no_such_module:healthy", "there is no module 'no_such_module'"),
    "no function": (f"{TOYS}:helthy", "Did you mean 'healthy'"),
    "not a function": (f"{TOYS}:SIZE", "is a int, not a function"),
    "arguments": (f"{TOYS}:needs", "needs the arguments argument"),
    "raises": (f"{TOYS}:breaks", "RuntimeError: no weights"),
    "nothing": (f"{TOYS}:nothing", "returned a NoneType; expected a Subject"),
}


@pytest.mark.parametrize(("target", "message"), WRONG.values(), ids=WRONG)
def test_wrong_factories_are_told_apart(target, message):
    with pytest.raises(ConfigError, match=message):
        load_subject(target)


def test_a_module_is_found_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_vla_of_the_doctor_test.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Linear(1, 1), {}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_subject("my_vla_of_the_doctor_test:build").model, torch.nn.Linear)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    with pytest.raises(ConfigError, match=r"broken.py cannot be imported: ModuleNotFoundError"):
        load_subject(f"{tmp_path / 'broken.py'}:build")


def test_subjects_are_checked():
    with pytest.raises(ConfigError, match=r"model is a str.*nn\.Module"):
        Subject("model", {})
    with pytest.raises(ConfigError, match=r"batch is a list"):
        Subject(torch.nn.Linear(1, 1), [1])
    with pytest.raises(ConfigError, match=r"pixels, \(B, V, 3, H, W\)"):
        Subject(torch.nn.Linear(1, 1), lambda images: {})


def test_a_model_without_a_loss_says_how_to_give_one():
    subject = Subject(torch.nn.Linear(1, 1), {"input": torch.ones(1, 1)})
    with pytest.raises(ConfigError, match=r"without a loss.*loss=lambda"):
        subject.run(subject.example())
