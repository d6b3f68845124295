"""Spatial Forcing inside transformers' Trainer, on a stock vision-language model that speaks actions.

    python examples/hf_trainer.py                                    # half a minute on a CPU
    python examples/hf_trainer.py --steps 60 --resume                # goes on from the last checkpoint
    torchrun --nproc-per-node 2 examples/hf_trainer.py               # or accelerate launch: DDP

The model is a SmolVLM with a small random configuration; actions are words, each number one of 64 bins (as in
RT-2 and OpenVLA), so the model, its loss and its files are transformers' own. A checkpoint is a stock
`SmolVLMForConditionalGeneration` with the projector in a file of its own beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_data import toy_dataset
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from spatial_forcing import (
    ForcingConfig,
    SpatialForcing,
    Views,
    as_student,
    layout_from_input_ids,
    load_teacher,
)
from spatial_forcing.data import Dataset

SIZE, PATCH, SHUFFLE, BINS = 64, 8, 2, 64
GRID = (SIZE // PATCH // SHUFFLE, SIZE // PATCH // SHUFFLE)
BEGIN, IMAGE, FIRST_BIN = 1, 2, 3
PROJECTOR = "projector.safetensors"


def small_model() -> SmolVLMForConditionalGeneration:
    """With pretrained weights: `SmolVLMForConditionalGeneration.from_pretrained(...)`."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            vision_config={**vision, "image_size": SIZE, "patch_size": PATCH},
            text_config={**text, "model_type": "llama", "vocab_size": FIRST_BIN + BINS, "pad_token_id": 0},
            image_token_id=IMAGE,
            scale_factor=SHUFFLE,
        )
    )


class Demonstrations(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Frames of a LeRobot v3.0 dataset as the model reads them: [begin | views | state | action]."""

    def __init__(self, root: Path) -> None:
        self.data = Dataset.open(root)
        self.statistics = self.data.statistics()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        views = [torch.tensor(self.data.image(index, camera)) for camera in self.data.cameras]
        pixels = torch.stack(views).permute(0, 3, 1, 2) / 127.5 - 1
        state, action = self._words("observation.state", index), self._words("action", index)
        images = torch.full((len(views) * GRID[0] * GRID[1],), IMAGE)
        prompt = torch.cat([torch.tensor([BEGIN]), images, state])
        labels = torch.cat([torch.full_like(prompt, -100), action])
        return {"input_ids": torch.cat([prompt, action]), "pixel_values": pixels, "labels": labels}

    def _words(self, key: str, index: int) -> Tensor:
        """Each number as the bin of its range in which it lies."""
        values = self.data.state if key == "observation.state" else self.data.action
        low, high = (self.statistics[key][bound] for bound in ("min", "max"))
        share = (values[index] - low) / (high - low).clip(1e-6)
        return FIRST_BIN + torch.from_numpy(share * (BINS - 1)).round().long()


class ForTrainer(torch.nn.Module):
    """What Trainer expects of a model: named inputs, and a dictionary with the loss."""

    def __init__(self, forcing: SpatialForcing) -> None:
        super().__init__()
        self.forcing = forcing

    def forward(self, input_ids: Tensor, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The whole loss under `loss`, and the metrics."""
        batch = {"input_ids": input_ids, "pixel_values": pixel_values, "labels": labels}
        loss, metrics = self.forcing(batch)
        return {"loss": loss, **metrics}


class ForcingTrainer(Trainer):
    """Logs the alignment's metrics, drives its schedule, and keeps the projector out of the model's files."""

    @property
    def forcing(self) -> SpatialForcing:
        """The method, out of what DDP put around it."""
        return self.accelerator.unwrap_model(self.model).forcing

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        """As Trainer does it; the schedule of alpha is told where training is."""
        self.forcing.set_progress(self.state.global_step, self.state.max_steps)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        self.seen = {name: value for name, value in outputs.items() if name != "loss" and "/" not in name}
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of one optimizer step: their alignment losses add up to one mean."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if batches:
            self.forcing.begin_accumulation(batches)
        return batches, items

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Beside Trainer's own: the metrics of the last micro-batch."""
        if "loss" in logs:
            logs |= {name: value.item() for name, value in self.seen.items()}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The stock model for everyone, the projector for a resume."""
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.forcing.export().save_pretrained(folder)
            save_file(self.forcing.projector_state_dict(), Path(folder) / PROJECTOR)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Trainer restores optimizer, schedule, random states and the place in the data itself.
        folder, stock = Path(resume_from_checkpoint), self.forcing.export()
        stock.load_state_dict(type(stock).from_pretrained(folder).state_dict())
        self.forcing.load_projector_state_dict(load_file(folder / PROJECTOR))


def make_trainer(arguments: argparse.Namespace) -> ForcingTrainer:
    model = small_model()
    student = as_student(
        model,
        blocks=model.model.text_model.layers,
        layout=lambda batch: layout_from_input_ids(batch["input_ids"], IMAGE, GRID),
        views=lambda batch: Views.create(batch["pixel_values"] * 0.5 + 0.5),
    )
    settings = ForcingConfig(schedule="cosine", floor=0.2)
    return ForcingTrainer(
        model=ForTrainer(SpatialForcing(student, load_teacher(arguments.teacher), settings)),
        train_dataset=Demonstrations(arguments.dataset),
        args=TrainingArguments(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            max_grad_norm=1.0,
            logging_steps=5,
            save_steps=arguments.save_every,
            ddp_find_unused_parameters=False,
            report_to="none",
            seed=arguments.seed,
            use_cpu=arguments.cpu,
            disable_tqdm=True,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/hf"))
    parser.add_argument("--dataset", type=Path, help="LeRobot v3.0, images 64 x 64; default: drawn")
    parser.add_argument("--teacher", default="vggt-nano", help="registered name, hub id or local folder")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="even if there is a GPU")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    if arguments.dataset is None:
        with PartialState(cpu=arguments.cpu).main_process_first():
            arguments.dataset = toy_dataset(arguments.output / "data")
    torch.manual_seed(arguments.seed)
    trainer = make_trainer(arguments)
    trainer.train(
        resume_from_checkpoint=get_last_checkpoint(str(arguments.output)) if arguments.resume else None
    )
    if trainer.is_world_process_zero():
        trainer.forcing.export().save_pretrained(arguments.output / "policy")
        print(f"exported a stock {small_model().__class__.__name__} to {arguments.output / 'policy'}")


if __name__ == "__main__":
    main()
