"""Frozen dataclasses from and to JSON, by dotted names, and what differs between two of them."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from spatial_forcing.errors import ConfigError
from spatial_forcing.registry import did_you_mean

T = TypeVar("T")

RENAMED = {"forcing.centre": "forcing.subtract_cell_mean"}
"""Settings that earlier versions wrote under another name; both are read."""


def to_plain(value: Any) -> Any:
    """Dataclasses to dicts, tuples to lists, paths to strings: what JSON can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def from_plain(kind: type[T], plain: Mapping[str, Any], place: str = "") -> T:
    """The dataclass `kind` with the values of `plain`; absent ones keep their defaults.

    Raises:
        ConfigError: an unknown name (did you mean), or a value of the wrong type; names the dotted place.
    """
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    values = {}
    for written, value in plain.items():
        full = _join(place, written)
        name = RENAMED[full].rpartition(".")[2] if full in RENAMED else written
        if name not in names:
            raise ConfigError(f"unknown setting {_join(place, name)!r}.{did_you_mean(name, names)}")
        values[name] = _coerce(hints[name], value, _join(place, name))
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{place or kind.__name__} is incomplete: {error}.") from error


HUB = "hub"
"""Metadata of a field whose path may be the id of a repository on the hub instead."""
ABOVE = 2
"""Levels above a run's folder that still belong to it: a comparison's run and its demonstrations."""


def to_file(config: Any, folder: Path) -> dict[str, Any]:
    """What a file in `folder` holds, which is the run's own: its paths are relative to it, "output" is ".".

    An absolute path stays absolute unless it lies in `folder` or beside it, so that the folder can be moved
    or sent together with what was made there.
    """
    here = Path(os.path.abspath(folder))

    def relative(path: Path) -> Path:
        there = Path(os.path.relpath(path, here))
        near = there.parts[ABOVE : ABOVE + 1] != ("..",)
        return there if near or not path.is_absolute() else path

    plain: dict[str, Any] = to_plain(_map_paths(config, relative))
    return plain | {"output": "."}


def from_file(kind: type[T], plain: Mapping[str, Any], folder: Path) -> T:
    """The dataclass of a file in `folder`: one that `to_file` wrote, or one whose paths are as given.

    Raises:
        ConfigError: as `from_plain`.
    """
    config = from_plain(kind, plain)
    if plain.get("output") != ".":  # a person's, or one that an earlier version wrote
        return config
    return cast(T, _map_paths(config, lambda path: Path(os.path.normpath(folder / path))))


def located(config: T) -> T:
    """`config` with absolute paths, to compare two that may have been given in different folders."""
    return cast(T, _map_paths(config, lambda path: Path(os.path.abspath(path))))


def _map_paths(config: Any, change: Callable[[Path], Path]) -> Any:
    """`config` with every path of it or of its sections changed; one that is a hub id stays."""
    changed: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            changed[field.name] = _map_paths(value, change)
        elif isinstance(value, Mapping):
            changed[field.name] = {k: change(v) if isinstance(v, Path) else v for k, v in value.items()}
        elif isinstance(value, Path) and (not field.metadata.get(HUB) or _local(value, change(value))):
            changed[field.name] = change(value)
    return replace(config, **changed)


def _local(path: Path, changed: Path) -> bool:
    return path.is_absolute() or path.exists() or changed.exists()


def override(config: T, overrides: Mapping[str, Any]) -> T:
    """`config` with some settings replaced, by dotted name: `{"forcing.alpha": 0.2, "steps": 500}`.

    Values may be what JSON or a command line gives: strings are read as the setting's type. All of them
    are replaced at once, so only the result must be consistent.

    Raises:
        ConfigError: an unknown name (did you mean), or a value that the setting cannot take.
    """
    plain = to_plain(config)
    for name, value in overrides.items():
        now = RENAMED.get(name, name)
        _replace_plain(plain, now.split("."), value, now)
    return from_plain(type(config), plain)


