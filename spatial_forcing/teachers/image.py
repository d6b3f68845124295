"""Teachers through transformers: DINO, SigLIP, V-JEPA, RADIO, depth models. They see every view alone.

The controls for a 3D teacher: the paper's ablation aligns with DINOv2 and SigLIP instead of VGGT.

Shapes: B batch, V views, N images, h x w patch grid, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.teachers.cards import (
    RANDOM,
    RANDOM_LICENCE,
    TEACHERS,
    UNKNOWN_LICENCE,
    Framing,
    TeacherCard,
    TeacherFacts,
    check_variant,
)
from spatial_forcing.teachers.frozen import DEFAULT_MEMORY, GridTeacher, lower_weights, random_stream
from spatial_forcing.teachers.preprocess import ANTIALIASED_RULE, IMAGENET_MEAN, IMAGENET_STD, Framed, frame


@dataclass(frozen=True)
class Family:
    """How one kind of checkpoint is read.

    Attributes:
        model: name of its class in transformers.
        core: its vision transformer, from the loaded model.
        blocks: the transformer's blocks.
        norm: its final norm, applied to every layer's output, as DINOv2's own feature extraction does.
        mean, std: of the pixels, where the checkpoint names none.
        inputs: arguments of the transformer's forward, from normalised pixels (N, 3, H, W) and its config.
        own_pixels: the network normalises pixels itself and is given [0, 1].
        fixed: it knows the positions of one square grid only.
        needs: the first version of transformers that has it, where this package accepts earlier ones.
    """

    model: str
    core: Callable[[Any], nn.Module]
    blocks: Callable[[Any], Sequence[nn.Module]]
    norm: Callable[[Any], nn.Module]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    inputs: Callable[[Tensor, Any], Mapping[str, Any]] = lambda pixels, _: {"pixel_values": pixels}
    own_pixels: bool = False
    fixed: bool = False
    needs: str | None = None


def _whole(model: Any) -> nn.Module:
    return cast(nn.Module, model)


def _dino(model: str, core: Callable[[Any], nn.Module] = _whole, needs: str | None = None) -> Family:
    return Family(model, core, lambda vit: vit.encoder.layer, lambda vit: vit.layernorm, needs=needs)


def _siglip(model: str, inputs: Callable[[Tensor, Any], Mapping[str, Any]]) -> Family:
    def inner(model: Any) -> Any:  # transformers dropped the level in between
        return getattr(model, "vision_model", model)

    return Family(
        model,
        _whole,
        lambda model: inner(model).encoder.layers,
        lambda model: inner(model).post_layernorm,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        inputs=inputs,
    )


def _patchified(pixels: Tensor, config: Any) -> dict[str, Tensor]:
    """What SigLIP 2 of any aspect ratio takes: flat patches, channels last, and how many rows and columns."""
    patch = config.patch_size
    grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
    cells = pixels.unflatten(-1, (grid[1], patch)).unflatten(2, (grid[0], patch))
    patches = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    shapes = torch.tensor(grid, device=pixels.device).expand(len(pixels), 2)
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device)
    return {"pixel_values": patches, "spatial_shapes": shapes, "pixel_attention_mask": mask}


def _still(pixels: Tensor, config: Any) -> dict[str, Any]:
    """A video of one token's length in which nothing moves."""
    video = pixels[:, None].expand(-1, config.tubelet_size, -1, -1, -1)
    return {"pixel_values_videos": video, "skip_predictor": True}


def _beit_blocks(backbone: Any) -> Sequence[nn.Module]:
    vit = getattr(backbone, "beit", backbone)  # transformers moved the blocks twice
    return cast(Sequence[nn.Module], vit.layers if hasattr(vit, "layers") else vit.encoder.layer)


_SIGLIP = _siglip(
    "SiglipVisionModel", lambda pixels, _: {"pixel_values": pixels, "interpolate_pos_encoding": True}
)
_SIGLIP2 = _siglip("Siglip2VisionModel", _patchified)
_TIPS = Family(
    "Tipsv2VisionModel",
    _whole,
    lambda vit: vit.encoder.layer,
    lambda vit: vit.layernorm,
    own_pixels=True,  # it was trained on [0, 1]
    needs="5.16",
)

