"""What the doctor inspects: a model and a batch, from a factory that the user names."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from spatial_forcing.alignment import TokenLayout, Views
from spatial_forcing.errors import ConfigError
from spatial_forcing.forcing.adapter import Alignable, Loss, ModuleStudent, loss_in
from spatial_forcing.registry import did_you_mean

EXPECTED = "a Subject, (model, batch) or (model, batch, loss)"


@dataclass(frozen=True)
class Subject:
    """A model with one training batch, and whatever is already known about it.

    Attributes:
        model: any `nn.Module`, or a student (`as_student(...)`, `protocols.Student`), whose blocks, layout
            and views are then verified.
        batch: a training batch as the model takes it, on the model's device; two samples or more say more.
            Or a function from `pixels` to such a batch, for models whose images enter it cut into patches.
        loss: (model, batch) -> loss or (loss, metrics); default: see `as_student`.
        blocks: path of the decoder blocks in `model`, e.g. `model.language_model.layers`.
        layout: batch -> TokenLayout, to be verified.
        views: batch -> Views, to be verified.
        pixels: (B, V, 3, H, W) in [0, 1]; needed where `batch` is a function.
    """

    model: nn.Module
    batch: Mapping[str, Any] | Callable[[Tensor], Mapping[str, Any]]
    loss: Loss | None = None
    blocks: str | None = None
    layout: Callable[[Any], TokenLayout] | None = None
    views: Callable[[Any], Views] | None = None
    pixels: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ConfigError(f"the subject's model is {_kind(self.model)}; expected an nn.Module.")
        if callable(self.batch) and not isinstance(self.batch, Mapping):
            if self.pixels is None or self.pixels.ndim != 5 or self.pixels.shape[2] != 3:
                raise ConfigError(
                    "the subject's batch is a function of images, so it needs pixels, (B, V, 3, H, W) in [0, "
                    "1]; pass Subject(..., pixels=...)."
                )
        elif not isinstance(self.batch, Mapping):
            raise ConfigError(
                f"the subject's batch is {_kind(self.batch)}; expected a mapping of tensors, or a function "
                "from images to one."
            )

    @property
    def student(self) -> nn.Module | None:
        """The model, where it is a student already."""
        return self.model if isinstance(self.model, Alignable) else None

    @property
    def bare(self) -> nn.Module:
        """The model inside `as_student(...)`, or the model."""
        return self.model.model if isinstance(self.model, ModuleStudent) else self.model

    def example(self) -> dict[str, Any]:
        """The batch."""
        if isinstance(self.batch, Mapping):
            return dict(self.batch)
        assert self.pixels is not None
        made = self.batch(self.pixels.clone())
        if not isinstance(made, Mapping):
            raise ConfigError(f"the subject's batch function returned {_kind(made)}; expected a mapping.")
        return dict(made)

    def run(self, batch: Mapping[str, Any]) -> Tensor:
        """The training loss of `batch`.

        Raises:
            ConfigError: the model returned none.
        """
        if self.student is not None:
            result = self.model(dict(batch))
        elif self.loss is not None:
            result = self.loss(self.model, dict(batch))
        else:
            returned = self.model(**batch)
            result = loss_in(returned)
            if result is None:
                raise ConfigError(
                    f"{type(self.model).__name__}(**batch) returned {_kind(returned)} without a loss; put "
                    "the targets in the batch or return Subject(model, batch, loss=lambda model, batch: ...)."
                )
        loss = result[0] if isinstance(result, tuple) else result
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ConfigError(f"the loss is {_kind(loss)}; expected one number in a tensor.")
        return loss


def load_subject(target: str) -> Subject:
    """Call the factory `MODULE:FACTORY` or `FILE.py:FACTORY`, which takes no arguments.

    Raises:
        ConfigError: no such module, file or function (the closest name is suggested); it needs arguments,
            failed, or returned something else.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise ConfigError(
            f"{target!r} names no factory; write MODULE:FACTORY or FILE.py:FACTORY, e.g. my_vla.py:build."
        )
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    factory = getattr(module, name, None)
    if factory is None:
        own = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        raise ConfigError(
            f"{place} has no {name!r}.{did_you_mean(name, own)} Functions there: "
            f"{', '.join(sorted(own)) or 'none'}."
        )
    if not callable(factory):
        raise ConfigError(f"{target} is {_kind(factory)}, not a function that returns {EXPECTED}.")
    try:
        needed = [
            p.name
            for p in inspect.signature(factory).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
    except ValueError:  # some builtins have no signature
        needed = []
    if needed:
        raise ConfigError(
            f"{target} needs the arguments {', '.join(needed)}; name a function without any that returns "
            f"{EXPECTED}."
        )
    try:
        made = factory()
    except Exception as error:
        raise ConfigError(
            f"{target}() failed: {type(error).__name__}: {error}. Call it in Python to see the traceback."
        ) from error
    return _subject(target, made)


def _subject(target: str, made: Any) -> Subject:
    if isinstance(made, Subject):
        return made
    if isinstance(made, Sequence) and len(made) in (2, 3):
        return Subject(*made)
    raise ConfigError(f"{target}() returned {_kind(made)}; expected {EXPECTED}.")


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ConfigError(f"there is no file {path}.{did_you_mean(str(path), near)}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # as `python FILE.py` does
    sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path} cannot be imported: {type(error).__name__}: {error}.") from error
    finally:
        sys.path.pop(0)
    return module


def _load_module(name: str) -> ModuleType:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(
                f"there is no module {name!r} (no {error.name!r}); run in its folder, install it, or name a "
                "file: FILE.py:FACTORY."
            ) from error
        raise ConfigError(f"{name} cannot be imported: {error}.") from error
    except Exception as error:
        raise ConfigError(f"{name} cannot be imported: {type(error).__name__}: {error}.") from error
    finally:
        sys.path.remove("")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
