"""Statistics of tokens: effective rank and collapse, similarity of layers (CKA), maps in two dimensions.

Shapes: N tokens, C or D channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from spatial_forcing.errors import CheckpointError, DataError, EnvironmentSetupError
from spatial_forcing.forcing.extras.gate import GatedProjector
from spatial_forcing.forcing.projector import Projector

COLLAPSED_RANK = 0.1
"""Effective rank below this share of the reference's counts as collapse."""
COLLAPSED_COSINE = 0.99
"""Mean cosine between different tokens above which they count as all alike."""


@dataclass(frozen=True)
class RankReport:
    """How many directions a set of tokens uses.

    Attributes:
        name: which tokens.
        rank: effective rank, exp of the entropy of the normalised singular values of the centred tokens.
        channels: the most it could be.
        constant: share of the mean squared norm that the mean token has, in [0, 1]; what is left varies.
        cosine: mean cosine between two different tokens, in [-1, 1].
    """

    name: str
    rank: float
    channels: int
    constant: float
    cosine: float


def rank_report(name: str, tokens: Tensor) -> RankReport:
    """Rank and collapse of tokens (..., C); the effective rank of Roy and Vetterli (2007).

    Raises:
        DataError: fewer than two tokens, or a value that is not finite.
    """
    flat = tokens.flatten(0, -2).double()
    if len(flat) < 2 or not bool(torch.isfinite(flat).all()):
        raise DataError(f"the tokens {name!r} are {tuple(tokens.shape)}; expected two or more, all finite.")
    mean = flat.mean(0)
    energy = flat.square().sum(1).mean().clamp(min=1e-30)
    unit = F.normalize(flat, dim=1)
    n = len(flat)
    # The mean over all pairs of different tokens, without forming them.
    cosine = (unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1))
    return RankReport(
        name=name,
        rank=effective_rank(flat),
        channels=flat.shape[1],
        constant=float(mean.square().sum() / energy),
        cosine=float(cosine),
    )


def effective_rank(tokens: Tensor) -> float:
    """exp(entropy) of the normalised singular values of the centred tokens (N, C); 0 if all are the same."""
    flat = tokens.double()
    centred = flat - flat.mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0).sqrt()
    if float(values.sum()) <= 1e-9 * max(1.0, float(flat.norm())):
        return 0.0
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


def collapse_verdict(own: RankReport, reference: RankReport) -> str:
    """In words, whether tokens have collapsed compared with a reference (the target, or before training)."""
    share = own.rank / max(reference.rank, 1e-9)
    used = (
        f"{own.name}: effective rank {own.rank:.1f} of {own.channels}, {100 * share:.0f} % of that of "
        f"{reference.name} ({reference.rank:.1f}); mean cosine between tokens {own.cosine:.3f}."
    )
    if share < COLLAPSED_RANK:
        return f"{used} They have collapsed to few directions."
    if own.cosine > COLLAPSED_COSINE:
        return (
            f"{used} All tokens are nearly the same vector: a cosine to the target says little "
            f"({100 * reference.constant:.0f} % of the target's norm is one constant)."
        )
    return f"{used} No sign of collapse."


def cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment of tokens (N, C) and (N, D), in [0, 1] (Kornblith et al. 2019).

    Invariant to rotations and one scale of either; computed from channels, so N may be large.

    Raises:
        DataError: different numbers of tokens.
    """
    if len(first) != len(second):
        raise DataError(f"CKA needs the same tokens on both sides, not {len(first)} and {len(second)}.")
    x, y = (t.double() - t.double().mean(0) for t in (first, second))
    shared = (y.T @ x).square().sum()
    own = (x.T @ x).norm() * (y.T @ y).norm()
    return float(shared / own.clamp(min=1e-30))


def cka_matrix(students: Mapping[int, Tensor], teachers: Mapping[int, Tensor]) -> NDArray[np.float64]:
    """CKA of student layers (rows) and teacher layers (columns), each (N, V, h, w, C) over the same frames.

    Teacher grids are read at the student's tokens.
    """
    size = next(iter(students.values())).shape[2:4]
    onto = {k: on_grid(t, (size[0], size[1])).flatten(0, 3) for k, t in teachers.items()}
    return np.array([[cka(s.flatten(0, 3), t) for t in onto.values()] for s in students.values()])


def on_grid(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Feature grids (N, V, H, W, C) read at (N, V, h, w, C), corners aligned as in the alignment's target."""
    flat = features.flatten(0, 1).permute(0, 3, 1, 2)
    read = F.interpolate(flat, size, mode="bilinear", align_corners=True)
    return read.permute(0, 2, 3, 1).unflatten(0, features.shape[:2])


