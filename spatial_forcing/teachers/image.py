"""2D teachers through transformers: DINOv2, SigLIP, Depth Anything V2. They see every view alone.

The controls for a 3D teacher: the paper's ablation aligns with DINOv2 and SigLIP instead of VGGT.

Shapes: B batch, V views, N images, h x w patch grid, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from spatial_forcing.alignment import Views
from spatial_forcing.errors import CheckpointError
from spatial_forcing.teachers.cards import (
    RANDOM,
    RANDOM_LICENCE,
    TEACHERS,
    UNKNOWN_LICENCE,
    Framing,
    TeacherCard,
    check_variant,
)
from spatial_forcing.teachers.frozen import DEFAULT_MEMORY, FrozenTeacher, lower_weights, random_stream
from spatial_forcing.teachers.layers import resolve_layers
from spatial_forcing.teachers.preprocess import IMAGENET_MEAN, IMAGENET_STD, Framed, frame

RESIZE_RULE = "bicubic, antialias, clamp, fit to whole patches, v1"
"""Part of the fingerprint: change it when the arithmetic changes."""


@dataclass(frozen=True)
class Family:
    """How one kind of checkpoint is read.

    Attributes:
        model: name of its class in transformers.
        core: its vision transformer, from the loaded model.
        blocks: the transformer's blocks.
        norm: its final norm, applied to every layer's output, as DINOv2's own feature extraction does.
        mean, std: of the pixels, where the checkpoint names none.
        call: further arguments of the transformer's forward.
    """

    model: str
    core: Callable[[Any], nn.Module]
    blocks: Callable[[Any], Sequence[nn.Module]]
    norm: Callable[[Any], nn.Module]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    call: Mapping[str, Any] | None = None


def _dino(model: str, core: Callable[[Any], nn.Module] = lambda model: model) -> Family:
    return Family(model, core, lambda vit: vit.encoder.layer, lambda vit: vit.layernorm)


_SIGLIP = Family(
    "SiglipVisionModel",
    lambda model: model,
    lambda model: getattr(model, "vision_model", model).encoder.layers,
    lambda model: getattr(model, "vision_model", model).post_layernorm,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    call={"interpolate_pos_encoding": True},
)

FAMILIES: dict[str, Family] = {
    "dinov2": _dino("Dinov2Model"),
    "dinov2_with_registers": _dino("Dinov2WithRegistersModel"),
    "depth_anything": _dino("DepthAnythingForDepthEstimation", lambda model: model.backbone),
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
}
"""By `model_type` of the checkpoint's `config.json`."""


class _Enough(Exception):
    """The last asked block has run."""


