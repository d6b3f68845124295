"""Curves in TensorBoard, Weights & Biases or Trackio, in addition to metrics.jsonl."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from spatial_forcing.training.config import TrainConfig

PROJECT = "spatial-forcing"


class Trackers:
    """A context in which `write` sends one line of metrics to every tracker of the configuration."""

    def __init__(self, config: TrainConfig, resumed_step: int, enabled: bool = True) -> None:
        """`enabled` is False on all processes but the first."""
        self._config, self._step = config, resumed_step
        self._names = config.active_trackers if enabled else ()
        self._writers: list[Callable[[Mapping[str, float], int], None]] = []
        self._closers: list[Callable[[], Any]] = []

    def __enter__(self) -> Self:
        for name in self._names:
            if name == "tensorboard":
                self._open_tensorboard()
            else:
                self._open_online(name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for close in self._closers:
            close()

    def write(self, row: Mapping[str, float], step: int) -> None:
        """Send the metrics of `step`."""
        values = {name: value for name, value in row.items() if name != "step"}
        for write in self._writers:
            write(values, step)

    def _open_tensorboard(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Points that an interrupted run wrote after its checkpoint come again, and are hidden.
        folder = self._config.output / "tensorboard"
        writer = SummaryWriter(str(folder), purge_step=self._step + 1)

        def write(values: Mapping[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._writers.append(write)
        self._closers.append(writer.close)

    def _open_online(self, name: str) -> None:
        """Weights & Biases and Trackio share `init`, `log` and `finish`."""
        package: Any = importlib.import_module(name)
        output = self._config.output.resolve()
        options: dict[str, Any] = {"project": PROJECT, "name": output.name, "config": self._config.to_plain()}
        if name == "wandb":
            # The same run directory is the same run, so that a resumed one continues its curves.
            identity = hashlib.sha256(str(output).encode()).hexdigest()[:16]
            options |= {"id": identity, "resume": "allow", "dir": str(output)}
        else:
            options |= {"resume": "allow"}
        run = package.init(**options)
        self._writers.append(lambda values, step: run.log(dict(values), step=step))
        self._closers.append(package.finish)
