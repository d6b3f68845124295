"""Files of the pi0 student.

`config.json` and `model.safetensors` are those of stock transformers, weights under openpi's names;
`student.json` holds the cameras, sizes and statistics, beside the tokenizer's files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.storage import replace_file, write_json
from spatial_forcing.students.base import CONFIG_FILE, WEIGHTS_FILE, read_config
from spatial_forcing.students.normalize import Normalizer
from spatial_forcing.students.pi0.config import Pi0Config, Pi0Size, architecture
from spatial_forcing.students.pi0.keys import to_openpi, to_transformers
from spatial_forcing.students.pi0.text import Prompt
from spatial_forcing.students.weights import assign, read_tensor, weight_shapes

STUDENT_FILE = "student.json"


def build_network(config: Pi0Config, seed: int, source: str | None) -> Any:
    """Transformers' `PI0ForConditionalGeneration`, with the weights of `source`, or random ones for None.

    Raises:
        CheckpointError: see `to_transformers`.
    """
    from accelerate import init_empty_weights
    from transformers import PI0Config, PI0ForConditionalGeneration

    own = PI0Config(**architecture(config))
    dtype = getattr(torch, config.dtype)
    if source is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return PI0ForConditionalGeneration(own).to(dtype)
    path = find_weights(source)
    # Buffers are computed, parameters get no memory before the file's are put in their place.
    with init_empty_weights(include_buffers=False):
        network = PI0ForConditionalGeneration(own)
    shapes = weight_shapes(path)
    expected = network.state_dict()
    names = to_transformers(
        {name: name for name in shapes},
        expected,
        str(path),
        same=lambda a, b: torch.equal(read_tensor(path, a), read_tensor(path, b)),
    )
    if reshaped := sorted(k for k, name in names.items() if shapes[name] != tuple(expected[k].shape)):
        listed = "; ".join(
            f"{k}: {shapes[names[k]]} stored, {tuple(expected[k].shape)} expected" for k in reshaped[:6]
        )
        raise CheckpointError(
            f"{path} has {len(reshaped)} weights of another shape ({listed}); set `size` to the "
            "architecture it was trained with."
        )
    # One by one, so that no more than one tensor appears twice: in the file's type and in the model's.
    for key in sorted(names, key=names.__getitem__):
        assign(network, key, read_tensor(path, names[key]), dtype)
    return network


def find_weights(source: str) -> Path:
    """The safetensors file that `source` (file, folder or hub id) names.

    Raises:
        CheckpointError: it is not there, or its config says that it is another policy.
    """
    path = Path(source)
    if path.is_dir():
        _refuse_other_policies(path / CONFIG_FILE)
        path = path / WEIGHTS_FILE
    if path.is_file():
        return path
    if path.suffix or source.count("/") != 1 or path.parent.exists():
        raise CheckpointError(f"{path} does not exist; give a folder with model.safetensors, or a hub id.")
    from huggingface_hub import hf_hub_download

    try:
        _refuse_other_policies(Path(hf_hub_download(source, CONFIG_FILE)))
        return Path(hf_hub_download(source, WEIGHTS_FILE))
    except OSError as error:
        raise CheckpointError(
            f"weights {source!r} are neither a local path nor on the hub ({type(error).__name__}: {error})."
        ) from error


def _refuse_other_policies(path: Path) -> None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return  # openpi writes another kind of file; the keys decide
    kind = config.get("type", config.get("model_type", "pi0"))
    if kind != "pi0":
        raise CheckpointError(
            f"{path} describes a {kind!r} policy, not 'pi0'; for LeRobot's other policies use its plugin "
            "(docs/lerobot.md)."
        )


def save(
    folder: str | Path, network: Any, prompt: Prompt, config: Pi0Config, norms: Mapping[str, Normalizer]
) -> None:
    """Write all files; each is written beside and renamed, `config.json` last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = to_openpi(network.state_dict())
    weights = {name: value.detach().contiguous().cpu() for name, value in state.items()}
    replace_file(folder / WEIGHTS_FILE, lambda path: save_file(weights, path, metadata={"format": "pt"}))
    prompt.save(folder)
    statistics = {
        name: {key: value.tolist() for key, value in norm.state_dict().items()}
        for name, norm in norms.items()
    }
    write_json(folder / STUDENT_FILE, {"config": asdict(config), "statistics": statistics})
    write_json(folder / CONFIG_FILE, network.config.to_dict())


def read_settings(folder: str | Path) -> tuple[Pi0Config, Mapping[str, Any]]:
    """The student's configuration and its statistics.

    Raises:
        CheckpointError: files are missing or malformed, or describe another architecture.
    """
    folder = Path(folder)
    read_config(folder, "pi0")
    path = folder / STUDENT_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        config = config_from_plain(stored["config"])
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist: {folder} holds weights, but no student. Start a new one from them with "
            "Pi0Config(pretrained=...), which needs the dataset's statistics and cameras."
        ) from None
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} does not describe a pi0 student: {error}") from error
    return config, stored.get("statistics", {})


def config_from_plain(settings: Mapping[str, Any]) -> Pi0Config:
    """The inverse of `dataclasses.asdict`. Raises `TypeError` or `ConfigError` on other settings."""
    return Pi0Config(**{**settings, "size": Pi0Size(**settings["size"])})


def load_statistics(
    norms: Mapping[str, Normalizer], statistics: Mapping[str, Any], folder: str | Path
) -> None:
    """Put the stored statistics into the student's normalisers. Raises `CheckpointError` on other sizes."""
    for name, norm in norms.items():
        try:
            norm.load_state_dict({key: torch.tensor(value) for key, value in statistics[name].items()})
        except (KeyError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"{Path(folder) / STUDENT_FILE}: statistics {name}: {error}") from error
