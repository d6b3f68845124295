"""The tap: the student's residual stream after k decoder blocks, read without touching the model's code.

The state after k blocks is what enters block k. It is read by a pre-hook on that block's
`input_layernorm`, where there is one: models that run two experts jointly (pi0) call a block's parts one
by one and never the block itself. Blocks without it are hooked themselves. The state after all blocks is
what enters the final norm, or, where there is none, what leaves the last block.

Hooks stay in place between forwards. They do nothing unless the tap is armed, which it is during a forward
only: activation checkpointing runs a block (and so the hook) again during backward, and what the hook sees in
that second run is not part of the graph that the loss was computed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spatial_forcing.alignment import Sequencer
from spatial_forcing.errors import ConfigError


@dataclass(frozen=True)
class Site:
    """What is tapped: blocks in order, the norm after the last one (or None), the width of their tokens."""

    blocks: tuple[nn.Module, ...]
    final_norm: nn.Module | None
    width: int


class Tap:
    """Captures the residual stream after each of `depths` blocks during an armed forward.

    Args:
        blocks: the student's decoder blocks, in order.
        depths: how many blocks lie before each tap, 0..len(blocks).
        final_norm: the norm after the last block, or None.

    Attach it before the student is compiled: a compiled graph ignores hooks that came later.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], depths: Sequence[int], final_norm: nn.Module | None
    ) -> None:
        self.depths = tuple(dict.fromkeys(depths))
        self._captured: dict[int, list[Tensor]] | None = None
        self.blocks = list(blocks)
        self._final_norm = final_norm
        self._handles: list[RemovableHandle] = []
        self.attach()

    def attach(self) -> None:
        """Put the hooks in place; nothing happens if they are."""
        if not self._handles:
            self._handles = [self._hook(k) for k in self.depths]

    def detach(self) -> None:
        """Remove the hooks from the student."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def armed(self) -> Iterator[dict[int, list[Tensor]]]:
        """One forward of the student. The states by depth are in the dictionary when it ends, one for each
        call.

        Raises:
            ConfigError: a hook never fired.
        """
        self.attach()
        states: dict[int, list[Tensor]] = {}
        captured: dict[int, list[Tensor]] = {}
        self._captured = captured
        try:
            # Blocks compiled one by one share code; by default it ignores that only some of them have a hook.
            with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
                yield states
        finally:
            self._captured = None
        states.update({k: self._checked(k, captured) for k in self.depths})

    def capture(self, depth: int, value: Any) -> None:
        """What a hook calls with the state that it sees."""
        if self._captured is not None:
            self._captured.setdefault(depth, []).append(_tensor(value, depth))

    def _checked(self, k: int, captured: Mapping[int, list[Tensor]]) -> list[Tensor]:
        if k not in captured:
            raise ConfigError(
                f"the tap after {k} blocks never fired: {self.site(k)} was not called in the student's "
                "forward. Check that `blocks` lists the modules that really run, in order, and attach "
                "SpatialForcing before the student is compiled or run."
            )
        return captured[k]

    def site(self, k: int) -> str:
        """The place of the tap after `k` blocks in words, for messages."""
        if k < len(self.blocks):
            return f"block {k} ({type(self.blocks[k]).__name__})"
        return "the final norm" if self._final_norm is not None else f"block {k - 1}, the last one,"

    def _hook(self, k: int) -> RemovableHandle:
        if k == len(self.blocks) and self._final_norm is None:
            return self.blocks[-1].register_forward_hook(_OutputHook(self, k))
        module = self._final_norm if k == len(self.blocks) else first_norm(self.blocks[k])
        assert module is not None
        return module.register_forward_pre_hook(_InputHook(self, k), with_kwargs=True)


def in_sequence(calls: Sequence[Tensor], sequence: Sequencer | None, k: int) -> Tensor:
    """The (B, L, D) sequence after `k` blocks from what was captured; see `Alignment.sequence`.

    Raises:
        ConfigError: it is not a sequence.
    """
    state = calls[0] if sequence is None else sequence(calls)
    if state.ndim != 3:
        raise ConfigError(
            f"the tap after {k} blocks read a tensor of shape {tuple(state.shape)}; expected (batch, "
            "sequence, width). Pass blocks between which tokens flow, or as_student(..., sequence=...), "
            "which makes the sequence of what enters a block (`spatial-forcing doctor` proposes it)."
        )
    return state


def first_norm(block: nn.Module) -> nn.Module:
    """The block's `input_layernorm`, or the block itself where there is none."""
    norm = getattr(block, "input_layernorm", None)
    return norm if isinstance(norm, nn.Module) else block


