"""Multi-view scenes on disk: rendered once, resumably, read by memory map.

A folder holds `manifest.json` (what was rendered) and one safetensors file a shard. A scene is V views of
one instant with exact depth, intrinsics and poses. Every shard depends only on (seed, shard number), so a
killed run continues with what is missing and ends with the same data.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor

from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.nano_teacher.cameras import Camera, corner_camera, moved_camera, orbit_camera
from spatial_forcing.nano_teacher.tasks import scene_file
from spatial_forcing.nano_teacher.world import TabletopWorld
from spatial_forcing.storage import disk_full_explained, replace_file, require_disk, write_json

DEPTH_UNIT = 1e-4
"""Metres of one step of the stored uint16 depth."""
DEPTH_MAX = 3.0
"""Depth is clipped here, when stored and in every metric (the sky would read about 100 m)."""
SHARD = 32
SCENES_PER_RESET = 8
POLICY_CAMERAS = ("corner", "wrist")
FORMAT = 2


@dataclass(frozen=True)
class SceneSpec:
    """What to render.

    Attributes:
        tasks: Meta-World tasks whose scenes are used in turn; tasks that share a scene file count once.
        count: number of scenes; rounded up to whole shards of 32.
        views: views of a scene.
        size: pixels on a side.
        seed: of everything random.
        plain: no clutter and no repainting (for evaluation: the benchmark's own looks).
        cameras: "policy": view 0 is the benchmark's corner camera, view 1 its wrist camera, exactly as
            policies use them (for evaluation: training never renders exactly these); "near-policy": the
            same two in turn, each moved and turned at random; "random": anywhere.
    """

    tasks: tuple[str, ...]
    count: int
    views: int = 3
    size: int = 128
    seed: int = 0
    plain: bool = False
    cameras: Literal["random", "near-policy", "policy"] = "random"

    def __post_init__(self) -> None:
        if not self.tasks or self.count < 1 or self.views < 1:
            raise ConfigError(
                f"scenes need tasks, and a count and views of 1 or more; got {self.tasks}, "
                f"{self.count}, {self.views}."
            )
        if self.cameras == "policy" and self.views != len(POLICY_CAMERAS):
            raise ConfigError(f"policy cameras are {POLICY_CAMERAS}; set views=2 instead of {self.views}.")

    @property
    def shards(self) -> int:
        """Number of files."""
        return -(-self.count // SHARD)

    @property
    def bytes(self) -> int:
        """Disk needed, without headers."""
        return self.shards * SHARD * self.views * (self.size**2 * 5 + 4 * (9 + 16))


@dataclass(frozen=True)
class SceneBatch:
    """B scenes of V views.

    Attributes:
        images: (B, V, 3, H, W) uint8.
        depth: (B, V, H, W) float32 metres along the optical axis, clipped at `DEPTH_MAX`.
        intrinsics: (B, V, 3, 3) pixels.
        poses: (B, V, 4, 4) world from camera, OpenCV axes, metres.
    """

    images: Tensor
    depth: Tensor
    intrinsics: Tensor
    poses: Tensor

    def to(self, device: torch.device) -> SceneBatch:
        """The same scenes on a device."""
        return SceneBatch(*(getattr(self, f.name).to(device) for f in fields(self)))

    def select(self, views: Tensor) -> SceneBatch:
        """The views with the given indices (W,) or, per scene, (B, W), in that order."""
        rows = torch.arange(len(self.images))[:, None]
        views = views.expand(len(self.images), -1)
        return SceneBatch(*(getattr(self, f.name)[rows, views] for f in fields(self)))


def missing_shards(folder: Path, spec: SceneSpec) -> list[int]:
    """Shards of `spec` that are not yet in `folder`.

    Raises:
        DataError: the folder holds scenes of another specification.
    """
    manifest = folder / "manifest.json"
    wanted = json.loads(json.dumps(asdict(spec) | {"format": FORMAT}))
    if manifest.exists():
        there = json.loads(manifest.read_text())
        # More scenes of the same kind extend a folder; shards do not depend on their number.
        different = sorted(
            k for k in wanted.keys() | there.keys() if k != "count" and wanted.get(k) != there.get(k)
        )
        if different:
            raise DataError(
                f"{folder} holds scenes with other {', '.join(different)} than asked for "
                f"({ {k: there.get(k) for k in different} }); choose another folder or delete this one."
            )
    return [i for i in range(spec.shards) if not shard_path(folder, i).exists()]


def shard_path(folder: Path, shard: int) -> Path:
    """File of one shard."""
    return folder / f"scenes-{shard:05d}.safetensors"


def render_scenes(folder: Path, spec: SceneSpec) -> Iterator[int]:
    """Render what is missing; yields each shard's number once its file is complete.

    Raises:
        DataError: the folder holds scenes of another specification.
        EnvironmentSetupError: too little disk space, or Meta-World is not installed.
    """
    missing = missing_shards(folder, spec)
    if not missing:
        return
    needed = spec.bytes * len(missing) // spec.shards
    require_disk(folder, needed, f"rendering {len(missing) * SHARD} scenes", "ask for fewer scenes")
    write_json(folder / "manifest.json", asdict(spec) | {"format": FORMAT})
    tasks = list({scene_file(task): task for task in spec.tasks}.values())
    worlds: dict[str, TabletopWorld] = {}
    try:
        for shard in missing:
            task = tasks[shard % len(tasks)]
            if task not in worlds:
                worlds[task] = TabletopWorld(task, spec.size)
            arrays = _render_shard(worlds[task], spec, shard)
            with disk_full_explained(folder, "the scenes rendered so far are kept"):
                replace_file(shard_path(folder, shard), functools.partial(save_file, arrays))
            yield shard
    finally:
        for world in worlds.values():
            world.close()


def _render_shard(world: TabletopWorld, spec: SceneSpec, shard: int) -> dict[str, NDArray[np.generic]]:
    rng = np.random.default_rng([spec.seed, shard])
    n, v, s = SHARD, spec.views, spec.size
    images = np.empty((n, v, 3, s, s), np.uint8)
    depth = np.empty((n, v, s, s), np.uint16)
    intrinsics = np.empty((n, v, 3, 3), np.float32)
    poses = np.empty((n, v, 4, 4), np.float32)
    for scene in range(n):
        if scene % SCENES_PER_RESET == 0:
            world.reset(rng)
        world.advance(rng, plain=spec.plain)
        kinds = _camera_kinds(rng, spec)
        for view in range(v):
            camera, rgb, metres = _accepted_view(world, rng, kinds[view])
            images[scene, view] = rgb.transpose(2, 0, 1)
            depth[scene, view] = np.round(np.clip(metres, 0, DEPTH_MAX) / DEPTH_UNIT)
            intrinsics[scene, view] = camera.intrinsics(s)
            poses[scene, view] = camera.pose
    return {"images": images, "depth": depth, "intrinsics": intrinsics, "poses": poses}


def _camera_kinds(rng: np.random.Generator, spec: SceneSpec) -> list[str]:
    """The kind of camera of each view, for `_camera`. Half of the random scenes have free cameras only."""
    if spec.cameras != "random":
        exact = spec.cameras == "policy"
        return [name if exact else f"near-{name}" for name in islice(cycle(POLICY_CAMERAS), spec.views)]
    if rng.random() < 0.5:
        return ["orbit"] * spec.views
    more = rng.choice(["orbit", "random-corner", "near-wrist"], max(spec.views - 2, 0))
    return ["random-corner", "near-wrist", *more][: spec.views]


def _camera(world: TabletopWorld, rng: np.random.Generator, kind: str) -> Camera:
    match kind:
        case "corner":
            return world.corner_camera()
        case "wrist":
            return world.wrist_camera()
        case "near-corner":
            return moved_camera(rng, world.corner_camera(), metres=0.04, degrees=3)
        case "near-wrist":
            return moved_camera(rng, world.wrist_camera())
        case "random-corner":
            return corner_camera(rng)
        case _:
            return orbit_camera(rng)


def _accepted_view(
    world: TabletopWorld, rng: np.random.Generator, kind: str, tries: int = 6
) -> tuple[Camera, NDArray[np.uint8], NDArray[np.float32]]:
    """A view that is not blocked by something right before the lens (the last try is taken anyway)."""
    for _ in range(tries):
        camera = _camera(world, rng, kind)
        rgb, depth = world.render(camera)
        near = 0.06 if kind == "near-wrist" else 0.2
        if kind in POLICY_CAMERAS or float((depth < near).mean()) < 0.2:
            break
    return camera, rgb, depth


class SceneDataset:
    """The complete shards in a folder, memory-mapped.

    Raises:
        DataError: the folder holds no scenes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards = [load_file(path) for path in sorted(folder.glob("scenes-*.safetensors"))]
        if not self._shards:
            raise DataError(
                f"no rendered scenes in {folder}; run `spatial-forcing teacher pretrain` to render."
            )

    def __len__(self) -> int:
        return len(self._shards) * SHARD

    def batch(self, indices: Tensor) -> SceneBatch:
        """Scenes with the given indices (B,)."""
        rows = [(self._shards[i // SHARD], i % SHARD) for i in indices.tolist()]
        stacked = {
            k: torch.stack([shard[k][row] for shard, row in rows]) for k in ("images", "intrinsics", "poses")
        }
        depth = torch.stack([shard["depth"][row].to(torch.int32) for shard, row in rows]) * DEPTH_UNIT
        return SceneBatch(stacked["images"], depth, stacked["intrinsics"], stacked["poses"])
