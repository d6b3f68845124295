"""Suggests the layer to align, from the depth probe, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spatial_forcing.analysis.probe import ProbeMetrics

PUBLISHED = 0.75
"""Depth of the published layer, as a fraction of the student's blocks."""


@dataclass(frozen=True)
class LayerSuggestion:
    """A layer to align.

    Attributes:
        layer: blocks before the tap.
        reason: in words.
        clear: False where layers differ by less than their errors and the published rule decides.
        gaps: AbsRel above the ceiling (or, without one, above the best layer) by layer.
    """

    layer: int
    reason: str
    clear: bool
    gaps: dict[int, float]


def suggest_layer(metrics: Sequence[ProbeMetrics], name: str, blocks: int) -> LayerSuggestion | None:
    """The layer of student `name` whose tokens hold the least depth; None where no layer that can be aligned
    was probed.

    Candidates have a block below them to train and one above to use the result. Among them, the layer whose
    tokens hold the least depth compared with the ceiling; layers within one standard error of it count as
    equal, and the one nearest to the published three quarters of the depth is taken. Where a linear readout
    was fitted, it decides. The probe measures depth in the tokens, not whether alignment helps: that is what
    `compare` measures.
    """
    rows = [m for m in metrics if m.camera == "all"]
    mine = {m.layer: m for m in _readout(m for m in rows if m.name == name) if m.layer is not None}
    candidates = [k for k in sorted(mine) if 0 < k < blocks] or [k for k in sorted(mine) if k > 0]
    if not candidates:
        return None
    head = mine[candidates[0]].head
    ceilings = [m.abs_rel for m in rows if m.kind == "ceiling" and m.head == head]
    floor = min(ceilings) if ceilings else min(m.abs_rel for m in mine.values())
    gaps = {k: mine[k].abs_rel - floor for k in sorted(mine)}
    worst = max(candidates, key=lambda k: gaps[k])
    tied = [k for k in candidates if gaps[worst] - gaps[k] <= mine[worst].abs_rel_error]
    published = max(1, round(PUBLISHED * blocks))
    layer = min(tied, key=lambda k: (abs(k - published), k))
    compared = "the teacher" if ceilings else "its best layer"
    error = f"{mine[worst].abs_rel_error:.4f}"
    if len(candidates) == 1:
        reason = (
            f"it is the only probed layer that can be aligned (after {layer} of {blocks} blocks; AbsRel "
            f"{gaps[layer]:+.4f} against {compared}): probe more layers to choose among them"
        )
    elif len(tied) == 1:
        reason = (
            f"after {layer} of {blocks} blocks the tokens hold least depth: AbsRel {gaps[layer]:+.4f} "
            f"against {compared}, and every other layer between two blocks is more than one standard error "
            f"({error}) better"
        )
    else:
        reason = (
            f"layers {', '.join(map(str, tied))} differ by less than one standard error ({error}); of these "
            f"{layer} is nearest to the published three quarters of the depth ({published} of {blocks})"
        )
    return LayerSuggestion(layer, f"{reason}. Confirm it with `compare`.", len(tied) == 1, gaps)


def _readout(metrics: Iterable[ProbeMetrics]) -> list[ProbeMetrics]:
    """The metrics of the linear readout, or all metrics where there is no linear one."""
    found = list(metrics)
    return [m for m in found if m.head == "linear"] or found
