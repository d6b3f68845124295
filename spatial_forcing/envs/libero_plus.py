"""Perturbations of camera, light and image noise, in the spirit of LIBERO-Plus.

Not the published suite: LIBERO-Plus (arXiv 2510.13626) also changes layouts, textures, instructions and the
robot's pose, and draws thousands of fixed variants; these are three of its seven axes, with magnitudes of
our own, drawn for each environment or episode. Compare arms with each other, not with its table.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.errors import ConfigError

NONE = ""
AXES = ("camera", "light", "noise")


@dataclass
class Perturbation:
    """How strongly each axis is changed: 0 not at all, 1 about as much as LIBERO-Plus's middle levels.

    Attributes:
        camera: 1 moves third-person cameras by 8 cm and turns them by 6 degrees, in random directions.
        light: 1 scales all lights by a factor from 0.4 to 1.6 and moves them by half a metre.
        noise: 1 adds normal pixel noise with a deviation of 25 of 255 grey levels.
        seed: of the camera's and the light's draw; the noise follows the episode's seed.
    """

    camera: float = 0.0
    light: float = 0.0
    noise_level: float = 0.0
    seed: int = 0
    _episode: int = 0

    @classmethod
    def parse(cls, text: str) -> Perturbation:
        """`camera=1,light=0.5,noise=1,seed=3`; empty: no perturbation.

        Raises:
            ConfigError: an unknown axis, or a strength that is negative or no number.
        """
        values: dict[str, float] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, _, number = part.partition("=")
            if name not in (*AXES, "seed"):
                raise ConfigError(f"perturbation {part!r}: choose from {', '.join((*AXES, 'seed'))}.")
            try:
                values[name] = float(number or 1)
            except ValueError:
                raise ConfigError(f"perturbation {part!r}: {number!r} is not a number.") from None
            if not values[name] >= 0:
                raise ConfigError(f"perturbation {part!r}: expected 0 or more.")
        seed = int(values.pop("seed", 0))
        noise = values.pop("noise", 0.0)
        return cls(
            camera=values.get("camera", 0.0), light=values.get("light", 0.0), noise_level=noise, seed=seed
        )

    def apply(self, model: Any, cameras: Sequence[str]) -> None:
        """Move third-person cameras and lights of a `mujoco.MjModel`; wrist cameras stay where they are."""
        import mujoco

        rng = np.random.default_rng(self.seed)
        for camera in cameras:
            if self.camera and "eye_in_hand" not in camera:
                shift = rng.normal(size=3)
                model.camera(camera).pos += self.camera * 0.08 * shift / np.linalg.norm(shift)
                axis, turned = rng.normal(size=3), np.zeros(4)
                quaternion = np.zeros(4)
                mujoco.mju_axisAngle2Quat(
                    quaternion, axis / np.linalg.norm(axis), self.camera * np.deg2rad(6)
                )
                mujoco.mju_mulQuat(turned, model.camera(camera).quat, quaternion)
                model.camera(camera).quat[:] = turned
        if self.light:
            factor = float(np.clip(1 + self.light * rng.uniform(-0.6, 0.6), 0, None))
            model.light_diffuse[:] *= factor
            model.light_ambient[:] *= factor
            model.vis.headlight.diffuse[:] *= factor
            model.vis.headlight.ambient[:] *= factor
            model.light_pos[:] += self.light * rng.uniform(-0.5, 0.5, model.light_pos.shape)

    def begin(self, seed: int) -> None:
        """Start an episode; its noise depends on `seed` alone."""
        self._episode = seed

    def noise(self, image: NDArray[np.uint8], step: int, camera: str) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 with pixel noise; the same for the same episode, step and camera."""
        if not self.noise_level:
            return image
        rng = np.random.default_rng((self.seed, self._episode, step, zlib.crc32(camera.encode())))
        noisy = image + rng.normal(0.0, 25.0 * self.noise_level, image.shape)
        return np.clip(noisy.round(), 0, 255).astype(np.uint8)
