"""Our VGGT aggregator against the original: same weights, same inputs, same process, alternating.

OMP_NUM_THREADS=2 python -m benchmarks.teacher --original CHECKOUT
python -m benchmarks.teacher --original CHECKOUT --device cuda --batch 8

CHECKOUT is a folder that holds the original's `vggt` package (github.com/facebookresearch/vggt, or the
`openvla-SF` of github.com/OpenHelix-Team/Spatial-Forcing). Weights are random; every parameter is drawn.
Times are wall-clock and, on a CPU, processor seconds, which other people's load disturbs less. Memory is the
peak over the loaded model during one forward in a process of its own, after one at 28 px that loads the code.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.common import show
from spatial_forcing.alignment import Views
from spatial_forcing.memory import peak_over
from spatial_forcing.teachers.cache.build import cosines
from spatial_forcing.teachers.vggt import VGGT, VGGTConfig, VGGTTeacher
from spatial_forcing.teachers.vggt.config import DinoV2Config, DPTConfig
from spatial_forcing.teachers.vggt.keys import from_published

Forward = Callable[[Tensor], Tensor]
Which = Literal["original", "ours"]


def main(
    original: Path,
    device: str = "cpu",
    batch: int = 1,
    views: int = 2,
    resolution: int = 518,
    repeats: int = 3,
    depth: int = 24,
    skip_time: bool = False,
    skip_memory: bool = False,
    memory_of: Which | None = None,
    dtype: Literal["fp32", "bf16"] | None = None,
) -> None:
    """Print times, ratios, agreement and peak memory.

    Args:
        original: folder with the original `vggt` package.
        device: cpu or cuda.
        batch, views, resolution: of the input.
        repeats: rounds; in each, every implementation runs once.
        depth: frame / global pairs, and DINOv2 blocks; 24 is the real size.
        skip_time, skip_memory: leave one of the measurements out.
        memory_of: (what a process of its own runs) print this implementation's peak and stop.
        dtype: of `memory_of`.
    """
    sys.path.insert(0, str(original))
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batch, views, 3, resolution, resolution, generator=generator)
    if memory_of is not None:
        print(json.dumps({"peak": peak_memory(memory_of, dtype == "bf16", depth, images, device)}))
        return
    print(f"{views} views at {resolution} px, batch {batch}, {depth} layers, {device}, {threads()} threads")
    if not skip_time:
        compare_times(images, device, depth, repeats)
    if not skip_memory:
        kinds = ("bf16",) if device != "cpu" else ("fp32", "bf16")
        shared = sys.argv[1:]
        for kind in kinds:
            sizes = {
                which: fresh_process([*shared, "--memory-of", which, "--dtype", kind])
                for which in (("original", "ours") if kind == kinds[0] else ("ours",))
            }
            for which, size in sizes.items():
                print(f"{which} {kind}: peak {size / 1e6:,.0f} MB over the loaded process")
            if "original" in sizes:
                print(f"  ratio {sizes['ours'] / sizes['original']:.3f}")


def threads() -> int:
    return torch.get_num_threads()


def compare_times(images: Tensor, device: str, depth: int, repeats: int) -> None:
    """One round runs the original, ours in its type, and (on a CPU) ours in bf16."""
    gpu = device != "cpu"
    model = original_model(depth)
    runs: dict[str, Forward] = {"original": original_forward(model, device, bf16=gpu)}
    if gpu:
        runs["ours bf16"] = our_forward(model, depth, torch.bfloat16, device)
    else:
        runs["ours fp32"] = our_forward(model, depth, torch.float32, device)
        runs["ours bf16"] = our_forward(model, depth, torch.bfloat16, device)
    small = images[..., :28, :28].to(device)
    for run in runs.values():
        run(small)
    images = images.to(device)
    wall: dict[str, list[float]] = {name: [] for name in runs}
    busy: dict[str, list[float]] = {name: [] for name in runs}
    outputs: dict[str, Tensor] = {}
    for number in range(repeats):
        order = list(runs) if number % 2 == 0 else list(runs)[::-1]
        for name in order:
            started, used = time.perf_counter(), time.process_time()
            outputs[name] = runs[name](images).cpu()
            wall[name].append(time.perf_counter() - started)
            busy[name].append(time.process_time() - used)
            print(f"  {name}: {wall[name][-1]:.1f} s wall, {busy[name][-1]:.1f} s processor", flush=True)
    for name in runs:
        show(f"{name}, s", wall[name])
        if name != "original":
            pairs = zip(wall[name], wall["original"], strict=True)
            show(f"{name} / original, wall", [a / b for a, b in pairs])
            if not gpu:
                pairs = zip(busy[name], busy["original"], strict=True)
                show(f"{name} / original, processor", [a / b for a, b in pairs])
            agreement(name, outputs[name], outputs["original"])


def agreement(name: str, ours: Tensor, theirs: Tensor) -> None:
    """How far outputs (B, S, h w, C) are apart."""
    tokens, reference = ours.flatten(0, 2).float(), theirs.flatten(0, 2).float()
    worst = float(F.cosine_similarity(tokens, reference, dim=-1).min())
    figures = cosines(reference, tokens)
    print(
        f"  {name}: largest difference {float((tokens - reference).abs().max()):.2e} of "
        f"{float(reference.abs().max()):.2e}; cosine mean {figures['cosine']:.6f}, worst {worst:.6f}, "
        f"mean removed {figures['cosine_mean_removed']:.6f}"
    )


def original_model(depth: int) -> nn.Module:
    """The original aggregator, all parameters drawn; LayerScale and norms stay near their usual size."""
    from vggt.models.aggregator import Aggregator  # of the checkout

    torch.manual_seed(0)
    model = Aggregator(depth=depth)
    model.patch_embed.blocks = model.patch_embed.blocks[:depth]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
                parameter.normal_(1.0, 0.1)
            elif name.endswith("gamma"):
                parameter.normal_(0.3, 0.1)
            elif parameter.ndim < 2 or "token" in name:
                parameter.normal_(0.0, 0.1)
    return model.eval().requires_grad_(False)


class Undrawn(TorchFunctionMode):
    """Leaves out the drawing of initial weights, which takes longer than a forward."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls `func`, unless it draws."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("uniform_", "normal_", "erfinv_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def constant_model(depth: int) -> nn.Module:
    """The original aggregator with every weight the same: memory does not depend on them."""
    from vggt.models.aggregator import Aggregator  # of the checkout

    with Undrawn():
        model = Aggregator(depth=depth)
    model.patch_embed.blocks = model.patch_embed.blocks[:depth]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    return model.eval().requires_grad_(False)


def original_forward(model: nn.Module, device: str, bf16: bool) -> Forward:
    """As the released recipe calls it: every layer's output is kept, the last one is used."""
    model.to(device)

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16) if bf16 else nullcontext():
            outputs, start = model(images)
        synchronise(device)
        return outputs[-1][:, :, start:]

    return run