def entering(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The hidden state among the arguments of a block or norm."""
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))


class _InputHook:
    """A pre-hook. An object, not a closure, so that a deep copy of the model captures into its own tap."""

    def __init__(self, tap: Tap, depth: int) -> None:
        self.tap, self.depth = tap, depth

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.tap.capture(self.depth, entering(args, kwargs))


class _OutputHook:
    """A forward hook, for models without a final norm."""

    def __init__(self, tap: Tap, depth: int) -> None:
        self.tap, self.depth = tap, depth

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.tap.capture(self.depth, output)


def _tensor(value: Any, depth: int) -> Tensor:
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    if not isinstance(value, Tensor):
        raise ConfigError(
            f"the tap after {depth} blocks read {type(value).__name__} where the hidden state was expected; "
            "a block must take it as its first argument and return it first."
        )
    return value


def check_trainable(hidden: Tensor, k: int, blocks: Sequence[nn.Module]) -> None:
    """Reject a tap that no trainable parameter can influence: the loss would train nothing but the projector.

    Args:
        hidden: the captured state.
        k: blocks before the tap.
        blocks: the student's blocks.

    Raises:
        ConfigError: nothing below the tap is trainable, or the state was captured without a graph.
    """
    # Parameters inside a reentrant checkpoint are not in the graph of its output, so look at them directly.
    below = any(p.requires_grad for block in blocks[:k] for p in block.parameters())
    if below and not hidden.requires_grad:
        raise ConfigError(
            f"the tap after {k} blocks read a state without gradient although parameters below it are "
            "trainable: the blocks ran under no_grad. A reentrant checkpoint around several blocks does "
            "this; use use_reentrant=False, or checkpoint block by block."
        )
    if not below and not (hidden.requires_grad and _reaches_parameter(hidden)):
        unfreeze = f"blocks 0..{k - 1} (or put LoRA on them), the" if k else "the"
        raise ConfigError(
            f"nothing below the tap after {k} blocks is trainable, so the alignment loss cannot change the "
            f"student. Unfreeze {unfreeze} token embedding or the vision tower, or tap a later layer."
        )


def _reaches_parameter(hidden: Tensor) -> bool:
    """Whether the graph of `hidden` leads to a trainable parameter.

    Any will do: under FSDP the graph holds gathered parameters, which the module does not list.
    """
    if isinstance(hidden, nn.Parameter):
        return hidden.requires_grad
    pending, seen = [hidden.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        seen.add(node)
        pending.extend(parent for parent, _ in node.next_functions)
    return False


def width_of(blocks: Sequence[nn.Module], final_norm: nn.Module | None) -> int:
    """Width of the residual stream, read from the norms that take it.

    Raises:
        ConfigError: no norm tells; the message says how to give it.
    """
    candidates = [first_norm(block) for block in blocks] + [final_norm]
    # Only direct children: norms deeper in a block may act on one attention head.
    candidates += [m for block in blocks for m in block.children() if type(m).__name__.endswith("Norm")]
    for module in candidates:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 1:
            return weight.numel()
    raise ConfigError(
        "the width of the student's residual stream cannot be read from its norms; give it as "
        "SpatialForcing(..., student_dim=WIDTH)."
    )
