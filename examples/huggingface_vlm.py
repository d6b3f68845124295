"""Spatial Forcing on a stock vision-language model of transformers: ten lines, marked below.

    python examples/huggingface_vlm.py                               # seconds on a CPU
    python examples/huggingface_vlm.py --teacher depth-anything/DA3-BASE   # Apache-2.0; docs/teachers.md

The model is a SmolVLM with a small random configuration and two images a sample, so nothing is
downloaded. For a pretrained one, `from_pretrained` and its processor replace `small_model` and `batches`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

# [integration]
from spatial_forcing import SpatialForcing, Views, as_student, layout_from_input_ids, load_teacher

# [end]

IMAGES, SIZE, PATCH, SHUFFLE = 2, 64, 8, 2
GRID = (SIZE // PATCH // SHUFFLE, SIZE // PATCH // SHUFFLE)
"""Visual tokens of one image, after SmolVLM's pixel shuffle."""
BEGIN, IMAGE = 1, 99


def small_model() -> SmolVLMForConditionalGeneration:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            vision_config={**vision, "image_size": SIZE, "patch_size": PATCH},
            text_config={**text, "model_type": "llama", "vocab_size": 100, "pad_token_id": 0},
            image_token_id=IMAGE,
            scale_factor=SHUFFLE,
        )
    )


def batches(steps: int) -> Iterator[dict[str, torch.Tensor]]:
    """Random images in SmolVLM's range [-1, 1], their placeholders, and an answer to learn."""
    for _ in range(steps):
        prompt = torch.tensor([BEGIN] + [IMAGE] * (IMAGES * GRID[0] * GRID[1])).expand(2, -1)
        input_ids = torch.cat([prompt, torch.randint(2, IMAGE, (2, 6))], dim=1)
        labels = input_ids.masked_fill(input_ids == IMAGE, -100)
        yield {
            "input_ids": input_ids,
            "pixel_values": torch.rand(2, IMAGES, 3, SIZE, SIZE) * 2 - 1,
            "labels": labels,
        }


def train(teacher: str, steps: int) -> SmolVLMForConditionalGeneration:
    """Train a few steps and return the plain model."""
    model = small_model()
    # [integration]
    student = as_student(
        model,
        blocks=model.model.text_model.layers,
        layout=lambda batch: layout_from_input_ids(batch["input_ids"], IMAGE, GRID),
        views=lambda batch: Views.create(batch["pixel_values"] * 0.5 + 0.5),
    )
    forcing = SpatialForcing(student, load_teacher(teacher))
    # [end]
    optimizer = torch.optim.AdamW(forcing.parameters(), lr=1e-3)
    for step, batch in enumerate(batches(steps)):
        # [integration]
        loss, metrics = forcing(batch)  # instead of model(**batch).loss
        # [end]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}, cosine to the teacher {metrics['cosine'].item():.3f}")
    # [integration]
    model = forcing.export()
    # [end]
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="vggt-nano", help="registered name, hub id or local folder")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = train(arguments.teacher, arguments.steps)
    unchanged = list(model.state_dict()) == list(small_model().state_dict())
    print(f"exported: a stock {type(model).__name__}, keys unchanged: {unchanged}")


if __name__ == "__main__":
    main()
