"""Spatial Forcing on a Qwen-VL policy with two cameras (StarVLA and others are built like this).

    python examples/qwen_vla.py qwen3                          # seconds on a CPU
    spatial-forcing doctor examples/qwen_vla.py:qwen2_5        # inspects the same model

Stock classes of transformers, small and random, with an action head. Qwen's processor cuts images into
patches in the order in which the model merges them; `views_from_qwen` puts them together for the teacher.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from adapt_any_vla import ACTION_DIM, CHUNK, VLA
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen3VLConfig, Qwen3VLModel
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

from spatial_forcing import SpatialForcing, as_student, layout_from_qwen, load_teacher, views_from_qwen
from spatial_forcing.doctor import Subject
from spatial_forcing.protocols import Teacher

CAMERAS = ("front", "wrist")
BATCH, START, END, IMAGE, FIRST_WORD = 2, 91, 92, 93, 20
"""Ids of what is before an image, after it, and of its tokens; then words."""
TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100,
}  # fmt: skip
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
IDS = {"vision_start_token_id": START, "vision_end_token_id": END, "image_token_id": IMAGE}
PROCESSORS = {
    "qwen2_5": Qwen2VLImageProcessorPil(),
    "qwen3": Qwen2VLImageProcessorPil(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3),
}
"""As the hub's repositories have them; from_pretrained(REPOSITORY) gives a model's own."""


def policy(name: str) -> VLA:
    """A small model of the family, with an action head."""
    if name == "qwen2_5":
        sections = {"rope_type": "default", "mrope_section": [2, 3, 3]}
        config: Any = Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_scaling": sections},
            vision_config={**VISION, "window_size": 56, "fullatt_block_indexes": [1]},
            **IDS,
        )
        return VLA(Qwen2_5_VLModel(config), 64)
    sections = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 16, "rope_scaling": sections},
        vision_config={**VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        **IDS,
    )
    return VLA(Qwen3VLModel(config), 64)


def batch_of(pixels: Tensor, name: str) -> dict[str, Tensor]:
    """What the processor makes of images (B, V, 3, H, W) in [0, 1], with words and actions."""
    images = [
        np.asarray(image.permute(1, 2, 0) * 255).round().astype(np.uint8) for image in pixels.flatten(0, 1)
    ]
    made = PROCESSORS[name](images=images, do_resize=False, return_tensors="pt")
    _, rows, columns = made["image_grid_thw"][0].tolist()
    tokens = [START] + [IMAGE] * (rows * columns // 4) + [END]
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(FIRST_WORD, 90, (len(pixels), 6), generator=generator)
    ids = torch.cat([torch.tensor(tokens * pixels.shape[1]).expand(len(pixels), -1), words], 1)
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": made["pixel_values"],
        "image_grid_thw": made["image_grid_thw"],
        "action": torch.randn(len(pixels), CHUNK, ACTION_DIM, generator=generator),
    }


def pictures(side: int) -> Tensor:
    """Two cameras of two samples."""
    return torch.rand(BATCH, len(CAMERAS), 3, side, side, generator=torch.Generator().manual_seed(1))


def subject(name: str) -> Subject:
    """What the doctor inspects."""
    torch.manual_seed(0)
    processor = PROCESSORS[name]
    return Subject(
        policy(name),
        lambda pixels: batch_of(pixels, name),
        pixels=pictures(8 * processor.patch_size),
        views=lambda batch: views_from_qwen(batch, CAMERAS, processor),
    )


def qwen2_5() -> Subject:
    """Qwen2.5-VL."""
    return subject("qwen2_5")


def qwen3() -> Subject:
    """Qwen3-VL, whose decoder also gets visual features after its first blocks."""
    return subject("qwen3")


def forced(model: nn.Module, teacher: Teacher, processor: Any) -> SpatialForcing:
    """The adapter."""
    # [qwen]
    student = as_student(
        model,
        blocks=model.vlm.language_model.layers,
        layout=lambda batch: layout_from_qwen(batch, CAMERAS, model.vlm.config.image_token_id, processor),
        views=lambda batch: views_from_qwen(batch, CAMERAS, processor),
    )
    forcing = SpatialForcing(student, teacher)
    # [end]
    return forcing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=sorted(PROCESSORS))
    parser.add_argument("--teacher", default="vggt-nano", help="registered name, hub id or local folder")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    inspected, processor = subject(arguments.model), PROCESSORS[arguments.model]
    forcing = forced(inspected.model, load_teacher(arguments.teacher), processor)
    batch = inspected.example()
    optimizer = torch.optim.AdamW(forcing.parameters(), lr=1e-3)
    for step in range(arguments.steps):
        loss, metrics = forcing(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}, cosine to the teacher {metrics['cosine'].item():.3f}")
    print(f"exported: {type(forcing.export().vlm).__name__}")


if __name__ == "__main__":
    main()
