"""Host memory of pi0 at its published size (3.5 B parameters): reading weights, and fine-tuning with LoRA.

python -m benchmarks.pi0_memory --folder FOLDER

The folder gets random weights in openpi's layout (7 GB, bfloat16), a tokenizer and a small ALOHA dataset,
unless they are there. Every measurement runs in a process of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import tyro
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.common import show
from spatial_forcing.data import DatasetWriter
from spatial_forcing.memory import peak_over, resident
from spatial_forcing.students import Pi0, Pi0Config
from spatial_forcing.students.pi0.keys import to_openpi

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")


def generate(folder: Path) -> None:
    """Weights, tokenizer and dataset."""
    if not (folder / "weights/model.safetensors").exists():
        config = Pi0Config(CAMERAS, tokenizer="hashed", dtype="bfloat16")
        with torch.device("meta"):
            shapes = to_openpi(Pi0(config).network.state_dict())
        (folder / "weights").mkdir(parents=True, exist_ok=True)
        state = {name: torch.empty(value.shape, dtype=torch.bfloat16) for name, value in shapes.items()}
        for value in state.values():
            value.normal_(0, 0.02) if value.ndim > 1 else value.zero_()
        save_file(state, folder / "weights/model.safetensors")
    if not (folder / "tokens").exists():
        words = {name: i for i, name in enumerate(("<pad>", "<bos>", "<unk>", "lift", "the", "pot", "\n"))}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>", pad_token="<pad>"
        )
        fast.save_pretrained(folder / "tokens")
    if not (folder / "data").exists():
        rng = np.random.default_rng(0)
        cameras = dict.fromkeys(CAMERAS, (224, 224))
        with DatasetWriter.create(
            folder / "data", fps=50, cameras=cameras, state_dim=14, action_dim=14
        ) as writer:
            for _ in range(60):
                images = {camera: rng.integers(0, 255, (224, 224, 3), dtype=np.uint8) for camera in CAMERAS}
                state, action = rng.normal(size=(2, 14)).astype(np.float32)
                writer.add_frame({"images": images, "state": state, "action": action}, task="lift the pot")
            writer.save_episode()


def read(folder: Path, dtype: str) -> None:
    """Print the peak of reading the weights, over their size in memory."""
    kept = []

    def load() -> None:
        settings = {"pretrained": str(folder / "weights"), "tokenizer": str(folder / "tokens")}
        kept.append(Pi0(Pi0Config(CAMERAS, dtype=dtype, **settings)))  # type: ignore[arg-type]

    peak = peak_over(load)
    size = sum(p.numel() * p.element_size() for p in kept[0].parameters())
    show(f"reading pi0 into {dtype}, peak over the weights ({size / 2**30:.1f} GiB)", [peak / size])


def train(folder: Path, cached: bool, steps: int) -> None:
    """Print peak memory and time of a LoRA run as the preset makes it, one sample a step."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    command = [
        sys.executable, "-m", "spatial_forcing.cli", "train", "--preset", "pi0-aloha-lora",
        "--dataset", str(folder / "data"), "--output", str(folder / "run"),
        "--student.pretrained", str(folder / "weights"), "--student.tokenizer", str(folder / "tokens"),
        "--steps", str(steps), "--batch-size", "1", "--log-every", "1", "--save-every", str(steps),
        "--teacher", "vggt-nano", "--cpu", *(["--cache", str(folder / "cache")] if cached else []),
    ]  # fmt: skip
    if cached and not (folder / "cache").exists():
        build = ["cache", "build", "--dataset", str(folder / "data"), "--output", str(folder / "cache")]
        subprocess.run([sys.executable, "-m", "spatial_forcing.cli", *build], check=True)
    subprocess.run(command, check=True)
    result = json.loads((folder / "run/result.json").read_text())
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    times = np.diff([0.0, *(row["seconds"] for row in rows)])
    kind = "cached" if cached else "live"
    show(f"pi0 with LoRA, vggt-nano {kind}, batch 1, peak GiB", [result["peak_memory"] / 2**30])
    show(f"pi0 with LoRA, vggt-nano {kind}, batch 1, s a step", times[1:].tolist() or times.tolist())


def main(folder: Path, part: str = "all", steps: int = 3) -> None:
    """Measure.

    Args:
        folder: of what is generated; needs 8 GB.
        part: `read-bfloat16`, `read-float32`, `train`, or all of them.
        steps: of the training run.
    """
    if part.startswith("read-"):
        read(folder, part.removeprefix("read-"))
        return
    generate(folder)
    if part == "all":
        for each in ("read-bfloat16", "read-float32"):
            command = [sys.executable, "-m", "benchmarks.pi0_memory", "--folder", str(folder), "--part", each]
            subprocess.run(command, check=True)
    train(folder, cached=True, steps=steps)
    print(f"resident in this process: {resident('VmRSS') / 2**30:.1f} GiB")


if __name__ == "__main__":
    tyro.cli(main)
