"""A small pi0, its golden weights and inputs."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from spatial_forcing.alignment import IMAGE_PREFIX
from spatial_forcing.students import Pi0, Pi0Config
from spatial_forcing.students.pi0 import Pi0Size
from tests.golden import golden

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
SIZE = Pi0Size(
    width=64,
    depth=4,
    mlp=128,
    heads=8,
    kv_heads=1,
    head_dim=16,
    expert_width=32,
    expert_mlp=64,
    vision_width=32,
    vision_depth=2,
    vision_heads=4,
    vision_mlp=48,
    image_size=56,
    patch=14,
    vocab=512,
)
"""The architecture of the golden vectors."""


def small_config(**changes):
    settings = {
        "state_dim": 4,
        "action_dim": 3,
        "chunk": 2,
        "max_text": 8,
        "tokenizer": "hashed",
        "size": SIZE,
    }
    return Pi0Config(**{"cameras": ("front", "wrist"), **settings, **changes})


class GoldenPi0(Pi0):
    """Takes the recorded token ids instead of text; states and actions are recorded normalised."""

    def __init__(self, config, folder):
        vectors = golden("pi0_tiny")
        weights = vectors.under("w.")
        save_file(weights, folder / "model.safetensors")
        super().__init__(config, saved=folder)
        self.prompt = lambda texts, rows: (vectors.tensors["in.tokens"], vectors.tensors["in.token_mask"])


def golden_student(folder):
    config = small_config(cameras=CAMERAS, state_dim=32, action_dim=32, chunk=8, max_text=12)
    return GoldenPi0(config, folder).eval()


def golden_batch(images=None):
    """The recorded inputs as a batch; the original's images are in [-1, 1], ours in [0, 1]."""
    tensors = golden("pi0_tiny").tensors
    batch = {"observation.state": tensors["in.state"], "action": tensors["in.actions"], "task": ["", ""]}
    for camera in CAMERAS:
        batch[IMAGE_PREFIX + camera] = (tensors[f"in.image.{camera}"] + 1) / 2
        batch[IMAGE_PREFIX + camera + "_is_pad"] = ~tensors[f"in.image_mask.{camera}"]
    return {**batch, **(images or {})}


def time_in_float64(network):
    """Replace transformers' float32 time embedding by one in float64, as openpi computes it."""
    module = network.embed_action_time.sinusoid_embeds
    own = network.config

    def forward(time):
        steps = torch.linspace(0, 1, own.dit_config.hidden_size // 2, dtype=torch.float64)
        period = own.min_period * (own.max_period / own.min_period) ** steps
        angle = time.double()[:, None] * (2 * torch.pi / period)
        return torch.cat([angle.sin(), angle.cos()], dim=1).float()

    module.forward = forward
