"""What the tracked objects were built with, compared with the last run's.

A restore puts a saved learning rate, or number of steps of a schedule, over the one that
the program asks for now. If the program was edited, that must not happen silently.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from holdfast.errors import ConfigChanged

MAX_LINES = 20


class Constructed:
    """The settings that frameworks find in tracked objects, by name.

    An adapter that knows such settings has `settings(tracked)`, `put_settings(tracked,
    values)` and `is_derived(name)`.
    """

    def __init__(self, override: Collection[str] = ()) -> None:
        self._override = tuple(override)
        self._known: dict[str, dict[str, Any]] = {}
        self._put: dict[str, dict[str, Any]] = {}

    def check(
        self,
        adapters: Iterable[Any],
        tracked: Mapping[str, Any],
        saved: Mapping[str, Any],
        address: str,
    ) -> list[str]:
        """Before a restore: note the settings of `tracked`. Raises ConfigChanged if some
        differ from `saved` and are not to be overridden; returns those that are, in words.
        """
        self._known = {name: dict(values) for name, values in saved.items()}
        refused: list[str] = []
        allowed: list[str] = []
        for adapter in adapters:
            read = getattr(adapter, "settings", None)
            now = None if read is None else read(tracked)
            if now is None:
                continue  # in use before this run: not as they were built
            before = self._known.get(adapter.name, {})
            changed = [
                name for name in now if name in before and repr(now[name]) != repr(before[name])
            ]
            told = [name for name in changed if not adapter.is_derived(name)]
            for name in told:
                lines = allowed if self._overrides(name) else refused
                lines.append(f"{name}: {before[name]!r} -> {now[name]!r}")
            objects = {_object(name) for name in told if self._overrides(name)}
            self._put[adapter.name] = {
                name: now[name]
                for name in changed
                if (_object(name) in objects if adapter.is_derived(name) else self._overrides(name))
            }
            self._known[adapter.name] = now
        if refused:
            raise _refusal(refused, address, self._override)
        return allowed

    def put(self, adapters: Iterable[Any], tracked: Mapping[str, Any]) -> None:
        """After a restore: set what is to be overridden."""
        for adapter in adapters:
            if values := self._put.get(adapter.name):
                adapter.put_settings(tracked, values)

    def to_tree(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self._known

    def _overrides(self, name: str) -> bool:
        return any(
            name == entry or (name.startswith(entry) and name[len(entry)] in ".[/")
            for entry in self._override
        )


def _object(name: str) -> str:
    return name.partition(".")[0].partition("[")[0]


def _refusal(lines: list[str], address: str, override: Collection[str]) -> ConfigChanged:
    names = [*override, *(_object(line.partition(":")[0]) for line in lines)]
    names = list(dict.fromkeys(names))
    if len(lines) > MAX_LINES:
        lines = [*lines[:MAX_LINES], f"... and {len(lines) - MAX_LINES} more"]
    text = "\n  ".join(lines)
    return ConfigChanged(
        f"the checkpoint of {address} was made with other settings, which it would put over "
        f"the new ones:\n  {text}",
        hint="Put the old ones back, start under another address, or go on with the new ones: "
        f"Run(..., override={names!r}).",
    )
