"""Checkpoints in the published layout, read tensor by tensor; the official code loads what is written.

config.json, model*.safetensors (+ index)   vision, projector, language model under the published keys
dataset_statistics.json                     bounds of actions and states, by dataset
action_head--N_checkpoint.pt,
proprio_projector--N_checkpoint.pt          heads, keys prefixed `module.`; N steps or `latest`
vision_backbone--N_checkpoint.pt            FiLM's scales and shifts, where there are any
tokenizer.json, ...                         handed on unchanged
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from spatial_forcing.errors import CheckpointError
from spatial_forcing.storage import replace_file, write_json
from spatial_forcing.students.base import CONFIG_FILE, read_config
from spatial_forcing.students.openvla_oft import keys
from spatial_forcing.students.openvla_oft.config import (
    MODEL_TYPE,
    OpenVLAOFTConfig,
    config_from_published,
    published_config,
)
from spatial_forcing.students.openvla_oft.files import ASSETS, locate
from spatial_forcing.students.openvla_oft.statistics import (
    STATISTICS_FILE,
    choose_statistics,
    read_statistics,
    set_from_published,
)
from spatial_forcing.students.weights import assign, open_weights, read_tensors, renamed

INDEX_FILE = "model.safetensors.index.json"
HEADS = ("action_head", "proprio_projector")
FILM = "vision_backbone"
ALOHA: dict[str, Any] = {
    "chunk": 25,
    "norm": "min_max",
    "gripper": "raw",
    "cameras": ("cam_high", "cam_left_wrist", "cam_right_wrist"),
}
_COMPONENT = re.compile(r"(?P<name>\w+)--(?P<step>latest|\d+)_checkpoint\.pt")
S = TypeVar("S", bound=nn.Module)


def load(
    family: type[S],
    place: str | Path,
    *,
    config: OpenVLAOFTConfig | None = None,
    statistics: str | None = None,
    seed: int = 0,
) -> S:
    """The student in `place`, a folder or hub id.

    Args:
        family: the student's class.
        place: where the checkpoint is.
        config: fine-tune with these settings: architecture sizes must be the checkpoint's; heads that it
            lacks are new, drawn from `seed`. None: what the checkpoint says, heads included.
        statistics: the dataset whose statistics are used.
        seed: of new heads.

    Raises:
        CheckpointError: something missing, unexpected, damaged or of another shape; says which and where.
    """
    folder = locate(place)
    stored = read_config(folder, MODEL_TYPE)
    components = find_components(folder)
    described = config_from_published(stored, inspect_heads(folder, components))
    chosen = described if config is None else config
    if config is not None:
        _check_sizes(folder, described, config)
    assets = {name: (folder / name).read_bytes() for name in ASSETS if (folder / name).is_file()}
    student: Any = empty_student(family, chosen, assets, seed)
    # First of all: a head file appears twice while it is read, which costs least while nothing else is.
    load_heads(student, folder, components, required=config is None)
    _read_weights(student, folder)
    load_film(student, folder, components, required=config is None)
    if config is None:
        _set_statistics(student, folder, stored, statistics or chosen.dataset)
    loaded: S = student
    return loaded


def empty_student(family: Any, config: OpenVLAOFTConfig, assets: Mapping[str, bytes], seed: int = 0) -> Any:
    """A student whose heads are new and whose other parameters take no memory yet.

    Everything that a checkpoint holds is on the meta device.
    """
    with torch.device("meta"):
        student = family(config, assets.get("tokenizer.json"), seed=seed)
    student.assets = dict(assets)
    student.proprio_projector, student.action_head = family.heads(config, seed)
    return student


def find_components(folder: Path) -> dict[str, Path]:
    """Head files by name; of several steps the latest that all heads have.

    Raises:
        CheckpointError: heads of different steps only.
    """
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.glob("*_checkpoint.pt")):
        match = _COMPONENT.fullmatch(path.name)
        if match and match["name"] in (*HEADS, FILM):
            found.setdefault(match["name"], {})[match["step"]] = path
    if not found:
        return {}
    common = set.intersection(*(set(steps) for steps in found.values()))
    if not common:
        listed = {name: sorted(steps) for name, steps in found.items()}
        raise CheckpointError(
            f"{folder} has heads of different steps ({listed}); put those of one step there."
        )
    step = "latest" if "latest" in common else max(common, key=int)
    return {name: steps[step] for name, steps in found.items()}


def inspect_heads(folder: Path, components: Mapping[str, Path]) -> dict[str, Any]:
    """Settings that the head files tell where `config.json` does not: no L1 head means the token head."""
    found: dict[str, Any] = {"film": FILM in components}
    if "proprio_projector" in components:
        found["state_dim"] = read_component(components["proprio_projector"])["fc1.weight"].shape[1]
    else:
        found["state_dim"] = 0
    if "action_head" in components:
        action_dim = read_component(components["action_head"])["model.fc2.weight"].shape[0]
        # The files do not tell more; these are the released constants (ALOHA has 14 joints).
        return found | {"action_dim": action_dim} | (ALOHA if action_dim == 14 else {"chunk": 8})
    return found | {
        "head": "tokens", "decoding": "autoregressive", "chunk": 1, "cameras": ("agentview",), "state_dim": 0,
    }  # fmt: skip


def read_component(path: Path) -> dict[str, Tensor]:
    """A head file's tensors, without the prefix that DDP leaves.

    Raises:
        CheckpointError: missing, damaged, or holding anything but tensors.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); copy it again.") from error
    if not isinstance(stored, dict) or not all(isinstance(v, Tensor) for v in stored.values()):
        raise CheckpointError(f"{path} holds no named tensors; it is not a head of OpenVLA-OFT.")
    return renamed(stored, lambda name: name.removeprefix("module."), path, torch.equal)


