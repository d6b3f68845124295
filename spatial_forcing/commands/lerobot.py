"""`spatial-forcing lerobot list | init | export`: which policies are aligned, and checkpoints to and fro.

Only files are changed, so LeRobot need not be installed. The guide is docs/lerobot.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

import tyro
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.registry import did_you_mean
from spatial_forcing.storage import replace_file, write_json

FAMILIES: Mapping[str, str] = {
    "pi0": "PaliGemma's language model; 16 x 16 tokens a view",
    "pi05": "PaliGemma's language model; 16 x 16 tokens a view",
    "pi0_fast": "PaliGemma's language model; 16 x 16 tokens a view",
    "smolvla": "SmolLM2's first 16 blocks; 8 x 8 tokens a view",
    "xvla": "Florence-2's encoder; the first view only",
    "eo1": "Qwen2.5-VL's language model; grids of any size",
    "act": "ACT's transformer encoder; one token for 32 x 32 pixels",
}
"""LeRobot's policies that have a `<type>_sf`, and what is tapped."""
_UNBUILT = "where its tokens lie could not be checked: it is not built without a download"
_POOLED = "a tap in its vision encoder is not written yet"
NOT_ALIGNED: Mapping[str, str] = {
    "diffusion": f"images become one pooled vector before the denoiser; {_POOLED}",
    "multi_task_dit": f"of an image only CLIP's class token reaches the denoiser; {_POOLED}",
    "vqbet": f"images become one pooled vector before the transformer; {_POOLED}",
    "groot": f"images leave the batch, cropped at random for each sample; {_UNBUILT}",
    "wall_x": f"images become tokens inside the forward; {_UNBUILT}",
    "vla_jepa": f"images become tokens inside the forward; {_UNBUILT}",
    "evo1": f"frozen below the tap in stage 1; {_UNBUILT}",
    "molmoact2": f"overlapping crops with 2 x 2 pooling are no single grid a view; {_UNBUILT}",
    "fastwam": "a video model: its tokens are latents of several frames, whose places were not checked",
    "lingbot_va": "a video model: its tokens are latents of several frames, whose places were not checked",
    "tdmpc": "a world model for reinforcement learning whose encoder gives one vector an image",
    "gaussian_actor": "an actor of reinforcement learning, not fine-tuned on demonstrations",
}
"""LeRobot 0.6's other policies, and why they are not aligned."""

SUFFIX = "_sf"
CONFIG, TRAIN_CONFIG = "config.json", "train_config.json"
WEIGHTS, ADAPTER, ADAPTER_CONFIG = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"
MARK = "spatial_forcing."
"""In the name of every weight that is not the stock policy's."""


def list_policies() -> None:
    """LeRobot's policies: which can be trained with Spatial Forcing, what is aligned, or why not."""
    for name, what in FAMILIES.items():
        print(f"{name + SUFFIX:<16} {what}")
    print("\nnot aligned:")
    for name, why in NOT_ALIGNED.items():
        print(fill(why, 80, initial_indent=f"{name:<16} ", subsequent_indent=" " * 17))


@dataclass(frozen=True)
class InitOptions:
    """From a stock checkpoint to one that `lerobot-train --policy.path` fine-tunes with Spatial Forcing.

    Attributes:
        source: folder of a stock checkpoint, or its hub id.
        output: new folder.
        alpha: weight of the alignment loss.
        teacher: registered name, folder or hub id of the teacher.
        cache: folder of the teacher's cached features; then it is not run.
    """

    source: tyro.conf.Positional[str]
    output: Path
    alpha: Annotated[float, tyro.conf.arg(aliases=("--weight",))] = 0.5
    teacher: str = "facebook/VGGT-1B"
    cache: Path | None = None


@dataclass(frozen=True)
class ExportOptions:
    """From a checkpoint of the plugin to the stock policy's, which needs neither plugin nor teacher.

    Attributes:
        source: folder with config.json, such as `.../checkpoints/last/pretrained_model`.
        output: new folder.
    """

    source: tyro.conf.Positional[Path]
    output: Path


