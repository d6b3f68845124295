"""Metrics of a run: averaged over micro-batches, ranks and steps, guarded against NaN, written down."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spatial_forcing.errors import DataError, SpatialForcingError

GUARDED = ("loss", "grad_norm")
Row = dict[str, float]


class DivergedError(SpatialForcingError):
    """The loss or its gradient became NaN or infinite; the message names step and samples."""


@dataclass(frozen=True)
class _Pending:
    step: int
    names: tuple[str, ...]
    values: Tensor
    losses: Tensor
    indices: Sequence[Tensor | None]


class Meter:
    """Collects the metrics of each step and reads them off the device only at `sync`.

    Between two syncs nothing waits for the device, and one reduction serves all of it: the metrics'
    means over ranks, the check for NaN, and the wish of any rank to stop.
    """

    def __init__(
        self, reduce: Callable[[Tensor], Tensor], gather: Callable[[list[Any]], list[Any]] = list
    ) -> None:
        """`reduce` is the mean over ranks of a tensor, `gather` joins a list over ranks."""
        self._reduce, self._gather = reduce, gather
        self._pending: list[_Pending] = []
        self.rows: list[Row] = []

    def add(
        self,
        step: int,
        losses: Sequence[Tensor],
        metrics: Sequence[Mapping[str, Tensor]],
        grad_norm: Tensor,
        indices: Sequence[Tensor | None],
    ) -> None:
        """Record optimizer step `step`: one entry a micro-batch, all scalars on one device."""
        stacked = torch.stack([loss.detach().float() for loss in losses])
        names = sorted(set().union(*metrics))
        means = [
            torch.stack([m[name].detach().float() for m in metrics if name in m]).mean() for name in names
        ]
        values = torch.stack([stacked.mean(), grad_norm.detach().float(), *means])
        self._pending.append(_Pending(step, (*GUARDED, *names), values, stacked, list(indices)))

    def sync(self, stop: bool = False) -> bool:
        """Read everything recorded since the last call into `rows`; whether any rank asked to stop.

        Every rank must call it at the same steps.

        Raises:
            DivergedError: a loss or gradient was not finite on some rank.
        """
        if not self._pending:
            return stop
        wish = self._pending[-1].values.new_tensor([float(stop)])
        flat = self._reduce(torch.cat([entry.values for entry in self._pending] + [wish])).tolist()
        pending, self._pending = self._pending, []
        start = 0
        for entry in pending:
            row = dict(zip(entry.names, flat[start : start + len(entry.names)], strict=True))
            start += len(entry.names)
            if not all(math.isfinite(row[name]) for name in GUARDED):
                self._diverged(entry, row)
            self.rows.append(row)
        return flat[-1] > 0

    def _diverged(self, entry: _Pending, row: Row) -> None:
        own = [
            index.tolist() if index is not None else None
            for loss, index in zip(entry.losses.tolist(), entry.indices, strict=True)
            if not math.isfinite(loss)
        ]
        batches = self._gather(own)
        named = "; ".join("no index" if b is None else f"dataset indices {b}" for b in batches)
        where = f"in the batch with {named}" if batches else "although every loss was finite"
        raise DivergedError(
            f"step {entry.step}: loss {row['loss']:g}, gradient norm {row['grad_norm']:g} {where}. "
            "The last complete checkpoint is kept. Run `spatial-forcing data check` on the dataset, "
            "lower the learning rate, or clip the gradient harder."
        )

    def line(self) -> Row:
        """Means over the steps since the last line; a metric counts in the steps that have it."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        columns = {name: [row[name] for row in self.rows if name in row] for name in names}
        self.rows = []
        means = {name: sum(column) / len(column) for name, column in columns.items()}
        # NaN is not JSON; a metric without a value in this window is left out.
        return {name: value for name, value in means.items() if math.isfinite(value)}


class MetricLog:
    """metrics.jsonl: one object a line, with its `step`; appended, and cut back on resumption."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        """Keep the lines up to `resumed_step`; later ones are written again by the resumed run."""
        self._path = path
        lines = [json.dumps(row) for row in read_metrics(path) if row["step"] <= resumed_step]
        beside = path.with_name(f".{path.name}.tmp")
        beside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        beside.replace(path)

    def write(self, row: Mapping[str, float]) -> None:
        """Append one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(row)) + "\n")


def read_metrics(path: Path) -> list[Row]:
    """The lines of a metrics.jsonl, or of the one in a run directory; empty where there is none.

    A last line that was cut off by a kill is left out.

    Raises:
        DataError: any other line is not JSON object.
    """
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    rows = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if line.endswith("\n"):
                raise DataError(f"{path} line {number} is not JSON ({error}); remove that line.") from error
    return rows
