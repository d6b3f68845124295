"""Depth Anything 3 (arXiv 2511.10647): backbone, dense head and cameras, for any config."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spatial_forcing.errors import ConfigError
from spatial_forcing.teachers.da3.backbone import Backbone, Reference
from spatial_forcing.teachers.da3.camera import CameraDecoder, CameraEncoder, decode_cameras
from spatial_forcing.teachers.da3.config import DA3Config
from spatial_forcing.teachers.da3.heads import DualDPT, SkyDPT, without_sky

HEADS = ("depth", "camera")


class DA3(nn.Module):
    """Views of one scene to features, depth, rays and cameras.

    Args:
        config: sizes; the default is DA3-BASE.
        heads: False builds the backbone alone.
    """

    def __init__(self, config: DA3Config | None = None, *, heads: bool = True) -> None:
        super().__init__()
        config = config or DA3Config()
        self.config = config
        self.backbone = Backbone(config)
        self.head: DualDPT | SkyDPT | None = None
        self.cam_dec: CameraDecoder | None = None
        self.cam_enc: CameraEncoder | None = None
        if heads:
            self.head = DualDPT(config) if config.any_view else SkyDPT(config)
        if heads and config.any_view:
            self.cam_dec = CameraDecoder(config.output_dim)
            self.cam_enc = CameraEncoder(config)

    def forward(
        self,
        images: Tensor,
        heads: Sequence[str] = HEADS,
        *,
        reference: Reference = "saddle_balanced",
        extrinsics: Tensor | None = None,
        intrinsics: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Run the backbone and the named heads.

        Args:
            images: (B, S, 3, H, W), ImageNet-normalised, H and W multiples of the patch size.
            heads: "depth", "camera" or both; single-view models have depth alone.
            reference: see `Backbone.forward`.
            extrinsics, intrinsics: given cameras, (B, S, 4, 4) and (B, S, 3, 3) in pixels of (H, W), the
                former as `camera.normalise_extrinsics` returns them; both or none.

        Returns:
            A dict with, for "depth": `depth` (B, S, H, W) > 0 and `depth_conf`, `ray`, `ray_conf` of any-view
            models (see `DualDPT`) or `sky` (B, S, H, W); for "camera": `extrinsics` (B, S, 3, 4), camera from
            world, and `intrinsics` (B, S, 3, 3).

        Raises:
            ConfigError: a head is unknown, or the model has none.
            DataError: the image size is not a multiple of the patch size.
        """
        for head in heads:
            self._require(head)
        if (extrinsics is None) != (intrinsics is None):
            raise ConfigError("DA3 needs both extrinsics and intrinsics of given cameras, or neither.")
        size = (images.shape[-2], images.shape[-1])
        cameras = None
        if extrinsics is not None and intrinsics is not None:
            if self.cam_enc is None:
                raise ConfigError("this DA3 has no camera encoder; load an any-view model with heads=True.")
            with torch.autocast(images.device.type, enabled=False):
                cameras = self.cam_enc(extrinsics.float(), intrinsics.float(), size)
        layers = self.config.head.layers
        outputs = self.backbone(images, layers, reference=reference, cameras=cameras)
        result: dict[str, Tensor] = {}
        # The heads are small and sensitive (exponentials): full precision, as published.
        with torch.autocast(images.device.type, enabled=False):
            if "depth" in heads and self.head is not None:
                patches = [output[:, :, 1:].float().flatten(0, 1) for output in outputs]
                maps = self.head(patches, size)
                result |= {name: values.unflatten(0, images.shape[:2]) for name, values in maps.items()}
                if "sky" in result:
                    result["depth"] = without_sky(result["depth"], result["sky"])
            if "camera" in heads and self.cam_dec is not None:
                encoding = self.cam_dec(outputs[-1][:, :, 0].float())
                result["extrinsics"], result["intrinsics"] = decode_cameras(encoding, size)
        return result

    def _require(self, head: str) -> None:
        if head not in HEADS:
            raise ConfigError(f"DA3 has no head {head!r}; it has {', '.join(HEADS)}.")
        if (self.head if head == "depth" else self.cam_dec) is None:
            why = "single-view models have none" if not self.config.any_view else "load it with heads=True"
            raise ConfigError(f"this DA3 was built without its {head} head; {why}, or do not ask for it.")
