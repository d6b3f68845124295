"""How well a teacher sees depth and cameras, on scenes of tasks it never saw."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from spatial_forcing.analysis.depth import depth_metrics
from spatial_forcing.nano_teacher.losses import NEAREST
from spatial_forcing.nano_teacher.scenes import DEPTH_MAX, SceneDataset
from spatial_forcing.teachers.pose import decode_pose

ROWS = {
    "abs_rel": "AbsRel, metric",
    "abs_rel_scaled": "AbsRel, median-scaled",
    "delta_1.25": "delta < 1.25, metric",
    "rotation_deg": "rotation error (deg, mean)",
    "rotation_deg_median": "rotation error (deg, median)",
    "translation_angle_deg": "translation angle (deg, mean)",
    "translation_angle_deg_median": "translation angle (deg, median)",
    "translation_m": "translation error (m, mean)",
}


@torch.no_grad()
def evaluate_teacher(model: nn.Module, scenes: SceneDataset, *, batch_size: int = 16) -> dict[str, float]:
    """Encode every scene's views together; score each image's depth and each further view's pose.

    Depth is resized to the image (bilinear, corners aligned), clipped at 3 m and averaged over images;
    poses are relative to the first view.

    Returns:
        Means (and medians of the angles), with the number of images and of pairs.
    """
    model.eval()
    device = next(model.parameters()).device
    rows: dict[str, list[Tensor]] = {}
    for start in range(0, len(scenes), batch_size):
        batch = scenes.batch(torch.arange(start, min(start + batch_size, len(scenes)))).to(device)
        output = model(batch.images.float() / 255, ("camera", "depth"))
        size = (batch.depth.shape[-2], batch.depth.shape[-1])
        depth = F.interpolate(output["depth"][..., 0], size=size, mode="bilinear", align_corners=True)
        scores = clipped_depth_metrics(depth.flatten(0, 1), batch.depth.flatten(0, 1))
        if batch.depth.shape[1] > 1:
            relative = torch.linalg.inv(batch.poses[:, 1:]) @ batch.poses[:, :1]
            guess = decode_pose(output["pose_enc"], size)[0]
            scores |= pose_metrics(_relative(guess).flatten(0, 1), relative.flatten(0, 1))
        for name, value in scores.items():
            rows.setdefault(name, []).append(value)
    columns = {name: torch.cat(values) for name, values in rows.items()}
    result = {name: float(values.mean()) for name, values in columns.items()}
    result |= {f"{name}_median": float(v.median()) for name, v in columns.items() if name.endswith("_deg")}
    counts = {"images": float(len(columns["abs_rel"])), "pairs": float(len(columns.get("rotation_deg", ())))}
    return result | counts


def clipped_depth_metrics(predicted: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Depth errors with prediction and truth, (N, H, W) metres, clipped at 3 m.

    Returns:
        (N,) each: `abs_rel`, `delta_1.25` (share of pixels whose ratio to the truth, either way, is below
        1.25) and `abs_rel_scaled` (after aligning the medians, clipped again).
    """
    truth, clipped = (values.clamp(NEAREST, DEPTH_MAX) for values in (truth, predicted))
    metric = depth_metrics(clipped, truth)
    scale = truth.flatten(1).median(1).values / clipped.flatten(1).median(1).values
    scaled = depth_metrics((clipped * scale[:, None, None]).clamp(NEAREST, DEPTH_MAX), truth)
    return {
        "abs_rel": metric["abs_rel"],
        "abs_rel_scaled": scaled["abs_rel"],
        "delta_1.25": metric["delta"],
    }


def pose_metrics(predicted: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Errors of camera poses relative to the reference view.

    Args:
        predicted, truth: (N, 3, 4) or (N, 4, 4) camera from reference.

    Returns:
        (N,) each: `rotation_deg`, `translation_angle_deg` (between the translations' directions) and
        `translation_m`.
    """
    product = predicted[:, :3, :3].transpose(1, 2) @ truth[:, :3, :3]
    cosine = (product.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2
    shift, true_shift = predicted[:, :3, 3], truth[:, :3, 3]
    direction = torch.cosine_similarity(shift, true_shift, dim=1, eps=1e-6)
    return {
        "rotation_deg": torch.rad2deg(torch.acos(cosine.clamp(-1, 1))),
        "translation_angle_deg": torch.rad2deg(torch.acos(direction.clamp(-1, 1))),
        "translation_m": (shift - true_shift).norm(dim=1),
    }


def _relative(extrinsics: Tensor) -> Tensor:
    """Poses of the later views relative to the *predicted* first one: (B, V, 3, 4) -> (B, V - 1, 3, 4)."""
    rotation, shift = extrinsics[..., :3], extrinsics[..., 3:]
    back = rotation[:, :1].transpose(-1, -2)
    turned = rotation[:, 1:] @ back
    return torch.cat([turned, shift[:, 1:] - turned @ shift[:, :1]], dim=-1)


def metrics_table(metrics: Mapping[str, float], title: str = "held-out tasks") -> Table:
    """The metrics as a table for the terminal."""
    table = Table(title=f"{title}: {metrics['images']:.0f} images, {metrics['pairs']:.0f} view pairs")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, label in ROWS.items():
        if name in metrics:
            table.add_row(label, f"{metrics[name]:.3f}")
    return table