def _replace_plain(plain: dict[str, Any], parts: Sequence[str], value: Any, full: str) -> None:
    head, *rest = parts
    if head not in plain:
        raise ConfigError(
            f"unknown setting {full!r}.{did_you_mean(head, plain)} Known: {', '.join(sorted(plain))}."
        )
    if not rest:
        plain[head] = value
    elif isinstance(plain[head], dict):
        _replace_plain(plain[head], rest, value, full)
    else:
        raise ConfigError(f"{full!r} cannot be set: {head!r} is {plain[head]!r}, which has no settings.")


def differences(old: Any, new: Any, place: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted names at which two plain values differ, with both values; `None` where one lacks the name."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for name in sorted({*old, *new}):
            found |= differences(old.get(name), new.get(name), _join(place, name))
        return found
    return {} if old == new else {place: (old, new)}


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


_SCALARS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    Path: "a path",
}


def _coerce(kind: Any, value: Any, place: str) -> Any:
    """`value` as `kind`, for the kinds that configurations are made of."""
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _coerce_union(options, value, place)
    if origin in (tuple, Sequence, Mapping):
        return (_coerce_mapping if origin is Mapping else _coerce_tuple)(options, value, place)
    if origin is Literal:
        if value not in options:
            raise ConfigError(f"{place} is {value!r}; choose from {', '.join(map(repr, options))}.")
        return value
    if is_dataclass(kind):
        return _coerce_dataclass(cast(type, kind), value, place)
    if families := _families(kind):
        return _coerce_union(families, value, place)
    return _coerce_scalar(kind, value, place)


def _families(kind: Any) -> list[Any]:
    """The dataclasses that derive from the class `kind`, which is none itself."""
    if not isinstance(kind, type) or kind in (Any, *_SCALARS):
        return []
    derived: list[type] = kind.__subclasses__()
    return [each for each in derived if is_dataclass(each)]


def _coerce_dataclass(kind: type, value: Any, place: str) -> Any:
    if isinstance(value, kind):
        return value
    if isinstance(value, Mapping):
        return from_plain(kind, value, place)
    raise ConfigError(f"{place} is {value!r}; set its settings one by one, as {place}.<name>.")


def _coerce_union(options: Sequence[Any], value: Any, place: str) -> Any:
    if type(None) in options and value in (None, "none", "None"):
        return None
    if isinstance(value, Mapping):
        options = _best_fit(options, value)
    fault: ConfigError | None = None
    for option in options:
        if option is not type(None):
            try:
                return _coerce(option, value, place)
            except ConfigError as error:
                fault = fault or error
    raise fault or ConfigError(f"{place} is {value!r}; expected none.")


def _best_fit(options: Sequence[Any], value: Mapping[str, Any]) -> Sequence[Any]:
    """The dataclass that has these names or most of them, so that errors are about the one that was meant."""
    classes = [option for option in options if is_dataclass(option)]
    if len(classes) < 2:
        return options
    names = {option: {field.name for field in fields(option)} for option in classes}
    return [max(classes, key=lambda option: (names[option] == set(value), len(names[option] & set(value))))]


def _coerce_tuple(options: Sequence[Any], value: Any, place: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{place} is {value!r}; expected several values, separated by commas.")
    if (len(options) == 2 and options[1] is Ellipsis) or len(options) == 1:
        options = [options[0]] * len(value)
    if len(options) != len(value):
        raise ConfigError(f"{place} is {value!r}; expected {len(options)} values.")
    return tuple(_coerce(o, v, f"{place}[{i}]") for i, (o, v) in enumerate(zip(options, value, strict=True)))


def _coerce_mapping(options: Sequence[Any], value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{place} is {value!r}; expected values by name, {{name: value, ...}}.")
    return {str(name): _coerce(options[1], each, _join(place, str(name))) for name, each in value.items()}


def _coerce_scalar(kind: Any, value: Any, place: str) -> Any:
    fault = ConfigError(f"{place} is {value!r}; expected {_SCALARS.get(kind, kind)}.")
    if kind is Any:
        return value
    if isinstance(value, str) and kind in _SCALARS:
        try:
            return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise fault from None
    if kind is float and type(value) is int:
        return float(value)
    # Exactly the type: True is an int to Python, not to a person.
    if type(value) is kind or (kind is Path and isinstance(value, Path)):
        return value
    raise fault
