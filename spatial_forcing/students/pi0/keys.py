"""Names of pi0's weights: openpi's PyTorch layout, LeRobot's (`model.` before it), transformers'.

Files hold the tied token embedding once, as `lm_head` (openpi, LeRobot) or `embed_tokens`, or twice and
equal; either restores both. Nothing may be missing or left over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from spatial_forcing.errors import CheckpointError
from spatial_forcing.students.weights import renamed

T = TypeVar("T")

PALIGEMMA = "paligemma_with_expert.paligemma."
EXPERT = "paligemma_with_expert.gemma_expert."
_EMBED_ACTION = ("state_proj.", "action_in_proj.", "action_time_mlp_in.", "action_time_mlp_out.")
_PI05 = ("time_mlp_in.", "time_mlp_out.")
_SHOWN = 6

# openpi's prefix -> transformers', first match wins.
_PREFIXES = (
    (PALIGEMMA + "lm_head.", "model.vlm.language_model.embed_tokens."),
    (PALIGEMMA + "model.vision_tower.vision_model.", "model.vlm.vision_tower."),
    (PALIGEMMA + "model.", "model.vlm."),
    (EXPERT + "lm_head.", "model.dit.embed_tokens."),
    (EXPERT + "model.", "model.dit."),
    *((name, "embed_action_time." + name) for name in _EMBED_ACTION),
    ("action_out_proj.", "action_out_proj."),
)


def rename(name: str, nested_vision: bool = False) -> str:
    """The name in transformers' `PI0ForConditionalGeneration` of a weight in openpi's layout.

    Args:
        name: in openpi's layout.
        nested_vision: older transformers keep SigLIP's weights one level deeper, in `vision_model`.

    Raises:
        CheckpointError: pi0 has no such weight.
    """
    for old, new in _PREFIXES:
        if name.startswith(old):
            renamed = new + name.removeprefix(old)
            if nested_vision:
                return renamed.replace("vlm.vision_tower.", "vlm.vision_tower.vision_model.", 1)
            return renamed
    raise CheckpointError(f"{name!r} is not a weight of pi0; is this another model's checkpoint?")


def to_transformers(
    stored: Mapping[str, T], own: Iterable[str], place: str, same: Callable[[T, T], bool]
) -> dict[str, T]:
    """Bring a checkpoint in any of the three layouts under transformers' names, ties restored.

    Args:
        stored: weights by name.
        own: the names that the model has.
        place: the file, for messages.
        same: whether two weights are equal.

    Raises:
        CheckpointError: weights are missing or left over, are those of pi0.5, or two that are tied differ.
    """
    wanted = set(own)
    names = set(stored)
    if any(name.removeprefix("model.").startswith(_PI05) for name in names):
        raise CheckpointError(
            f"{place} holds pi0.5, which transformers does not build; train it through LeRobot with "
            "--policy.type=pi05_sf (see docs/lerobot.md)."
        )
    if any("vlm.language_model." in name for name in names):
        result = {**stored}
    else:
        nested = any("vision_tower.vision_model." in name for name in wanted)
        result = renamed(stored, lambda name: rename(name.removeprefix("model."), nested), place, same)
    missing, unexpected = sorted(wanted - result.keys()), sorted(result.keys() - wanted)
    if missing or unexpected:
        raise CheckpointError(
            f"{place} does not fit this pi0: {len(missing)} missing ({_some(missing)}), {len(unexpected)} "
            f"unexpected ({_some(unexpected)}). Give the whole checkpoint, and the `size` it was trained "
            "with."
        )
    return result


def to_openpi(state: Mapping[str, T]) -> dict[str, T]:
    """The inverse: transformers' names to openpi's, the tied embedding once, as openpi saves it."""
    result = {}
    for name, value in state.items():
        flat = name.replace("vlm.vision_tower.vision_model.", "vlm.vision_tower.", 1)
        for old, new in _PREFIXES:
            if flat.startswith(new):
                result[old + flat.removeprefix(new)] = value
                break
        else:
            raise CheckpointError(f"{name!r} is not a weight of transformers' pi0.")
    return result


def _some(names: list[str]) -> str:
    more = f", ... {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more
