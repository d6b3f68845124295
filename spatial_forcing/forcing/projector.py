"""The projector: Norm, Linear, GELU, Linear (paper, section 3). Trained with the student, never deployed.

Its parameters stay float32 whatever the student's type, and it computes in float32 under autocast: the
released code does the same, and the cosine's gradients are small.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_forcing.precision import FixedPrecision


class Projector(FixedPrecision):
    """Maps student hidden states to the teacher's channels; several layers may share one.

    Parameter names are those of the released code (`fc1`, `fc2`, `vlm_norm`), so its files load.

    Args:
        student_dim: D, width of the student's residual stream.
        teacher_dim: C; the hidden layer has this width too.
        norm: `layer`, `batch` (statistics over valid tokens, for each process) or `none`.

    Building one draws from no random stream but a fork of the CPU's, so training is not shifted by it.
    """

    def __init__(self, student_dim: int, teacher_dim: int, norm: str = "layer") -> None:
        super().__init__()
        # Made on the CPU whatever the default device, so that only its stream needs protection.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            self.fc1 = nn.Linear(student_dim, teacher_dim, dtype=torch.float32)
            self.fc2 = nn.Linear(teacher_dim, teacher_dim, dtype=torch.float32)
            self.vlm_norm = _norm(norm, student_dim)
            for layer in (self.fc1, self.fc2):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """Project (B, N, D) of any float type to (B, N, C) float32.

        Args:
            hidden: student tokens; rows that are not valid are replaced by zeros first.
            valid: (B, N) bool.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            hidden_layer: Tensor = self.fc1(self.normalise(hidden, valid))
            projected: Tensor = self.fc2(F.gelu(hidden_layer))
            return projected

    def normalise(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """The input of the first layer, (B, N, D) float32; arguments as of `forward`."""
        x = torch.where(valid[..., None], hidden.float(), 0.0)
        if not isinstance(self.vlm_norm, nn.BatchNorm1d):
            return x if self.vlm_norm is None else self.vlm_norm(x)
        # Statistics over valid tokens only; fewer than two have no variance, so the running ones serve.
        training = self.training and int(valid.sum()) > 1
        norm = self.vlm_norm
        normalised = F.batch_norm(
            x[valid],
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            training,
            norm.momentum or 0.1,
            norm.eps,
        )
        return x.masked_scatter(valid[..., None], normalised)


def _norm(kind: str, dim: int) -> nn.Module | None:
    if kind == "layer":
        return nn.LayerNorm(dim, eps=1e-5, dtype=torch.float32)
    return nn.BatchNorm1d(dim, dtype=torch.float32) if kind == "batch" else None
