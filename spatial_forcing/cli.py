"""`spatial-forcing`: one command line from demonstrations to evidence.

Each command is a function in `spatial_forcing.commands`; its module is imported only when it is
called, so that `--help` answers at once. Options come from the function's signature (tyro).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from spatial_forcing.errors import SpatialForcingError
from spatial_forcing.registry import unknown

INTERRUPTED = 130
USER_ERROR = 2
STAND_INS = "--stand-ins"
PIPE_CLOSED = 141
"""128 + SIGPIPE, what a shell reports for a program that a closed pipe has ended."""


@dataclass(frozen=True)
class Command:
    """Where a command's function is (`module:function` below `spatial_forcing.commands`).

    A `raw` function takes (prog, arguments) and parses them itself. One that `simulates` also takes
    `--stand-ins`: where LIBERO's assets are not found, plain ones are made.
    """

    target: str
    summary: str
    raw: bool = False
    simulates: bool = False


Commands = Mapping[str, "Command | Commands"]


class GroupRequested(Exception):
    """The arguments stop at a group of commands, or ask for its help."""

    def __init__(self, path: Sequence[str]) -> None:
        super().__init__(*path)
        self.path = list(path)


COMMANDS: Commands = {
    "quickstart": Command(
        "quickstart:quickstart", "the whole job in small: record, cache, train, evaluate, report"
    ),
    "data": {
        "record": Command(
            "data:record", "record demonstrations of scripted experts into a LeRobot dataset", simulates=True
        ),
        "check": Command("data:check", "find damaged files, NaN, wrong shapes, videos and statistics"),
        "stats": Command("data:stats", "recompute a dataset's statistics"),
        "info": Command("data:info", "print what a dataset holds"),
        "convert": Command(
            "data:convert", "convert another format into a LeRobot dataset", raw=True, simulates=True
        ),
    },
    "teacher": {
        "list": Command("teacher:list_teachers", "the teachers that can be named, with their licences"),
        "compare": Command("teacher:compare", "several teachers on your own frames, side by side"),
        "pretrain": Command("teacher:pretrain", "train vggt-nano on rendered multi-view scenes"),
        "evaluate": Command("teacher:evaluate", "depth and pose metrics of a teacher on held-out scenes"),
    },
    "cache": {
        "build": Command("cache:build", "encode a dataset once, so that training needs no teacher"),
        "info": Command("cache:info", "print a cache's header"),
        "verify": Command("cache:verify", "check every shard against its checksum"),
        "prune": Command("cache:prune", "drop leftovers, damaged rows and episodes that are gone"),
        "crops": Command("cache:crops", "how well cached targets follow the student's crops"),
    },
    "doctor": Command("doctor:doctor", "inspect an unknown model, verify its token grid, print its adapter"),
    "train": Command("train:train", "fine-tune a policy, with or without spatial forcing", raw=True),
    "evaluate": Command(
        "evaluate:evaluate", "closed-loop success rates with intervals and videos", simulates=True
    ),
    "compare": Command(
        "compare:compare", "arms x training seeds, matched: what helps, by how much", raw=True, simulates=True
    ),
    "compare-checkpoints": Command("compare:checkpoints", "two policies over identical episodes (McNemar)"),
    "sample-size": Command("compare:sample_size", "how many seeds and episodes a difference needs"),
    "probe": Command("probe:probe", "how much depth a frozen policy's visual tokens hold"),
    "analyse": Command("analyse:analyse", "gradient audit, rank and collapse, CKA, t-SNE and PCA of a run"),
    "export": Command("train:export", "write the bare policy of a run: no teacher, no projector"),
    "lerobot": {
        "list": Command("lerobot:list_policies", "LeRobot's policies: what is aligned in each, or why not"),
        "init": Command("lerobot:init", "turn a stock LeRobot checkpoint into one the plugin fine-tunes"),
        "export": Command("lerobot:export", "turn a checkpoint of the plugin back into the stock policy's"),
    },
    "libero": {
        "stand-ins": Command("libero:stand_ins", "make plain assets for two suites, instead of a download"),
    },
    "serve": Command("serve:serve", "serve a policy to robots over websocket (openpi's protocol)"),
    "report": Command("report:report", "make the page of a quickstart or comparison again"),
    "open": Command("report:open_page", "show a page in the browser"),
}


def resolve(arguments: Sequence[str], commands: Commands = COMMANDS) -> tuple[list[str], Command, list[str]]:
    """Split `arguments` into the command's path, the command, and what is left for it.

    Raises:
        ConfigError: no such command; the message suggests the closest.
        GroupRequested: the arguments stop at a group of commands.
    """
    path: list[str] = []
    entry: Command | Commands = commands
    rest = list(arguments)
    while not isinstance(entry, Command):
        if not rest or rest[0] in ("-h", "--help"):
            raise GroupRequested(path)
        name = rest.pop(0)
        if name not in entry:
            raise unknown(" ".join(["command", *path]), name, entry)
        path.append(name)
        entry = entry[name]
    return path, entry, rest


def usage(path: Sequence[str]) -> Table:
    """A table of the commands below `path`."""
    entry: Command | Commands = COMMANDS
    for name in path:
        assert not isinstance(entry, Command)
        entry = entry[name]
    table = Table(
        title=" ".join(["spatial-forcing", *path, "COMMAND --help"]), title_justify="left", box=None
    )
    table.add_column("command", style="bold")
    table.add_column("what it does")
    assert not isinstance(entry, Command)
    for name, command in entry.items():
        if isinstance(command, Command):
            table.add_row(name, command.summary)
        else:
            table.add_row(name, " | ".join(command))
    return table


def run(arguments: Sequence[str]) -> None:
    """Run one command; raises what it raises."""
    import tyro

    path, command, rest = resolve(arguments)
    module, function = command.target.split(":")
    target = getattr(importlib.import_module(f"spatial_forcing.commands.{module}"), function)
    prog = " ".join(["spatial-forcing", *path])
    if command.simulates and STAND_INS in rest:
        from spatial_forcing.envs.libero_setup import ensure_assets

        rest.remove(STAND_INS)
        ensure_assets()
    if command.raw:
        target(prog, rest)
    else:
        tyro.cli(target, prog=prog, args=rest)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: user errors exit with 2 and one message, Ctrl-C with 130, a closed pipe with 141."""
    arguments = sys.argv[1:] if arguments is None else arguments
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        run(arguments)
        sys.stdout.flush()  # here, where a closed pipe is understood, and not while the interpreter ends
    except GroupRequested as group:
        Console().print(usage(group.path))
        sys.exit(0 if arguments else USER_ERROR)
    except SpatialForcingError as error:
        errors.print("[bold red]error:[/]", end=" ")
        errors.print(str(error), markup=False)
        sys.exit(USER_ERROR)
    except BrokenPipeError:
        # The reader (`head`, `less`) has enough. Python would raise again when it flushes stdout at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE_CLOSED)
    except KeyboardInterrupt:
        errors.print("interrupted; run the same command again to resume.")
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