FAMILIES: dict[str, Family] = {
    "dinov2": _dino("Dinov2Model"),
    "dinov2_with_registers": _dino("Dinov2WithRegistersModel"),
    "depth_anything": _dino("DepthAnythingForDepthEstimation", lambda model: model.backbone),
    "depth_pro": _dino(
        "DepthProForDepthEstimation", lambda model: model.depth_pro.encoder.image_encoder.model
    ),
    "dinov3_vit": Family(
        "DINOv3ViTModel", _whole, lambda vit: getattr(vit, "model", vit).layer, lambda vit: vit.norm
    ),
    "radio": Family(
        "RadioModel",
        _whole,
        lambda model: model.encoder.layer,
        lambda _: nn.Identity(),
        own_pixels=True,
        needs="5.16",
    ),
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip2": _SIGLIP2,
    "siglip2_vision_model": _SIGLIP2,
    "tipsv2": _TIPS,
    "tipsv2_vision_model": _TIPS,
    "vjepa2": Family(
        "VJEPA2Model",
        _whole,
        lambda model: model.encoder.layer,
        lambda model: model.encoder.layernorm,
        inputs=_still,
        fixed=True,
    ),
    "zoedepth": Family(
        "ZoeDepthForDepthEstimation",
        lambda model: model.backbone,
        _beit_blocks,
        lambda _: nn.Identity(),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
}
"""By `model_type` of the checkpoint's `config.json`."""


DEFAULT_RESOLUTION = 256
"""Of a checkpoint that takes every size and names none: SigLIP 2's any-aspect models have 256 patches."""


class _Enough(Exception):
    """The last asked block has run."""


class ImageTeacher(GridTeacher):
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
        facts = {"config": config, "mean": self.mean, "std": self.std, "resize": ANTIALIASED_RULE}
        return json.loads(json.dumps(facts, default=str))

    def _bytes(self, views: int, height: int, width: int, layers: int) -> int:
        config = self.model.config
        hidden = getattr(config, "intermediate_size", 0) or config.hidden_size * getattr(
            config, "mlp_ratio", 4
        )
        tokens = views * (8 + (height // self.patch) * (width // self.patch))
        return int(4 * tokens * (config.hidden_size * (8 + layers) + 2 * hidden))

    def _size(self, height: int, width: int) -> tuple[int, int]:
        size = super()._size(height, width)
        if self.family.fixed and self.framing != "pad" and size[0] != size[1]:
            raise ConfigError(
                f"{self.name!r} encodes square views only, and these are {height} x {width}; load it with "
                "framing='pad' (`cache build --framing pad`)."
            )
        return size

    def _frame(self, images: Tensor, valid: Tensor) -> Framed:
        return frame(images, valid, self.resolution, self.patch, self.framing, antialias=True)

    def _encode(self, images: Tensor, layers: Sequence[int]) -> Sequence[Tensor]:
        """Normed outputs of the blocks `layers`; class and register tokens, which come first, are dropped."""
        grid = tuple(side // self.patch for side in images.shape[-2:])
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        pixels = (images.flatten(0, 1).clamp(0, 1) - mean) / std
        outputs: dict[int, Tensor] = {}

        def keep(layer: int, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs[layer] = output if isinstance(output, Tensor) else output[0]
            if layer == max(layers):
                raise _Enough

        with ExitStack() as hooks:
            for layer in set(layers):
                hook = self._blocks[layer].register_forward_hook(lambda _, __, out, k=layer: keep(k, out))
                hooks.callback(hook.remove)
            with suppress(_Enough):
                self.model(**self.family.inputs(pixels, self.model.config))
        norm, count = self.family.norm(self.model), grid[0] * grid[1]
        normed = {layer: norm(output.float()).float()[:, -count:] for layer, output in outputs.items()}
        return [normed[layer].unflatten(1, grid).unflatten(0, images.shape[:2]) for layer in layers]


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
        resolution=_resolution(source, family, own // patch * patch, resolution),
        mean=(0.0,) * 3 if family.own_pixels else settings.get("image_mean", family.mean),
        std=(1.0,) * 3 if family.own_pixels else settings.get("image_std", family.std),
        dtype=dtype,
        **options,
    )


def _resolution(source: str, family: Family, own: int, asked: int | None) -> int:
    if family.fixed and asked not in (None, own):
        raise ConfigError(f"{source!r} encodes {own} px only, not {asked}; leave the resolution out.")
    return own if asked is None else asked


def _pretrained(source: str, family: Family) -> Any:
    kind = _class(family)
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


def _class(family: Family) -> Any:
    kind = getattr(transformers, family.model, None)
    if kind is None:
        raise CheckpointError(
            f"transformers {transformers.__version__} has no {family.model}; install "
            f"transformers>={family.needs}. Where another package forbids that, build a feature cache in an "
            "environment of its own (docs/teachers.md): training reads the cache alone."
        )
    return kind


def _random(source: str, family: Family) -> Any:
    kind = _class(family)
    with random_stream(0):
        return kind(kind.config_class.from_pretrained(source))


def _own_resolution(settings: Mapping[str, Any], config: Any) -> int:
    """What the checkpoint's image processor produces, else what the model was trained at."""
    size = settings.get("crop_size") or settings.get("size") or {}
    if isinstance(size, Mapping):
        own = getattr(config, "image_size", None) or getattr(config, "crop_size", DEFAULT_RESOLUTION)
        return int(size.get("height", own))
    return int(size)


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


def _card(name: str, licence: str, note: str, facts: TeacherFacts, commercial: str | None = None) -> None:
    TEACHERS.add(name, TeacherCard(name, load_image_teacher, licence, note, commercial, facts=facts))


GATED = "Gated: accept its licence on the hub first."
_card("facebook/dinov2-base", "Apache-2.0", "DINOv2 ViT-B.", TeacherFacts(86.6, 768, 224, cost=0.012))
_card("facebook/dinov2-large", "Apache-2.0", "DINOv2 ViT-L.", TeacherFacts(304.4, 1024, 224, cost=0.048))
_card(
    "facebook/dinov2-with-registers-large",
    "Apache-2.0",
    "DINOv2 ViT-L with registers.",
    TeacherFacts(304.4, 1024, 224, cost=0.047),
)
_card(
    "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "LicenseRef-DINOv3",
    f"DINOv3 ViT-B. {GATED}",
    TeacherFacts(85.7, 768, 224, cost=0.011),
)
_card(
    "facebook/dinov3-vitl16-pretrain-lvd1689m",
    "LicenseRef-DINOv3",
    f"DINOv3 ViT-L. {GATED}",
    TeacherFacts(303.1, 1024, 224, cost=0.037),
)
_card(
    "facebook/vjepa2-vitl-fpc64-256",
    "MIT",
    "V-JEPA 2 ViT-L on a still; square views of 256 px only (framing 'pad' for others).",
    TeacherFacts(303.9, 1024, 256, cost=0.048),
)
_card(
    "nvidia/C-RADIOv4-H",
    "LicenseRef-NVIDIA-Open-Model",
    "RADIO ViT-H. Needs transformers 5.16.",
    TeacherFacts(651.7, 1280, 224, cost=0.075),
)
_card(
    "google/tipsv2-b14",
    "LicenseRef-see-its-card",
    "TIPSv2 ViT-B. Needs transformers 5.16.",
    TeacherFacts(86.3, 768, 448, cost=0.055),
)
_card(
    "google/siglip-base-patch16-224", "Apache-2.0", "SigLIP ViT-B.", TeacherFacts(92.9, 768, 224, cost=0.01)
)
_card(
    "google/siglip-so400m-patch14-384",
    "Apache-2.0",
    "SigLIP so400m.",
    TeacherFacts(428.2, 1152, 378, cost=0.18),
)
_card(
    "google/siglip2-base-patch16-224",
    "Apache-2.0",
    "SigLIP 2 ViT-B.",
    TeacherFacts(92.9, 768, 224, cost=0.01),
)
_card(
    "google/siglip2-so400m-patch14-384",
    "Apache-2.0",
    "SigLIP 2 so400m.",
    TeacherFacts(428.2, 1152, 378, cost=0.18),
)
_card(
    "apple/DepthPro-hf",
    "LicenseRef-Apple-AMLR",
    "Depth Pro's image encoder (DINOv2 ViT-L). Research only.",
    TeacherFacts(304.4, 1024, 384),
)
_card(
    "Intel/zoedepth-nyu-kitti",
    "MIT",
    "ZoeDepth's encoder (BEiT-L).",
    TeacherFacts(304.4, 1024, 384),
)
_card(
    "depth-anything/Depth-Anything-V2-Small-hf",
    "Apache-2.0",
    "Has learned depth from single images: its DINOv2 ViT-S.",
    TeacherFacts(22.1, 384, 518, cost=0.029),
)
_card(
    "depth-anything/Depth-Anything-V2-Large-hf",
    "CC-BY-NC-4.0",
    "Has learned depth from single images: its DINOv2 ViT-L. Not for commercial use.",
    TeacherFacts(304.4, 1024, 518, cost=0.32),
    "depth-anything/Depth-Anything-V2-Small-hf",
)
