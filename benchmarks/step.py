"""A training step with cached spatial forcing against the same step with alpha 0: time, and on a GPU memory.

python -m benchmarks.step                                             # a decoder of 113 M parameters, CPU
python -m benchmarks.step --width 4096 --depth 32 --lora 32 --device cuda --batch 8 --dtype bf16  # 7 B size
python -m benchmarks.step --student nano

The decoder is transformers' Llama with random weights on two views of 256 visual tokens and 64 others; the
cache has VGGT-1B's 16 x 16 tokens, int8, with `--channels` coordinates each, and is read in every step. Both
arms train the same student with the same optimizer, in turns. Times are wall-clock and, on a CPU, processor
seconds.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import tyro
from torch import Tensor, nn

from benchmarks.cache import CAMERAS, noise_cache
from benchmarks.common import show
from spatial_forcing.alignment import Views
from spatial_forcing.forcing import ForcingConfig, SpatialForcing, as_student, layout_from_offset
from spatial_forcing.students import NanoConfig, NanoVLA
from spatial_forcing.teachers.cache import CachedTeacher

GRID, OTHERS, CHUNK, ACTIONS, FRAMES = (16, 16), 64, 8, 7, 512
VISUAL = len(CAMERAS) * GRID[0] * GRID[1]


class Decoder(nn.Module):
    """A Llama that predicts a chunk of actions from embeddings of visual and other tokens."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        config = transformers.LlamaConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=width // 64 if width < 4096 else 32,
            intermediate_size=round(8 / 3 * width / 256) * 256,
            vocab_size=32,
            use_cache=False,
        )
        self.llama: Any = transformers.LlamaModel(config)
        self.head = nn.Linear(width, ACTIONS)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean absolute error of the actions."""
        hidden = self.llama(inputs_embeds=batch["tokens"].to(self.head.weight.dtype)).last_hidden_state
        return (self.head(hidden[:, -CHUNK:]).float() - batch["action"]).abs().mean()


def decoder(width: int, depth: int, lora: int) -> nn.Module:
    """The student, with LoRA on all its linear layers where `lora` is a rank."""
    model = Decoder(width, depth)
    if lora:
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=lora, target_modules="all-linear"), model.llama)
    return as_student(
        model,
        blocks=model.llama.layers,
        layout=lambda batch: layout_from_offset(
            len(batch["tokens"]), len(CAMERAS), GRID, start=0, device=batch["tokens"].device
        ),
        views=lambda batch: Views.create(batch["images"], CAMERAS, keys=batch["index"]),
        loss=lambda model, batch: model(batch),
        final_norm=model.llama.norm,
    )


def main(
    student: Literal["decoder", "nano"] = "decoder",
    width: int = 768,
    depth: int = 16,
    lora: int = 0,
    batch: int = 1,
    channels: int = 256,
    steps: int = 4,
    device: str = "cpu",
    dtype: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Alternate steps of both arms; the first of each is not counted.

    Args:
        student: the decoder, or the nano VLA at its default size.
        width, depth: of the decoder.
        lora: rank; 0 trains everything.
        batch: samples a step.
        channels: stored a token in the cache; the projector has as many outputs.
        steps: counted pairs.
        device: cpu or cuda.
        dtype: of the student's weights.
    """
    torch.manual_seed(0)
    if student == "nano":
        model: nn.Module = NanoVLA(NanoConfig(CAMERAS, action_dim=ACTIONS, chunk=CHUNK))
    else:
        model = decoder(width, depth, lora)
    model.to(device, torch.bfloat16 if dtype == "bf16" else torch.float32)
    data = sample(model, batch, width, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    with tempfile.TemporaryDirectory() as folder:
        cached = CachedTeacher(noise_cache(Path(folder), FRAMES, channels), device=device)
        bare = SpatialForcing(model, None, ForcingConfig(alpha=0.0))
        step(bare, data, optimizer)
        without = gpu_peak(bare, data, optimizer, device)
        forced = SpatialForcing(model, cached)
        optimizer.add_param_group({"params": list(forced.projector.parameters())})  # type: ignore[union-attr]
        step(forced, data, optimizer)
        described(model, forced, student)
        arms = {"alpha 0": bare, "cached": forced}
        wall: dict[str, list[float]] = {name: [] for name in arms}
        busy: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(steps):
            for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
                started, used = time.perf_counter(), time.process_time()
                step(arms[name], data, optimizer)
                if device != "cpu":
                    torch.cuda.synchronize()
                wall[name].append(time.perf_counter() - started)
                busy[name].append(time.process_time() - used)
        for kind, times in (("wall", wall), ("processor", busy)):
            show(f"alpha 0, s, {kind}", times["alpha 0"])
            ratios = [a / b for a, b in zip(times["cached"], times["alpha 0"], strict=True)]
            show(f"cached / alpha 0, {kind}", ratios, "aim 1.05 or less")
        if without:
            added = 100 * (gpu_peak(forced, data, optimizer, device) / without - 1)
            print(f"memory added: {added:.2f} % of {without / 2**30:.1f} GiB; aim 2 or less")


def sample(model: nn.Module, count: int, width: int, device: str) -> dict[str, Any]:
    """A batch for either student."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, len(CAMERAS), 3, 224, 224, generator=generator)
    data: dict[str, Any] = {
        "tokens": torch.randn(count, VISUAL + OTHERS, width, generator=generator),
        "images": images,
        "action": torch.randn(count, CHUNK, ACTIONS, generator=generator),
        "index": torch.randint(FRAMES, (count,), generator=generator),
        "action_is_pad": torch.zeros(count, CHUNK, dtype=torch.bool),
    }
    data = {key: value.to(device) for key, value in data.items()}
    if isinstance(model, NanoVLA):
        data |= {f"observation.images.{c}": data["images"][:, i] for i, c in enumerate(CAMERAS)}
        data |= {"observation.state": torch.zeros(count, 4, device=device), "task": ["reach"] * count}
    return data


def step(forcing: SpatialForcing, data: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Forward, backward, update."""
    loss, _ = forcing.train()(data)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def gpu_peak(
    forcing: SpatialForcing, data: dict[str, Any], optimizer: torch.optim.Optimizer, device: str
) -> float:
    """Most bytes allocated during one step; 0 on a CPU, whose allocator does not say."""
    if device == "cpu":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    step(forcing, data, optimizer)
    return float(torch.cuda.max_memory_allocated())


def described(model: nn.Module, forcing: SpatialForcing, student: str) -> None:
    """Sizes, and the projector's multiplications for each visual token as a share of the student's."""
    weights = sum(p.numel() for p in model.parameters())
    projector = sum(p.numel() for p in forcing.projector.parameters()) if forcing.projector else 0
    note = "" if student == "nano" else f"; a step has {VISUAL} visual tokens of {VISUAL + OTHERS}"
    print(
        f"student {weights / 1e6:.1f} M parameters, projector {projector / 1e6:.3f} M: "
        f"{100 * projector / weights:.2f} % more multiplications for a visual token{note}"
    )


if __name__ == "__main__":
    tyro.cli(main)
