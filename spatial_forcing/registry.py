"""Named things: teachers, students, environments, presets. One registration line each."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from spatial_forcing.errors import ConfigError

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` when one of `known` is close to `name`, else an empty string."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for an unknown `name`: it lists what exists and the closest match."""
    names = sorted(known)
    return ConfigError(
        f"unknown {kind} {name!r}.{did_you_mean(name, names)} Known: {', '.join(names) or 'none'}."
    )


class Registry(Generic[T], Mapping[str, T]):
    """A mapping from names to things of one kind; looking up an unknown name raises `ConfigError`.

    >>> teachers = Registry("teacher")
    >>> teachers.add("vggt-nano", 1)
    >>> teachers["vggt-nano"]
    1
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> None:
        """Register `entry` under `name`. Raises `ConfigError` when the name is taken."""
        if name in self._entries:
            raise ConfigError(f"{self.kind} {name!r} is registered twice; choose another name.")
        self._entries[name] = entry

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of `add`."""

        def decorate(entry: T) -> T:
            self.add(name, entry)
            return entry

        return decorate

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            raise unknown(self.kind, name, self._entries) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
