"""`spatial-forcing train` and `export`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from accelerate import PartialState
from rich.console import Console

from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.students import LoraStudent, load_student
from spatial_forcing.students.base import POLICY, read_json
from spatial_forcing.students.base import read_config as read_student_config
from spatial_forcing.students.card import read_card
from spatial_forcing.students.lora import MODEL_TYPE as LORA
from spatial_forcing.students.parity import merge_checked
from spatial_forcing.training import PRESETS, TrainConfig
from spatial_forcing.training import train as run_training
from spatial_forcing.training.run import CONFIG, export_policy

DEFAULT_PRESET = "nano-metaworld"


def train(prog: str, arguments: Sequence[str]) -> None:
    """Fine-tune a policy, with or without spatial forcing.

    `--preset NAME` or `--config RUN/config.json` gives the starting point, every other option overrides one
    setting of it. The same command resumes; under `accelerate launch -m spatial_forcing.cli train ...` it
    runs on several processes.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", default=None)
    first.add_argument("--config", type=Path, default=None)
    chosen, rest = first.parse_known_args(list(arguments))
    description = (
        f"{train.__doc__}\nFirst of all: --preset NAME, one of {', '.join(sorted(PRESETS))} "
        f"(default {DEFAULT_PRESET}), or --config FILE."
    )
    config = tyro.cli(
        TrainConfig, prog=prog, description=description, default=starting_point(chosen), args=rest
    )
    result = run_training(config)
    state = PartialState()
    if state.is_main_process:
        Console().print(
            f"{result.steps} steps in {result.seconds:.0f} s, at most {result.peak_memory / 2**30:.1f} GiB. "
            f"Run: {result.folder}, policy: {result.policy}"
        )
    # An interpreter that is taken down with a group open can abort after all is written.
    state.destroy_process_group()


def starting_point(chosen: argparse.Namespace) -> TrainConfig:
    """The configuration that `--preset` or `--config` names; a preset leaves the two folders open.

    Raises:
        ConfigError: both are given, the preset is unknown (did you mean), or the file is not a configuration.
    """
    if chosen.config is None:
        return PRESETS[chosen.preset or DEFAULT_PRESET](tyro.MISSING, tyro.MISSING)
    if chosen.preset is not None:
        raise ConfigError("--preset and --config exclude each other; give one starting point.")
    return TrainConfig.from_file(read_config(chosen.config), chosen.config.parent)


def read_config(path: Path, give: str = "give a run's config.json") -> dict[str, Any]:
    """The JSON object in `path`. Raises `ConfigError` that ends with what to `give` when there is none."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); {give}.") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} holds {type(plain).__name__}, not an object with settings; {give}.")
    return plain


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The policy to export and its new place.

    Attributes:
        source: a run directory, one of its checkpoints, or a policy's own folder.
        output: folder to write the policy to, in its base's own layout.
        form: of a run with LoRA: "merged" adds the adapters to the weights, once, in float32, on the CPU, and
            checks that the actions stay; "adapter" writes the adapters alone, to be run on their base.
        base: where the base of the adapters is now, if it has moved.
        statistics: the dataset whose statistics are written, where a checkpoint holds those of several.
    """

    source: Path
    output: Path
    form: Literal["merged", "adapter"] = "merged"
    base: Path | None = None
    statistics: str | None = None


def _policy_of(source: Path) -> Path:
    if (source / POLICY / CONFIG).exists():
        return source / POLICY
    if (source / CONFIG).exists() and "model_type" in read_json(source):  # a run's says nothing of a model
        return source
    raise CheckpointError(
        f"{source} holds no policy; give a finished run, one of its checkpoints/step-* folders, or a policy."
    )


def export(options: tyro.conf.OmitArgPrefixes[ExportOptions]) -> None:
    """Write the bare policy of a run: the base's keys and config, no teacher, no projector."""
    folder = _policy_of(options.source)
    if options.output.exists():
        raise ConfigError(f"{options.output} exists; export to a new folder, nothing is overwritten.")
    lora = read_student_config(folder)["model_type"] == LORA
    if lora and options.statistics is not None:
        raise ConfigError(f"--statistics: the adapters in {folder} have their own only; leave it out.")
    student: Any = (
        LoraStudent.from_pretrained(folder, base=options.base)
        if lora
        else load_student(folder, statistics=options.statistics)
    )
    if lora and options.form == "merged":
        student, parity = merge_checked(student)
        Console().print(str(parity))
    export_policy(student, options.output, read_card(folder))
    Console().print(f"policy written to {options.output}")
