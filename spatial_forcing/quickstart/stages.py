"""Stages that run once: each leaves a stamp with what went in, what came out and how long it took."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from spatial_forcing.storage import write_json


def digest(inputs: Mapping[str, Any]) -> str:
    """Eight hex digits that name a set of JSON-able inputs; equal inputs give equal digests."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:8]


@dataclass
class Stages:
    """Runs named stages below `folder`.

    A stage whose inputs are those of its stamp is not run again: an interrupted or repeated
    quickstart goes on where it stopped. Other inputs get another stamp; nothing is overwritten.

    Attributes:
        folder: where stamps and outputs go.
        console: where progress is printed.
        seconds: wall-clock of every stage of this folder, those of earlier runs included.
    """

    folder: Path
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)
    _count: int = 0

    def run(
        self, name: str, inputs: Mapping[str, Any], work: Callable[[Path], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Run `work(output folder)` unless its stamp exists; return its JSON-able result.

        The output folder is `<name>-<digest of inputs>`; `work` must itself resume what it finds there.
        """
        self._count += 1
        output, stamp = self._places(name, inputs)
        heading = f"[bold]{self._count}. {name.replace('-', ' ')}[/]"
        if stamp.exists():
            saved = json.loads(stamp.read_text())
            self.seconds[name] = saved["seconds"]
            self.console.print(f"{heading}: reused from {output}")
            return saved["result"]
        self.console.print(heading)
        started = time.monotonic()
        result = dict(work(output))
        self.seconds[name] = time.monotonic() - started
        write_json(stamp, {"inputs": inputs, "result": result, "seconds": self.seconds[name]})
        self.console.print(f"   {self.seconds[name]:.0f} s, in {output}", style="dim")
        return result

    def forget(self, name: str, inputs: Mapping[str, Any]) -> None:
        """Make the next `run` of this stage do its work again; its outputs stay."""
        self._places(name, inputs)[1].unlink(missing_ok=True)

    def _places(self, name: str, inputs: Mapping[str, Any]) -> tuple[Path, Path]:
        output = self.folder / f"{name}-{digest(inputs)}"
        return output, self.folder / "stages" / f"{output.name}.json"