def weight_files(folder: Path) -> dict[str, Path]:
    """Published key -> the file that holds it, from the index or the single file.

    Raises:
        CheckpointError: no weights, an unreadable index, or shards that are not there.
    """
    index, single = folder / INDEX_FILE, folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise CheckpointError(f"{folder} holds neither {INDEX_FILE} nor model.safetensors.")
        with open_weights(single) as shard:
            return dict.fromkeys(shard.keys(), single)
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{index} cannot be read ({error!r}); copy it again.") from error
    absent = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
    if absent:
        raise CheckpointError(
            f"{folder} lacks {', '.join(absent)}, which {INDEX_FILE} names: the download is incomplete."
        )
    return {key: folder / name for key, name in weight_map.items()}


def _read_weights(student: Any, folder: Path) -> None:
    """Fill the student tensor by tensor: at no time more than one tensor appears twice."""
    files = weight_files(folder)
    own = dict(student.named_parameters())
    wanted = {entry.published: entry for entry in keys.entries(student.config, own)}
    unused = keys.unused_shapes(student.config)
    _check_keys(folder, files, wanted, unused)
    dtype = getattr(torch, student.config.dtype)
    for key, value in read_tensors(files):
        entry = wanted.get(key)
        expected = unused[key] if entry is None else entry.shape([tuple(own[n].shape) for n in entry.ours])
        if tuple(value.shape) != expected:
            raise CheckpointError(
                f"{files[key]}: {key} is {tuple(value.shape)}, and this configuration takes {expected}."
            )
        if entry is None:
            student.unused[key] = value.to(dtype).clone()
            continue
        for name, part in zip(entry.ours, entry.read(value), strict=True):
            assign(student, name, part, dtype)
    assign(student, "vision.dino.embeddings.mask_token", torch.zeros(1, student.config.dino[0], dtype=dtype))


def _check_keys(
    folder: Path, files: Mapping[str, Path], wanted: Mapping[str, Any], unused: Mapping[str, Any]
) -> None:
    missing = sorted((wanted.keys() | unused.keys()) - files.keys())
    unexpected = sorted(files.keys() - wanted.keys() - unused.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"the weights in {folder} do not fit: {len(missing)} keys missing{_examples(missing)}, "
            f"{len(unexpected)} unexpected{_examples(unexpected)}. Give a checkpoint of the openvla-7b "
            "family; adapters alone are loaded with `load_adapters`."
        )


def _examples(names: list[str]) -> str:
    return f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""


def _check_sizes(folder: Path, there: OpenVLAOFTConfig, asked: OpenVLAOFTConfig) -> None:
    names = ("vocab", "width", "depth", "heads", "mlp", "dino", "siglip", "image_size")
    wrong = [f"{n}: {getattr(there, n)} there, {getattr(asked, n)} asked for" for n in names
             if getattr(there, n) != getattr(asked, n)]  # fmt: skip
    if wrong:
        raise CheckpointError(
            f"{folder} has another architecture ({'; '.join(wrong)}); change student.* to it."
        )


def load_heads(student: Any, folder: Path, components: Mapping[str, Path], *, required: bool = True) -> None:
    """Read the head files into the student. Raises `CheckpointError` where one is missing or does not fit."""
    for name in HEADS:
        module = getattr(student, name)
        if module is None:
            continue
        if name in components:
            _load_head(module, read_component(components[name]), components[name])
        elif required:
            raise CheckpointError(
                f"{folder} has no {name}--N_checkpoint.pt; copy it from where the weights came from."
            )


def load_film(student: Any, folder: Path, components: Mapping[str, Path], *, required: bool = True) -> None:
    """Read FiLM, where the student has it, over vision weights that are there. Raises like `load_heads`."""
    if not student.config.film:
        return
    if FILM in components:
        _read_film(student, components[FILM])
    elif required:
        raise CheckpointError(f"{folder} has no {FILM}--N_checkpoint.pt, which holds FiLM.")
    else:  # scale and shift of 0: the vision towers as they were
        for entry in keys.film_entries(student.config):
            old = student.get_parameter(entry.ours[0])
            assign(student, entry.ours[0], torch.zeros(old.shape, dtype=old.dtype))


