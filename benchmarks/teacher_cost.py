"""What every registered teacher costs: two views at its own size, against VGGT-1B in the same process.

OMP_NUM_THREADS=1 python -m benchmarks.teacher_cost

Weights are constant: times do not depend on them, and nothing is downloaded. `spatial-forcing teacher list`
shows the ratios (`TeacherFacts.cost`), the parameters that run and the channels, all of which this prints.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
import tyro

from benchmarks.common import show
from benchmarks.teacher import Undrawn
from spatial_forcing.alignment import Views
from spatial_forcing.protocols import Teacher
from spatial_forcing.teachers import load_teacher
from spatial_forcing.teachers.da3 import DA3, DA3Teacher
from spatial_forcing.teachers.da3.teacher import DA3_CARDS
from spatial_forcing.teachers.image import FAMILIES, ImageTeacher
from spatial_forcing.teachers.moge import MOGE_CARDS
from spatial_forcing.teachers.vggt import VGGT, VGGTConfig, VGGTTeacher

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
DINO, DINO3 = {"patch_size": 14, "image_size": 518}, {"patch_size": 16, "image_size": 224}
SO400M = {
    "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304,
    "patch_size": 14, "image_size": 384,
}  # fmt: skip
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
SIGLIP_BASE = {**BASE, "intermediate_size": 3072, "patch_size": 16, "image_size": 224}
IMAGE_TEACHERS: Mapping[str, tuple[str, dict[str, Any], int]] = {
    "facebook/dinov2-base": ("dinov2", {**BASE, **DINO}, 224),
    "facebook/dinov2-large": ("dinov2", {**LARGE, **DINO}, 224),
    "facebook/dinov2-with-registers-large": ("dinov2_with_registers", {**LARGE, **DINO}, 224),
    # Their encoders are DINOv2's.
    "depth-anything/Depth-Anything-V2-Small-hf": ("dinov2", {**SMALL, **DINO}, 518),
    "depth-anything/Depth-Anything-V2-Large-hf": ("dinov2", {**LARGE, **DINO}, 518),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": (
        "dinov3_vit", {**BASE, **DINO3, "intermediate_size": 3072, "num_register_tokens": 4}, 224,
    ),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": (
        "dinov3_vit", {**LARGE, **DINO3, "intermediate_size": 4096, "num_register_tokens": 4}, 224,
    ),
    "facebook/vjepa2-vitl-fpc64-256": ("vjepa2", {**LARGE, "crop_size": 256, "patch_size": 16}, 256),
    "nvidia/C-RADIOv4-H": (
        "radio",
        {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 16}, 224,
    ),
    "google/tipsv2-b14": ("tipsv2_vision_model", {**BASE, "patch_size": 14, "image_size": 448}, 448),
    "google/siglip2-base-patch16-224": ("siglip_vision_model", SIGLIP_BASE, 224),
    "google/siglip2-so400m-patch14-384": ("siglip_vision_model", SO400M, 378),
    "google/siglip-base-patch16-224": ("siglip_vision_model", SIGLIP_BASE, 224),
    "google/siglip-so400m-patch14-384": ("siglip_vision_model", SO400M, 378),
}  # fmt: skip
"""Family, sizes and resolution of those whose config.json is on the hub."""


def main(repeats: int = 3, only: tuple[str, ...] = ()) -> None:
    """Print processor seconds, the ratio to VGGT-1B, parameters and channels of every teacher.

    Args:
        repeats: rounds of each teacher; VGGT-1B runs as often.
        only: names; empty: all.
    """
    reference = measure("facebook/VGGT-1B", vggt, repeats)
    for name, make in makers().items():
        if not only or name in only:
            seconds = measure(name, make, repeats)
            middle = sorted(seconds)[len(seconds) // 2] / sorted(reference)[len(reference) // 2]
            print(f"  {name}: {middle:.4f} of VGGT-1B", flush=True)


def measure(name: str, make: Callable[[], Any], repeats: int) -> list[float]:
    """Processor seconds of encoding two views."""
    gc.collect()
    with Undrawn():
        teacher: Teacher = make()
    side = teacher.resolution
    views = Views.create(torch.rand(1, 2, 3, side, side))
    modules: Sequence[Any] = [getattr(teacher.model, part, None) for part in ("aggregator", "backbone")]  # type: ignore[attr-defined]
    module = next((m for m in modules if m is not None), teacher.model)  # type: ignore[attr-defined]
    millions = sum(p.numel() for p in module.parameters()) / 1e6
    print(f"{name}: {millions:.1f} M parameters, {teacher.dim} channels, {side} px", flush=True)
    teacher.features(views)
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        teacher.features(views)
        seconds.append(time.process_time() - started)
    show(f"{name}, processor s", seconds)
    return seconds


def vggt() -> VGGTTeacher:
    model = filled(VGGT(VGGTConfig(), heads=False))
    return VGGTTeacher(model, name="facebook/VGGT-1B", licence="CC-BY-NC-4.0")


def makers() -> dict[str, Callable[[], Any]]:
    """By name, what builds each teacher without a download."""
    found: dict[str, Callable[[], Any]] = {"vggt-nano": lambda: load_teacher("vggt-nano")}
    for name in DA3_CARDS:
        found[name] = lambda name=name: DA3Teacher(
            filled(DA3(DA3_CARDS[name], heads=False)), name=name, licence="", views=views_of(name)
        )
    for name in IMAGE_TEACHERS:
        found[name] = lambda name=name: image_teacher(name)
    for name in MOGE_CARDS:
        found[name] = lambda name=name: load_teacher(f"random:{name}")
    return found


def views_of(name: str) -> Any:
    return "together" if DA3_CARDS[name].any_view else "alone"


def image_teacher(name: str) -> ImageTeacher:
    kind, sizes, resolution = IMAGE_TEACHERS[name]
    family = FAMILIES[kind]
    model_class = getattr(transformers, family.model)
    with torch.device("meta"):  # drawing initial weights would take longer than a forward
        model = model_class(model_class.config_class(**sizes))
    core: Any = filled(family.core(model.to_empty(device="cpu")))
    mean, std = ((0.0,) * 3, (1.0,) * 3) if family.own_pixels else (family.mean, family.std)
    return ImageTeacher(core, family, name=name, licence="", resolution=resolution, mean=mean, std=std)


def filled(model: Any) -> Any:
    with torch.no_grad():
        for parameter in (*model.parameters(), *model.buffers()):
            parameter.fill_(0.01 if parameter.is_floating_point() else 0)
    return model


if __name__ == "__main__":
    tyro.cli(main)
