"""Put the method on any PyTorch model without changing its code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from spatial_forcing.alignment import Alignment, Sequencer, TokenLayout, Views
from spatial_forcing.errors import ConfigError
from spatial_forcing.protocols import Batch, Metrics

Loss = Callable[[nn.Module, Any], Any]


@runtime_checkable
class Alignable(Protocol):
    """The part of `protocols.Student` that the alignment needs."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The decoder blocks, in order."""
        ...

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last block, or None."""
        ...

    def alignment(self, batch: Batch) -> Alignment:
        """Where the batch's visual tokens are, and what the teacher should see."""
        ...

    def __call__(self, batch: Batch, alignment: Alignment | None = None) -> tuple[Tensor, Metrics]:
        """The action loss and its metrics."""
        ...


def loss_in(returned: Any) -> Tensor | None:
    """The loss in what a model returned: `.loss`, `["loss"]`, the first of a tuple, or the scalar itself.

    None where none of these is one number in a tensor.
    """
    if isinstance(returned, Mapping):  # transformers' outputs are mappings, too
        found = returned.get("loss")
    elif isinstance(returned, tuple) and not hasattr(returned, "loss"):
        found = returned[0] if returned else None
    elif isinstance(returned, Tensor):
        found = returned if returned.ndim == 0 else None
    else:
        found = getattr(returned, "loss", None)
    return found if isinstance(found, Tensor) and found.numel() == 1 else None


class ModuleStudent(nn.Module):
    """Any model as a student; made by `as_student`. `model` is the model itself, unchanged."""

    def __init__(
        self,
        model: nn.Module,
        *,
        blocks: Sequence[nn.Module],
        layout: Callable[[Any], TokenLayout],
        views: Callable[[Any], Views],
        loss: Loss | None,
        final_norm: nn.Module | None,
        sequence: Sequencer | None,
    ) -> None:
        super().__init__()
        self.model = model
        # Lists keep modules that already belong to `model` from being registered (and saved) twice.
        self._blocks = list(blocks)
        self._final_norm = [final_norm]
        self._layout, self._views, self._loss, self._sequence = layout, views, loss, sequence

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The decoder blocks given to `as_student`."""
        return self._blocks

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm given to `as_student`."""
        return self._final_norm[0]

    def alignment(self, batch: Any) -> Alignment:
        """By the functions given to `as_student`."""
        return Alignment(self._layout(batch), self._views(batch), sequence=self._sequence)

    def forward(self, batch: Any, alignment: Alignment | None = None) -> tuple[Tensor, Metrics]:
        """The model's own loss and metrics.

        Raises:
            ConfigError: the model returned no loss (see `loss_in`).
        """
        if self._loss is None:
            returned = self.model(**batch)
            result: Any = loss_in(returned)
        else:
            returned = result = self._loss(self.model, batch)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        if not isinstance(loss, Tensor):
            raise ConfigError(
                f"the student returned {type(returned).__name__} without a loss; put the labels in the batch "
                "or pass loss=lambda model, batch: ... to as_student."
            )
        return loss, metrics


def as_student(
    model: nn.Module,
    *,
    blocks: Sequence[nn.Module],
    layout: Callable[[Any], TokenLayout],
    views: Callable[[Any], Views],
    loss: Loss | None = None,
    final_norm: nn.Module | None = None,
    sequence: Sequencer | None = None,
) -> ModuleStudent:
    """Wrap any model so that `SpatialForcing` can train it.

    Args:
        model: the model; its parameters keep their names, and `SpatialForcing.export()` returns it.
        blocks: its decoder blocks in order, e.g. `model.model.language_model.layers`; or those of an encoder
            that holds the visual tokens (ACT, diffusion policies, a vision tower).
        layout: batch -> TokenLayout; see `layout_from_input_ids` and `layout_from_offset`.
        views: batch -> Views, images in [0, 1].
        loss: (model, batch) -> loss or (loss, metrics); default: the loss in `model(**batch)`, as `.loss`,
            `["loss"]` or the first of a tuple.
        final_norm: the norm after the last block; only needed to tap after all blocks.
        sequence: what enters a block, one tensor a call -> (B, L, D), in which `layout` counts; default the
            first
            call. For an encoder with V views in its batch dimension
            `lambda calls: calls[0].unflatten(0, (-1, V)).flatten(1, 2)`; for one that runs once a view
            `lambda calls: torch.cat(calls, 1)`; with the sequence first `lambda calls: calls[0].transpose(0,
            1)`; for feature maps (N, D, h, w) `calls[0].flatten(2).transpose(1, 2)` first.

    Raises:
        ConfigError: `blocks` is empty or holds modules that are not part of the model.
    """
    own = {id(module) for module in model.modules()}
    strangers = [i for i, block in enumerate(blocks) if id(block) not in own]
    if not len(blocks) or strangers:
        raise ConfigError(
            f"as_student: blocks {strangers} of {len(blocks)} are not modules of {type(model).__name__}; "
            "pass its decoder layers, e.g. model.model.language_model.layers."
        )
    return ModuleStudent(
        model, blocks=blocks, layout=layout, views=views, loss=loss, final_norm=final_norm, sequence=sequence
    )
