"""A teacher checkpoint that loads and runs at once."""

import torch

from spatial_forcing.teachers.vggt import VGGT, VGGTConfig, save_vggt


def write_tiny_teacher(folder):
    """A VGGT of one layer with random weights and no heads, as a checkpoint; returns `folder`."""
    no_heads = dict.fromkeys(("enable_camera", "enable_depth", "enable_point"), False)
    torch.manual_seed(0)
    model = VGGT(
        VGGTConfig(
            img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, patch_embed="conv", **no_heads
        )
    )
    save_vggt(model, folder, licence="Apache-2.0")
    return folder