def _read_film(student: Any, path: Path) -> None:
    """The vision towers with FiLM, which the released code saves whole, adapters unmerged."""
    # The file's names start at the wrapper around the backbone, or at the backbone.
    stored = renamed(
        merged_adapters(read_component(path)),
        lambda name: f"{FILM}.{name.removeprefix(f'{FILM}.')}",
        path,
        torch.equal,
    )
    own = dict(student.named_parameters())
    dtype = getattr(torch, student.config.dtype)
    towers = [e for e in keys.entries(student.config, own) if e.published.startswith(f"{FILM}.")]
    for entry in (*keys.film_entries(student.config), *towers):
        value = stored.get(entry.published)
        if value is None and entry in towers:
            continue  # only FiLM's own parameters must be here
        if value is None:
            raise CheckpointError(f"{path} has no {entry.published}; it holds no FiLM.")
        for name, part in zip(entry.ours, entry.read(value), strict=True):
            if part.shape != own[name].shape:
                raise CheckpointError(
                    f"{path}: {entry.published} gives {tuple(part.shape)}, expected {tuple(own[name].shape)}."
                )
            assign(student, name, part, dtype)


def merged_adapters(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vision tensors under plain names; LoRA (alpha = min(rank, 16), as released) is added to its weight."""
    plain: dict[str, Tensor] = {}
    for name, value in stored.items():
        if ".lora_" in name:
            continue
        stem = name.removesuffix(".base_layer.weight")
        if stem != name and f"{stem}.lora_A.default.weight" in stored:
            a, b = (stored[f"{stem}.lora_{part}.default.weight"].float() for part in "AB")
            merged = value.float() + b @ a * (min(len(a), 16) / len(a))
            plain[f"{stem}.weight".replace(".block.", ".")] = merged.to(value.dtype)
        else:
            plain[name.replace(".base_layer.", ".").replace(".block.", ".")] = value
    return plain


def _load_head(module: nn.Module, stored: Mapping[str, Tensor], path: Path) -> None:
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    shapes = [
        f"{k}: {tuple(stored[k].shape)} stored, {tuple(own[k].shape)} expected"
        for k in sorted(own.keys() & stored.keys())
        if own[k].shape != stored[k].shape
    ]
    if missing or unexpected or shapes:
        raise CheckpointError(
            f"{path} does not fit: missing {missing[:5]}, unexpected {unexpected[:5]}, "
            f"of another shape {shapes[:3]}. Check width, action_dim and state_dim."
        )
    module.load_state_dict({name: value.float() for name, value in stored.items()})


def _set_statistics(student: Any, folder: Path, stored: Mapping[str, Any], name: str) -> None:
    statistics = read_statistics(folder, stored)
    chosen = choose_statistics(statistics, name, folder)
    entry, config = statistics[chosen], student.config
    set_from_published(student.action_bounds, entry, "action", config.norm, f"{folder}, {chosen!r}")
    if student.state_bounds is not None:
        set_from_published(student.state_bounds, entry, "proprio", config.norm, f"{folder}, {chosen!r}")
    student.dataset_name = chosen


def save(student: Any, folder: Path) -> None:
    """Write the published layout into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    own, config = dict(student.named_parameters()), student.config
    state: dict[str, Tensor] = {}
    for entry in keys.entries(config, own):
        state[entry.published] = entry.write([own[name].detach().cpu() for name in entry.ours]).contiguous()
    position = own["vision.dino.embeddings.position_embeddings"].detach().cpu()
    cls = f"{keys.DINO}cls_token"
    state[cls] = state[cls] + position[:, :1]  # they only ever occur as a sum
    state |= student.unused or keys.fresh_unused(config, getattr(torch, config.dtype))
    save_torch_state_dict(state, folder, max_shard_size="5GB")
    for name in HEADS:
        module = getattr(student, name)
        if module is not None:
            _write_component(folder, name, {f"module.{k}": v for k, v in module.state_dict().items()})
    if config.film:
        film = {e.published: own[e.ours[0]] for e in keys.film_entries(config)}
        _write_component(folder, FILM, film)
    for name, content in student.assets.items():
        (folder / name).write_bytes(content)
    statistics = {student.dataset_name: _published_statistics(student)}
    write_json(folder / STATISTICS_FILE, statistics)
    write_json(folder / CONFIG_FILE, published_config(config, statistics))


def _write_component(folder: Path, name: str, state: Mapping[str, Tensor]) -> None:
    content = {key: value.detach().cpu().clone() for key, value in state.items()}
    replace_file(folder / f"{name}--latest_checkpoint.pt", lambda path: torch.save(content, path))


def _published_statistics(student: Any) -> dict[str, Any]:
    found = {"action": student.action_bounds.published()}
    if student.state_bounds is not None:
        found["proprio"] = student.state_bounds.published()
    return found
