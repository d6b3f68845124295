"""Pretrain one teacher of the study: VGGT's or Depth Anything 3's architecture at vggt-nano's size.

    python studies/teachers/pretrain.py da3 --scenes runs/teachers/scenes --out runs/teachers/da3 --steps 4000

Scenes, batches, losses, optimizers and schedule are those of `spatial-forcing teacher pretrain`, and the same
for both architectures: step n sees the same images. Depth and cameras are trained; the point head (VGGT)
and the ray head (Depth Anything 3) are not. The same command resumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
import tyro
from torch import Tensor, nn

from spatial_forcing.nano_teacher.evaluate import evaluate_teacher
from spatial_forcing.nano_teacher.pretrain import LICENCE, PretrainRun
from spatial_forcing.nano_teacher.recipe import PretrainConfig
from spatial_forcing.nano_teacher.scenes import SceneDataset, render_scenes
from spatial_forcing.progress import progress_bar
from spatial_forcing.storage import write_json
from spatial_forcing.teachers.da3.config import DA3Config, DA3HeadConfig
from spatial_forcing.teachers.da3.loading import save_da3
from spatial_forcing.teachers.da3.model import DA3
from spatial_forcing.teachers.layers import resolve_layers
from spatial_forcing.teachers.pose import quaternion_to_matrix
from spatial_forcing.teachers.preprocess import IMAGENET_MEAN, IMAGENET_STD

NANO_DA3 = DA3Config(
    embed_dim=128,
    depth=8,
    num_heads=4,
    start=3,
    img_size=128,
    patch_size=16,
    head=DA3HeadConfig((1, 3, 5, 7), features=24, out_channels=(24, 32, 48, 48)),
    encoder_depth=1,
    encoder_heads=4,
)
"""DA3-SMALL with vggt-nano's width, heads, patches and number of blocks. Like SMALL it sees every view alone
in its first third, and then in every other block."""
NEVER = 10**9


class NanoDA3(nn.Module):
    """A Depth Anything 3 that takes and returns what `VGGT` does."""

    def __init__(self, config: DA3Config) -> None:
        super().__init__()
        self.net = DA3(config)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(not (name.startswith("cam_enc.") or "_aux" in name))
        # No rotation, and a field of view that the ReLU lets through: fresh weights give neither.
        camera = self.net.cam_dec
        assert camera is not None
        nn.init.zeros_(camera.fc_qvec.weight)
        with torch.no_grad():
            camera.fc_qvec.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
            cast(nn.Linear, camera.fc_fov[0]).bias.fill_(1.0)

    def forward(self, images: Tensor, heads: tuple[str, ...]) -> dict[str, Tensor]:
        """See `VGGT.forward`; of `heads`, "depth" and "camera"."""
        net = self.net
        assert net.head is not None
        assert net.cam_dec is not None
        wanted = resolve_layers(net.config.head.layers, net.config.depth)
        images = (images - self.mean) / self.std
        outputs = net.backbone(images, wanted, reference="first")
        found: dict[str, Tensor] = {}
        if "depth" in heads:
            maps = net.head([o[:, :, 1:].flatten(0, 1) for o in outputs], tuple(images.shape[-2:]))
            found["depth"] = maps["depth"].unflatten(0, images.shape[:2])[..., None]
            found["depth_conf"] = maps["depth_conf"].unflatten(0, images.shape[:2])
        if "camera" in heads:
            found["pose_enc"] = inverted(net.cam_dec(outputs[-1][:, :, 0]))
            found["pose_enc_iterations"] = found["pose_enc"][None]
        return found


def inverted(encoding: Tensor) -> Tensor:
    """Encodings (..., 9) of world from camera as those of camera from world, or the other way round."""
    quaternion = encoding[..., 3:7] * encoding.new_tensor([-1.0, -1.0, -1.0, 1.0])
    shift = -(quaternion_to_matrix(quaternion.detach()) @ encoding[..., :3, None])[..., 0]
    return torch.cat([shift, quaternion, encoding[..., 7:]], dim=-1)


class DA3Run(PretrainRun):
    """`PretrainRun` of a `NanoDA3`."""

    def build(self) -> nn.Module:
        """See `PretrainRun.build`."""
        return NanoDA3(NANO_DA3)

    def export(self) -> None:
        """See `PretrainRun.export`."""
        save_da3(cast(NanoDA3, self.average).net, self.weights, licence=LICENCE)


@dataclass(frozen=True)
class Settings:
    """What is trained.

    Attributes:
        kind: the architecture.
        scenes: folder of the rendered scenes; what is missing is rendered.
        out: folder of checkpoint, weights and metrics.
        steps: optimizer steps of 12 views.
        train_scenes, policy_scenes: see `PretrainConfig`.
        seed: of weights and batches. The scenes are those of seed 0.
    """

    kind: tyro.conf.Positional[Literal["vggt", "da3"]]
    scenes: Path
    out: Path
    steps: int = 4000
    train_scenes: int = 6000
    policy_scenes: int = 4000
    seed: int = 0


def main(settings: tyro.conf.OmitArgPrefixes[Settings]) -> None:
    """Render, train, evaluate; prints where the weights are."""
    config = PretrainConfig(
        out=settings.out,
        scenes=settings.scenes,
        train_scenes=settings.train_scenes,
        policy_scenes=settings.policy_scenes,
        test_scenes=448,
        steps=settings.steps,
        minutes=None,
        point_every=NEVER,
        seed=settings.seed,
        cpu=True,
    )
    rendered = PretrainConfig(
        train_scenes=settings.train_scenes, policy_scenes=settings.policy_scenes, test_scenes=448
    )
    specs = {
        "train": rendered.train_spec,
        "near": rendered.policy_spec,
        "test": rendered.test_spec,
        "policy_test": rendered.policy_test_spec,
    }
    for name, spec in specs.items():
        for _ in render_scenes(settings.scenes / name, spec):
            pass
    run = PretrainRun(config) if settings.kind == "vggt" else DA3Run(config)
    with progress_bar() as progress:
        task = progress.add_task(settings.kind, total=config.steps, completed=run.step)
        for loss in run.train(
            SceneDataset(settings.scenes / "train"), SceneDataset(settings.scenes / "near")
        ):
            progress.update(task, completed=run.step, description=f"{settings.kind} (depth {loss:.3f})")
    metrics: dict[str, dict[str, float]] = {
        name: evaluate_teacher(run.average, SceneDataset(settings.scenes / name))
        for name in ("test", "policy_test")
    }
    trained = {"steps": float(run.step), "minutes": run.seconds / 60}
    write_json(settings.out / "test_metrics.json", {**metrics, "run": trained})
    print(f"weights: {run.weights}\nmetrics: {settings.out / 'test_metrics.json'}")


if __name__ == "__main__":
    main(tyro.cli(tyro.conf.OmitArgPrefixes[Settings]))
