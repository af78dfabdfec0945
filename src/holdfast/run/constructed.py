"""What the tracked objects were built with, compared with the last run's.

A restore puts a saved learning rate, or number of steps of a schedule, over the one that
the program asks for now. If the program was edited, that must not happen silently.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from holdfast.core.selection import make_selection
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
        *,
        rename: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Before a restore: note the settings of `tracked`. Raises ConfigChanged if some
        differ from `saved`, whose names may have been changed since, and are not to be
        overridden; returns those that are, in words.
        """
        self._known.clear()
        self._put.clear()
        allowed, refused = self.compare(adapters, tracked, saved, rename=rename)
        if refused:
            raise _refusal(refused, address, self._override)
        return allowed

    def compare(
        self,
        adapters: Iterable[Any],
        tracked: Mapping[str, Any],
        saved: Mapping[str, Any],
        *,
        rename: Mapping[str, str] | None = None,
    ) -> tuple[list[str], list[str]]:
        """As `check`, for some more objects: what is overridden, and what else differs."""
        refused: list[str] = []
        allowed: list[str] = []
        for adapter in adapters:
            if not hasattr(adapter, "settings"):
                continue
            before = _renamed(saved.get(adapter.name, {}), rename or {})
            now = adapter.settings(tracked)
            if now is None:  # in use before this run: not as they were built
                now = {
                    name: value
                    for name, value in before.items()
                    if _object(name).partition("/")[0] in tracked
                }
            changed = [
                name for name in now if name in before and repr(now[name]) != repr(before[name])
            ]
            told = [name for name in changed if not adapter.is_derived(name)]
            for name in told:
                lines = allowed if self._overrides(name) else refused
                lines.append(f"{name}: {before[name]!r} -> {now[name]!r}")
            objects = {_object(name) for name in told if self._overrides(name)}
            self._put.setdefault(adapter.name, {}).update(
                (name, now[name])
                for name in changed
                if (_object(name) in objects if adapter.is_derived(name) else self._overrides(name))
            )
            self._known.setdefault(adapter.name, {}).update(now)
        return allowed, refused

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


def _renamed(saved: Mapping[str, Any], rename: Mapping[str, str]) -> dict[str, Any]:
    selection = make_selection((), (), rename)
    objects = {name: _object(name) for name in saved}
    return {
        selection.live_path(path) + name[len(path) :]: saved[name] for name, path in objects.items()
    }


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