def load_projector(checkpoint: Path, label: str = "") -> Projector | None:
    """The projector of a training checkpoint, in eval mode; None for a run without alignment.

    Where every pair has its own, that of the first pair; of several teachers, that of the one with `label`.

    Raises:
        CheckpointError: the file is not a projector of this package.
    """
    path = checkpoint / "projector.safetensors"
    if not path.exists():
        return None
    held = load_file(path)
    prefixes = (f"projector.{label}.", "projector.0.", "projector.")
    prefix = next(p for p in prefixes if p == prefixes[-1] or any(k.startswith(p) for k in held))
    state = {k.removeprefix(prefix): v for k, v in held.items() if k.startswith(prefix)}
    if "conv.weight" in state:
        return None  # a convolution needs the tokens' grid, which is not kept here
    try:
        dim, student = state["fc1.weight"].shape
        norm = (
            "none"
            if "vlm_norm.weight" not in state
            else "batch"
            if "vlm_norm.running_mean" in state
            else "layer"
        )
        projector = (
            GatedProjector(student, dim, norm, len(state["gate"]))
            if "gate" in state
            else Projector(student, dim, norm)
        )
        projector.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a projector ({error}); give a checkpoint of this package."
        ) from error
    return projector.eval()


@torch.no_grad()
def projected(projector: Projector, tokens: Tensor) -> Tensor:
    """Student tokens (N, V, h, w, D) through the projector, (N, V, h, w, C)."""
    flat = tokens.flatten(1, 3)
    out = projector(flat, torch.ones(flat.shape[:2], dtype=torch.bool))
    return out.unflatten(1, tokens.shape[1:4])


def tsne(tokens: Mapping[str, Tensor], *, points: int = 400, seed: int = 0) -> dict[str, NDArray[np.float64]]:
    """Each set of tokens (..., C) in two dimensions by t-SNE (as in the paper's figure), (n, 2) by name.

    The same places are shown of every set; sets are embedded one by one, so only their shapes compare.

    Raises:
        EnvironmentSetupError: scikit-learn is not installed.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise EnvironmentSetupError(
            "t-SNE needs scikit-learn: pip install 'spatial-forcing[report]'."
        ) from error
    shown = {}
    for name, values in tokens.items():
        flat = values.flatten(0, -2).float()
        chosen = np.linspace(0, len(flat) - 1, min(points, len(flat))).astype(int)
        perplexity = min(30.0, max(2.0, (len(chosen) - 1) / 3))
        embed = TSNE(2, init="pca", perplexity=perplexity, random_state=seed)
        shown[name] = np.asarray(embed.fit_transform(flat[torch.from_numpy(chosen)].numpy()), float)
    return shown


def pca_2d(tokens: Mapping[str, Tensor], *, points: int = 400) -> dict[str, NDArray[np.float64]]:
    """Each set of tokens (..., C) on its first two principal components, (n, 2) by name."""
    shown = {}
    for name, values in tokens.items():
        flat = values.flatten(0, -2).double()
        centred = flat - flat.mean(0)
        _, vectors = torch.linalg.eigh(centred.T @ centred)
        chosen = np.linspace(0, len(flat) - 1, min(points, len(flat))).astype(int)
        shown[name] = (centred[torch.from_numpy(chosen)] @ vectors[:, [-1, -2]]).numpy()
    return shown


def audit_curves(
    rows: Sequence[Mapping[str, float]],
) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """The gradient audit of a run's metrics lines: {"cosine" or "ratio": {place: (steps, values)}}.

    Places are blocks (`block0`, ...), what lies before them (`input`) and `all` of the student that both
    losses reach.
    """
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {"cosine": {}, "ratio": {}}
    for row in rows:
        for key, value in row.items():
            parts = key.split("/")
            if len(parts) == 3 and parts[0] == "audit" and parts[1] in curves:
                steps, values = curves[parts[1]].setdefault(parts[2], ([], []))
                steps.append(float(row["step"]))
                values.append(float(value))
    return curves
