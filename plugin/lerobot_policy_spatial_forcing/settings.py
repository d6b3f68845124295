"""The settings below `--policy.forcing.`: `ForcingConfig`, and where the teacher comes from."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from spatial_forcing.errors import ConfigError
from spatial_forcing.forcing import ForcingConfig


@dataclass(frozen=True)
class ForcingSettings(ForcingConfig):
    """Spatial Forcing for a LeRobot policy: every setting of `spatial_forcing.ForcingConfig`, and the
    teacher.

    With `alpha` 0 the stock policy is trained, step by step the same. `pairs` of None is the family's layer
    (pi0: 12 of 18) and the teacher's last.

    Attributes:
        teacher: registered name, folder or hub id. Loaded by the first training batch (at once where its
            width is not known yet), never for acting.
        teacher_dtype: fp32, bf16 or fp16.
        teacher_resolution: pixels at which it encodes; default its own.
        cache: folder of its cached features (`spatial-forcing cache build`); then it is never loaded.
        cache_cameras: names of the cameras in the cache, where the policy calls them otherwise (rename_map).
        cameras: names (without `observation.images.`) of the views to align, in this order; default all.
        schedule_steps: steps of the whole run, for a schedule; `lerobot-train` fills in --steps.
        teacher_dim, teacher_depth: filled in when the teacher is first seen, so that a trained policy acts
            without it.
        weight, layers, teacher_layers: earlier names of `alpha` and of the two halves of `pairs`; read, never
            written.
    """

    teacher: str = "facebook/VGGT-1B"
    teacher_dtype: str = "bf16"
    teacher_resolution: int | None = None
    cache: str | None = None
    cache_cameras: tuple[str, ...] | None = None
    cameras: tuple[str, ...] | None = None
    schedule_steps: int | None = None
    teacher_dim: int | None = None
    teacher_depth: int | None = None
    weight: float | None = None
    layers: tuple[int, ...] | None = None
    teacher_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.weight is not None:
            object.__setattr__(self, "alpha", self.weight)
        if self.layers is not None:
            targets = tuple(self.teacher_layers or (-1,))
            targets = targets * len(self.layers) if len(targets) == 1 else targets
            if len(targets) != len(self.layers):
                raise ConfigError(
                    f"policy.forcing.teacher_layers {self.teacher_layers} and layers {self.layers} differ in "
                    "length; give policy.forcing.pairs, (layer, teacher layer) each."
                )
            object.__setattr__(self, "pairs", tuple(zip(self.layers, targets, strict=True)))
        for name in ("weight", "layers", "teacher_layers"):
            object.__setattr__(self, name, None)
        for name in ("cameras", "cache_cameras"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))  # JSON and the command line deliver lists
        super().__post_init__()

    def method(self, default_layer: int) -> ForcingConfig:
        """The method's settings, with `default_layer` blocks before the tap where `pairs` is None."""
        own = {field.name: getattr(self, field.name) for field in fields(ForcingConfig)}
        method = ForcingConfig(**own)
        return method if self.pairs is not None else replace(method, pairs=((default_layer, -1),))

    @property
    def needs_steps(self) -> bool:
        """Whether alpha depends on the progress of training."""
        return self.alpha > 0 and self.alpha_schedule.needs_progress