def init(options: tyro.conf.OmitArgPrefixes[InitOptions]) -> None:
    """Turn a stock checkpoint of LeRobot into one of the plugin; weights are copied as they are."""
    if options.alpha < 0:
        raise ConfigError(f"alpha is {options.alpha}; expected 0 or more.")
    source = _local(options.source)
    config = _read(source / CONFIG)
    kind = _kind(config, source)
    if kind.endswith(SUFFIX):
        raise CheckpointError(f"{source} is a {kind!r} checkpoint already; train it as it is.")
    if kind not in FAMILIES:
        raise CheckpointError(
            f"{source} is a {kind!r} policy, which has no {kind}{SUFFIX}.{did_you_mean(kind, FAMILIES)} "
            f"Known: {', '.join(FAMILIES)}."
        )
    forcing: dict[str, Any] = {"alpha": options.alpha, "teacher": options.teacher}
    if options.cache is not None:
        forcing["cache"] = str(options.cache.resolve())
    _new_folder(options.output)
    _copy(source, options.output, but=(CONFIG, TRAIN_CONFIG))
    write_json(options.output / CONFIG, {**config, "type": kind + SUFFIX, "forcing": forcing})
    Console().print(f"{kind}{SUFFIX} checkpoint written to {options.output}; train it with")
    Console(soft_wrap=True).print(f"  lerobot-train --policy.path={options.output} ...", markup=False)


def export(options: tyro.conf.OmitArgPrefixes[ExportOptions]) -> None:
    """Turn a checkpoint of the plugin into the stock policy's: its keys, its config, the same actions."""
    source = options.source
    config = _read(source / CONFIG)
    kind = _kind(config, source)
    stock = kind.removesuffix(SUFFIX)
    if stock == kind or "forcing" not in config:
        raise CheckpointError(
            f"{source} is a {kind!r} checkpoint, not one of the plugin (its type ends in {SUFFIX}); "
            "there is nothing to export."
        )
    _new_folder(options.output)
    _copy(source, options.output, but=(CONFIG, TRAIN_CONFIG, WEIGHTS, ADAPTER, ADAPTER_CONFIG))
    removed = 0
    for name in (WEIGHTS, ADAPTER):
        if (source / name).exists():
            removed += _strip(source / name, options.output / name)
    if (source / ADAPTER_CONFIG).exists():
        write_json(options.output / ADAPTER_CONFIG, _plain_adapter(_read(source / ADAPTER_CONFIG)))
    if (source / TRAIN_CONFIG).exists():
        training = _read(source / TRAIN_CONFIG)
        if isinstance(training.get("policy"), Mapping):
            training["policy"] = _stock_config(training["policy"], stock)
        write_json(options.output / TRAIN_CONFIG, training)
    write_json(options.output / CONFIG, _stock_config(config, stock))
    Console(soft_wrap=True).print(
        f"{stock} checkpoint written to {options.output}: {removed} tensors of Spatial Forcing left out."
    )


def _stock_config(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {**{name: value for name, value in config.items() if name != "forcing"}, "type": kind}


def _plain_adapter(config: dict[str, Any]) -> dict[str, Any]:
    kept = [name for name in config.get("modules_to_save") or [] if not name.startswith(MARK)]
    return {**config, "modules_to_save": kept or None, "auto_mapping": None}


def _strip(source: Path, target: Path) -> int:
    """Copy a safetensors file without the projector's tensors; how many those were."""
    try:
        with safe_open(source, "pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            kept = {name: file.get_tensor(name) for name in names if MARK not in name}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{source} is damaged or truncated ({error}); copy it again.") from error
    metadata = {key: value for key, value in metadata.items() if MARK not in key + value}
    replace_file(target, lambda path: save_file(kept, path, metadata=metadata))
    return len(names) - len(kept)


def _local(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if source.count("/") != 1 or Path(source).exists():
        raise CheckpointError(f"{source} is not a folder; give a checkpoint's folder, or a hub id.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source))
    except Exception as error:  # of many kinds: offline, unknown, gated
        raise CheckpointError(
            f"{source!r} is neither a local folder nor on the hub ({type(error).__name__}: {error})."
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; give the folder of a checkpoint (LeRobot: pretrained_model)."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not an object with settings.")
    return content


def _kind(config: Mapping[str, Any], folder: Path) -> str:
    kind = config.get("type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{folder / CONFIG} names no policy type; it is not a LeRobot checkpoint.")
    return kind


def _new_folder(folder: Path) -> None:
    if folder.exists():
        raise ConfigError(f"{folder} exists; give a new folder, nothing is overwritten.")
    folder.mkdir(parents=True)


def _copy(source: Path, target: Path, but: tuple[str, ...]) -> None:
    for path in source.iterdir():
        if path.is_file() and path.name not in but:
            shutil.copy2(path.resolve(), target / path.name)