def our_forward(original: nn.Module, depth: int, dtype: torch.dtype, device: str) -> Forward:
    """The teacher with the same weights; in float32 on a CPU they share their memory."""
    config = VGGTConfig(
        depth=depth, dinov2=DinoV2Config(depth=depth), dpt=DPTConfig(layers=(0, 0, 0, depth - 1))
    )
    with torch.device("meta"):
        model = VGGT(config, heads=False)
    state = {f"aggregator.{key}": value for key, value in original.state_dict().items()}
    model.load_state_dict(from_published(state, list(model.state_dict())), assign=True)
    teacher = VGGTTeacher(model, name="benchmark", licence="Apache-2.0", dtype=dtype).to(device)

    def run(images: Tensor) -> Tensor:
        teacher.resolution = images.shape[-1]
        (features,) = teacher.features(Views.create(images))
        synchronise(device)
        return features.flatten(2, 3)

    return run


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def fresh_process(arguments: list[str]) -> float:
    """The peak that this script prints in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.teacher", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak"])


def peak_memory(which: Which, bf16: bool, depth: int, images: Tensor, device: str) -> float:
    """Bytes at the peak of one forward; on a GPU with the weights, on a CPU over the loaded process."""
    model: Any = constant_model(depth)
    dtype = torch.bfloat16 if bf16 else torch.float32
    if which == "original":
        run = original_forward(model, device, bf16)
    else:
        run = our_forward(model, depth, dtype, device)
    del model
    run(images[..., :28, :28].to(device))
    if device != "cpu":
        images = images.to(device)
        torch.cuda.reset_peak_memory_stats()
        run(images)
        return float(torch.cuda.max_memory_allocated())
    return peak_over(lambda: run(images))


if __name__ == "__main__":
    tyro.cli(main)
