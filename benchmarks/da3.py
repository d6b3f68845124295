"""Our Depth Anything 3 backbone against the original and against our VGGT-1B: same process, alternating.

OMP_NUM_THREADS=1 python -m benchmarks.da3 --original CHECKOUT

CHECKOUT is a folder that holds the original's `depth_anything_3` package (PyPI `depth-anything-3`, or `src`
of github.com/ByteDance-Seed/Depth-Anything-3). Weights are random; every parameter is drawn. Times are
wall-clock and processor seconds, which other people's load disturbs less. Memory is the peak over the loaded
model during one forward in a process of its own, after one at 28 px that loads the code.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from benchmarks.common import show
from benchmarks.teacher import Forward, Undrawn
from spatial_forcing.alignment import Views
from spatial_forcing.memory import peak_over
from spatial_forcing.teachers.da3 import BASE, DA3, DA3Teacher
from spatial_forcing.teachers.preprocess import IMAGENET_MEAN, IMAGENET_STD
from spatial_forcing.teachers.vggt import VGGT, VGGTConfig, VGGTTeacher

Which = Literal["original", "ours fp32", "ours bf16"]
LAYER = 11


def main(
    original: Path,
    views: int = 2,
    resolution: int = 504,
    repeats: int = 3,
    vggt: bool = True,
    memory_of: Which | None = None,
) -> None:
    """Print times, ratios, agreement and peak memory of DA3-BASE.

    Args:
        original: folder with the original `depth_anything_3` package.
        views, resolution: of the input.
        repeats: rounds; in each, every implementation runs once.
        vggt: also run this package's VGGT-1B at 518 px.
        memory_of: (what a process of its own runs) print this implementation's peak and stop.
    """
    sys.path.insert(0, str(original))
    # On 256 levels, so that the teacher's preprocessing changes nothing.
    images = torch.randint(0, 256, (1, views, 3, resolution, resolution)) / 255
    model = original_model()
    if memory_of is not None:
        run = original_forward(model) if memory_of == "original" else our_forward(model, memory_of)
        del model
        run(images[..., :28, :28])
        print(json.dumps({"peak": peak_over(lambda: run(images))}))
        return
    print(f"DA3-BASE, {views} views at {resolution} px, {torch.get_num_threads()} threads")
    runs: dict[str, Forward] = {"original": original_forward(model)}
    for kind in ("ours fp32", "ours bf16"):
        runs[kind] = our_forward(model, kind)
    if vggt:
        runs["our VGGT-1B fp32, 518 px"] = vggt_forward()
    compare(runs, images, repeats)
    sizes: dict[str, float] = {}
    for which in ("original", "ours fp32", "ours bf16"):
        command = [sys.executable, "-m", "benchmarks.da3", *sys.argv[1:], "--memory-of", which]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        sizes[which] = float(json.loads(done.stdout.splitlines()[-1])["peak"])
        ratio = sizes[which] / sizes["original"]
        print(f"{which}: peak {sizes[which] / 1e6:,.0f} MB over the loaded process, ratio {ratio:.2f}")


def compare(runs: dict[str, Forward], images: Tensor, repeats: int) -> None:
    """Time every implementation in turns, and say how far the outputs are apart."""
    for run in runs.values():
        run(images[..., :28, :28])
    busy: dict[str, list[float]] = {name: [] for name in runs}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    outputs: dict[str, Tensor] = {}
    for number in range(repeats):
        for name in list(runs) if number % 2 == 0 else list(runs)[::-1]:
            started, used = time.perf_counter(), time.process_time()
            outputs[name] = runs[name](images)
            wall[name].append(time.perf_counter() - started)
            busy[name].append(time.process_time() - used)
    for name in runs:
        show(f"{name}, wall s", wall[name])
        show(f"{name}, processor s", busy[name])
        for other in ("original", "our VGGT-1B fp32, 518 px"):
            if name.startswith("ours") and other in runs:
                ratios = [a / b for a, b in zip(busy[name], busy[other], strict=True)]
                show(f"{name} / {other}, processor", ratios)
        if name.startswith("ours"):
            gap = (outputs[name] - outputs["original"]).abs().max() / outputs["original"].abs().max()
            print(f"  {name}: largest difference {float(gap):.1e} of the largest feature")


def original_model() -> nn.Module:
    """The original DA3-BASE backbone, all parameters drawn."""
    from depth_anything_3.model.dinov2.dinov2 import DinoV2  # of the checkout

    torch.manual_seed(0)
    with Undrawn():
        model = DinoV2("vitb", [5, 7, 9, 11], alt_start=4, qknorm_start=4, rope_start=4, cat_token=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.1)
            elif name.endswith("gamma"):
                parameter.normal_(0.3, 0.1)
            else:
                parameter.normal_(0.0, 0.02)
    return model.eval().requires_grad_(False)


def original_forward(model: Any) -> Forward:
    """The original's features of the last layer, in float32."""

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        outputs = model((images - mean) / std, ref_view_strategy="first")[0]
        tokens: Tensor = outputs[-1][0]
        return tokens

    return run


def our_forward(original: nn.Module, kind: str) -> Forward:
    """The teacher with the same weights."""
    with torch.device("meta"):
        model = DA3(BASE, heads=False)
    state = {key.replace("pretrained.", "backbone."): value for key, value in original.state_dict().items()}
    model.load_state_dict(state, assign=True)
    dtype = torch.bfloat16 if kind.endswith("bf16") else torch.float32
    teacher = DA3Teacher(model, name="benchmark", licence="Apache-2.0", dtype=dtype)

    def run(images: Tensor) -> Tensor:
        teacher.resolution = images.shape[-1]
        (features,) = teacher.features(Views.create(images), (LAYER,))
        return features.flatten(2, 3)

    return run


def vggt_forward() -> Forward:
    """Our VGGT-1B in float32 with constant weights, at 518 px whatever it is given."""
    with Undrawn():
        model = VGGT(VGGTConfig(), heads=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    teacher = VGGTTeacher(model, name="benchmark", licence="Apache-2.0")

    def run(images: Tensor) -> Tensor:
        teacher.resolution = 28 if images.shape[-1] == 28 else 518
        return teacher.features(Views.create(images))[0]

    return run


if __name__ == "__main__":
    tyro.cli(main)
