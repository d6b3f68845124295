from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
import subprocess
import sys
import typing

import pytest

from spatial_forcing import cli
from spatial_forcing.errors import ConfigError
from spatial_forcing.experiments import CompareConfig
from spatial_forcing.nano_teacher.recipe import PretrainConfig
from spatial_forcing.students import StudentConfig
from spatial_forcing.teachers.vggt.config import VGGTConfig
from spatial_forcing.training import TrainConfig
from tests.data_layer.conftest import write_dataset


@pytest.fixture
def root(tmp_path):
    return write_dataset(tmp_path / "dataset")


def leaves(commands=cli.COMMANDS):
    for entry in commands.values():
        if isinstance(entry, cli.Command):
            yield entry
        else:
            yield from leaves(entry)


def paths(commands=cli.COMMANDS, path=()):
    for name, entry in commands.items():
        if isinstance(entry, cli.Command):
            yield [*path, name]
        else:
            yield from paths(entry, (*path, name))


@pytest.mark.parametrize("command", list(leaves()), ids=lambda c: c.target)
def test_every_command_exists_and_has_help(command):
    module, function = command.target.split(":")
    target = getattr(importlib.import_module(f"spatial_forcing.commands.{module}"), function)
    assert target.__doc__


@pytest.mark.parametrize("path", list(paths()), ids=" ".join)
def test_every_command_answers_to_help(path, capsys):
    with contextlib.suppress(SystemExit):
        cli.main([*path, "--help"])
    assert path[-1] in capsys.readouterr().out


def sections(kind, found):
    """The dataclasses that the options of `kind` come from, but for the sizes of networks."""
    if kind in found or issubclass(kind, StudentConfig | VGGTConfig):
        return found
    found.add(kind)
    for hint in typing.get_type_hints(kind).values():
        for each in (hint, *typing.get_args(hint)):
            if isinstance(each, type) and dataclasses.is_dataclass(each):
                sections(each, found)
    return found


def test_every_option_is_explained():
    roots = [TrainConfig, CompareConfig, PretrainConfig]
    for command in leaves():
        module = importlib.import_module(f"spatial_forcing.commands.{command.target.partition(':')[0]}")
        roots += [
            v
            for v in vars(module).values()
            if dataclasses.is_dataclass(v) and v.__module__ == module.__name__
        ]
    found = set()
    for root in roots:
        sections(root, found)
    # The command line reads one entry an option; `low, high: ...` explains none of the two there.
    unexplained = [
        f"{kind.__name__}.{field.name}"
        for kind in found
        for field in dataclasses.fields(kind)
        if not re.search(rf"^\s*{field.name}: ", kind.__doc__, re.MULTILINE)
    ]
    assert not unexplained
    assert len(found) > 15


def test_resolve_follows_groups():
    path, command, rest = cli.resolve(["data", "info", "folder", "--x"])
    assert path == ["data", "info"]
    assert command.target == "data:info"
    assert rest == ["folder", "--x"]


@pytest.mark.parametrize(
    ("arguments", "suggestion"), [(["quikstart"], "'quickstart'"), (["data", "recrod"], "'record'")]
)
def test_an_unknown_command_gets_a_suggestion(arguments, suggestion):
    with pytest.raises(ConfigError, match=f"Did you mean {suggestion}"):
        cli.resolve(arguments)


def test_groups_print_their_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["cache", "--help"])
    assert exit_.value.code == 0
    assert "verify" in capsys.readouterr().out


def test_user_errors_exit_with_two_and_no_traceback(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["nonsense"])
    assert exit_.value.code == cli.USER_ERROR
    captured = capsys.readouterr()
    assert "unknown command 'nonsense'" in captured.err
    assert "Traceback" not in captured.err


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["quickstart"])
    assert exit_.value.code == cli.INTERRUPTED
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate", "quickstart", "probe"])
def test_help_shows_options(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["teacher", "list"], ["train", "--help"], ["data", "check", "DATA"]])
def test_a_reader_that_leaves_early_gets_no_traceback(arguments, root):
    """As `spatial-forcing ... | head -0`: the pipe is closed before anything is read."""
    command = [
        sys.executable,
        "-m",
        "spatial_forcing.cli",
        *(str(root) if a == "DATA" else a for a in arguments),
    ]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert done.returncode in (0, 1, 141)  # rich ends with 1, as argparse does