class ImageTeacher(FrozenTeacher):
    """A frozen 2D vision transformer that implements `protocols.Teacher`.

    Layer k is the output of block k through the model's final norm; blocks after the last asked one, pooling
    and depth heads do not run.

    Args:
        model: transformers' vision model, or the backbone of its depth model.
        family: its kind.
        mean, std: of the pixels.
        name, licence, resolution, dtype, framing, memory: see `FrozenTeacher`.
        compile: True compiles the blocks with `torch.compile`; a text names its backend.

    Raises:
        ConfigError: like `FrozenTeacher`.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        *,
        name: str,
        licence: str,
        resolution: int,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype = torch.float32,
        framing: Framing = "fit",
        memory: int = DEFAULT_MEMORY,
        compile: bool | str = False,
    ) -> None:
        self.model: Any = model
        self.family, self.mean, self.std = family, tuple(mean), tuple(std)
        self._blocks = list(family.blocks(model))
        super().__init__(
            model,
            name=name,
            licence=licence,
            resolution=resolution,
            dtype=dtype,
            framing=framing,
            memory=memory,
        )
        lower_weights(model, dtype)
        if compile:
            for block in self._blocks:
                block.compile(backend="inductor" if compile is True else compile)

    @property
    def dim(self) -> int:
        """C, channels of one feature."""
        return int(self.model.config.hidden_size)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    @property
    def patch(self) -> int:
        """Pixels on a side of one patch."""
        return int(self.model.config.patch_size)

    def _weights(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())

    def _facts(self) -> dict[str, Any]:
        config = {k: v for k, v in self.model.config.to_dict().items() if k != "transformers_version"}
        facts = {"config": config, "mean": self.mean, "std": self.std, "resize": RESIZE_RULE}
        return json.loads(json.dumps(facts, default=str))

    def _bytes(self, views: int, height: int, width: int, layers: int) -> int:
        config = self.model.config
        hidden = getattr(config, "intermediate_size", 0) or config.hidden_size * getattr(
            config, "mlp_ratio", 4
        )
        tokens = views * (8 + (height // self.patch) * (width // self.patch))
        return int(4 * tokens * (config.hidden_size * (8 + layers) + 2 * hidden))

    def _frame(self, images: Tensor, valid: Tensor) -> Framed:
        return frame(images, valid, self.resolution, self.patch, self.framing, antialias=True)

    @torch.no_grad()
    def features(self, views: Views, layers: Sequence[int] = (-1,)) -> tuple[Tensor, ...]:
        """Patch features of the asked layers, one (B, V, h, w, C) float32 tensor each; absent views are zero.

        Raises:
            ConfigError: a layer does not exist.
        """
        wanted = resolve_layers(layers, self.depth)
        grid = self._grid(*views.images.shape[-2:])
        results = tuple(
            torch.zeros(*views.present.shape, *grid, self.dim, device=self.device) for _ in wanted
        )
        for rows, columns, framed in self._scenes(views, len(set(wanted))):
            encoded = self._encode(framed.images.clamp(0, 1), wanted)
            height, width = (side // self.patch for side in framed.images.shape[-2:])
            for result, layer in zip(results, wanted, strict=True):
                # Class and register tokens come first.
                patches = encoded[layer][:, -height * width :].unflatten(1, (height, width))
                values = self._without_padding(patches, framed, grid)
                result[rows[:, None], columns] = values.unflatten(0, (len(rows), len(columns)))
        return results

    def _encode(self, images: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """Normed outputs (N, tokens, C) of the blocks `layers`, by block."""
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        outputs: dict[int, Tensor] = {}

        def keep(layer: int, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs[layer] = output if isinstance(output, Tensor) else output[0]
            if layer == max(layers):
                raise _Enough

        with ExitStack() as hooks, self._precision():
            for layer in set(layers):
                hook = self._blocks[layer].register_forward_hook(lambda _, __, out, k=layer: keep(k, out))
                hooks.callback(hook.remove)
            with suppress(_Enough):
                self.model(pixel_values=(images - mean) / std, **(self.family.call or {}))
            norm = self.family.norm(self.model)
            return {layer: norm(output.float()).float() for layer, output in outputs.items()}


def read_settings(source: str) -> dict[str, Any]:
    """The `config.json` of a folder or hub id; empty where there is none, or where `source` is a file."""
    return _read_json(source, "config.json", optional=True)


def load_image_teacher(
    source: str,
    card: TeacherCard | None,
    *,
    resolution: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
    heads: bool,
    random_weights: bool = False,
    variant: Mapping[str, str],
    **options: Any,
) -> ImageTeacher:
    """The loader of DINOv2, SigLIP and Depth Anything checkpoints. `heads` has no effect: none is built.

    Raises:
        CheckpointError: missing, damaged or foreign weights.
        ConfigError: the resolution is not a multiple of the patch size.
    """
    check_variant(source, variant, {})
    kind = _read_json(source, "config.json").get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(
            f"{source!r} is a checkpoint of type {kind!r}; 2D teachers are {', '.join(sorted(FAMILIES))}."
        )
    family = FAMILIES[kind]
    core: Any = family.core(_random(source, family) if random_weights else _pretrained(source, family))
    settings = _read_json(source, "preprocessor_config.json", optional=True)
    patch, own = int(core.config.patch_size), _own_resolution(settings, core.config)
    return ImageTeacher(
        core.to(device),
        family,
        name=RANDOM + source if random_weights else source,
        licence=RANDOM_LICENCE if random_weights else card.licence if card is not None else UNKNOWN_LICENCE,
        resolution=own // patch * patch if resolution is None else resolution,
        mean=settings.get("image_mean", family.mean),
        std=settings.get("image_std", family.std),
        dtype=dtype,
        **options,
    )


def _pretrained(source: str, family: Family) -> Any:
    kind = getattr(transformers, family.model)
    try:
        model, report = kind.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{source!r} cannot be read as {family.model}: {str(error).rstrip('. ')}. Check the name and the "
            "connection, or download it elsewhere and give the folder."
        ) from error
    # transformers would start with random values and only warn.
    if lost := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{source!r} lacks {len(lost)} weights of {family.model}: {', '.join(lost[:5])}. Use a whole "
            "checkpoint of that kind."
        )
    return model


def _random(source: str, family: Family) -> Any:
    kind = getattr(transformers, family.model)
    with random_stream(0):
        return kind(kind.config_class.from_pretrained(source))


def _own_resolution(settings: Mapping[str, Any], config: Any) -> int:
    """What the checkpoint's image processor produces, else what the model was trained at."""
    size = settings.get("crop_size") or settings.get("size") or {}
    return int(size.get("height", config.image_size) if isinstance(size, Mapping) else size)


def _read_json(source: str, name: str, optional: bool = False) -> dict[str, Any]:
    """A JSON file of a folder or hub id. Raises `CheckpointError` when it is not there or malformed."""
    path = Path(source) / name
    try:
        if not Path(source).exists():
            path = Path(hf_hub_download(source, name))
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # every hub error derives from one of them
        if optional:
            return {}
        raise CheckpointError(f"{name} of {source!r} cannot be read: {str(error).rstrip('. ')}.") from error


def _card(name: str, licence: str, note: str, commercial: str | None = None) -> None:
    TEACHERS.add(name, TeacherCard(name, load_image_teacher, licence, note, commercial))


_card("facebook/dinov2-base", "Apache-2.0", "2D control: DINOv2 ViT-B, 768 channels.")
_card("facebook/dinov2-large", "Apache-2.0", "2D control: DINOv2 ViT-L, 1024 channels.")
_card("facebook/dinov2-with-registers-large", "Apache-2.0", "2D control: DINOv2 ViT-L with registers.")
_card("google/siglip-base-patch16-224", "Apache-2.0", "2D control: SigLIP ViT-B, 768 channels.")
_card("google/siglip-so400m-patch14-384", "Apache-2.0", "2D control: SigLIP so400m, 1152 channels.")
_card(
    "depth-anything/Depth-Anything-V2-Small-hf",
    "Apache-2.0",
    "2D control that has learned depth from single images: its DINOv2 ViT-S, 384 channels.",
)
_card(
    "depth-anything/Depth-Anything-V2-Large-hf",
    "CC-BY-NC-4.0",
    "2D control that has learned depth from single images: its DINOv2 ViT-L. Not for commercial use.",
    "depth-anything/Depth-Anything-V2-Small-hf",
)
