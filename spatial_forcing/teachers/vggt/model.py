"""VGGT (arXiv 2503.11651): aggregator plus camera, depth and point heads, for any config."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spatial_forcing.errors import ConfigError
from spatial_forcing.teachers.dpt import DPTHead
from spatial_forcing.teachers.vggt.aggregator import Aggregator
from spatial_forcing.teachers.vggt.config import VGGTConfig
from spatial_forcing.teachers.vggt.heads import CameraHead

HEADS = ("camera", "depth", "point")


class VGGT(nn.Module):
    """Views of one scene to features, cameras, depth and points in the first camera's frame.

    Trainable and usable at inference; `VGGTTeacher` wraps it frozen.

    Args:
        config: sizes and heads; the default is VGGT-1B.
        heads: False builds the aggregator alone.
    """

    def __init__(self, config: VGGTConfig | None = None, *, heads: bool = True) -> None:
        super().__init__()
        config = config or VGGTConfig()
        self.config = config
        self.aggregator = Aggregator(config)
        dim, patch, dpt = 2 * config.embed_dim, config.patch_size, config.dpt
        self.camera_head = CameraHead(dim, config.camera) if heads and config.enable_camera else None
        self.point_head = DPTHead(dim, patch, dpt, 4, "inv_log") if heads and config.enable_point else None
        self.depth_head = DPTHead(dim, patch, dpt, 2, "exp") if heads and config.enable_depth else None

    def forward(self, images: Tensor, heads: Sequence[str] = HEADS) -> dict[str, Tensor]:
        """Run the aggregator and the named heads.

        Args:
            images: (B, S, 3, H, W) in [0, 1], H and W multiples of the patch size; view 0 is the reference.
            heads: any of "camera", "depth", "point".

        Returns:
            A dict with, for "camera": `pose_enc` (B, S, 9) and `pose_enc_iterations`
            (iterations, B, S, 9), whose last entry is `pose_enc`; for "depth": `depth`
            (B, S, H, W, 1) > 0 and `depth_conf` (B, S, H, W) > 1; for "point": `world_points`
            (B, S, H, W, 3) and `world_points_conf` (B, S, H, W) > 1. Lengths are in the unit the
            model was trained with; H and W shrink by `dpt.down_ratio`.

        Raises:
            ConfigError: a head is unknown or was not built.
            DataError: the image size is not a multiple of the patch size.
        """
        for head in heads:
            self._require(head)
        dense = "depth" in heads or "point" in heads
        layers = (*self.config.dpt.layers, -1) if dense else (-1,)
        tokens = self.aggregator(images, layers)
        result: dict[str, Tensor] = {}
        # The heads are small and sensitive (exponentials): full precision, as published.
        with torch.autocast(images.device.type, enabled=False):
            if "camera" in heads and self.camera_head is not None:
                encodings = torch.stack(self.camera_head(tokens[-1].float()))
                result |= {"pose_enc": encodings[-1], "pose_enc_iterations": encodings}
            patches = [t[:, :, self.aggregator.patch_start_idx :].float().flatten(0, 1) for t in tokens[:-1]]
            for head, module, names in (
                ("depth", self.depth_head, ("depth", "depth_conf")),
                ("point", self.point_head, ("world_points", "world_points_conf")),
            ):
                if head in heads and module is not None:
                    maps = module(patches, images.shape[-2:])
                    result |= {n: m.unflatten(0, images.shape[:2]) for n, m in zip(names, maps, strict=True)}
        return result

    def _require(self, head: str) -> None:
        if head not in HEADS:
            raise ConfigError(f"VGGT has no head {head!r}; it has {', '.join(HEADS)}.")
        if getattr(self, f"{head}_head") is None:
            raise ConfigError(
                f"this VGGT was built without its {head} head; build or load it with heads=True and "
                f"enable_{head}=True, or do not ask for it."
            )
