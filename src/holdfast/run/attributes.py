"""What a program changes in tracked objects beside their state: training mode, frozen
parameters, dropout rates.

The program sets these when it builds an object, and may set them again at any epoch. A
checkpoint holds only what differs from "as built", the value when the loops started. So a
resume puts back what the run did, and an edited program keeps what it was edited to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from holdfast.core.selection import make_selection

_SHOWN = 5


class Attributes:
    """The attributes that frameworks find in tracked objects, by name.

    An adapter that knows such attributes has `attributes(tracked)`, `put_attributes(tracked,
    values)` and `unsaved_attributes(tracked)`.
    """

    def __init__(self) -> None:
        self._built: dict[str, dict[str, Any]] = {}
        self._unsaved: dict[str, dict[str, Any]] | None = {}
        """None: it was said that some are not saved."""
        self._saved: dict[str, dict[str, Any]] = {}

    def note(self, adapters: Iterable[Any], tracked: Mapping[str, Any]) -> None:
        """Before a restore: `tracked` is as the program has built it."""
        for adapter in adapters:
            if not hasattr(adapter, "attributes"):
                continue
            self._built.setdefault(adapter.name, {}).update(adapter.attributes(tracked))
            if self._unsaved is not None:
                known = self._unsaved.setdefault(adapter.name, {})
                known.update(adapter.unsaved_attributes(tracked))

    def to_tree(self, adapters: Iterable[Any], tracked: Mapping[str, Any]) -> dict[str, Any]:
        """For a checkpoint: {framework: {name: [as built, now]}}."""
        tree: dict[str, Any] = {}
        for adapter in adapters:
            built = self._built.get(adapter.name)
            if built is not None:
                now = adapter.attributes(tracked)
                tree[adapter.name] = {
                    name: [built[name], now[name]]
                    for name in now
                    if name in built and now[name] != built[name]
                }
        return tree

    def load(self, saved: Mapping[str, Any], rename: Mapping[str, str]) -> None:
        """Before `put`: what `to_tree` gave, whose names may have been changed since."""
        selection = make_selection((), (), rename)
        self._saved = {
            framework: {selection.live_path(name): pair for name, pair in pairs.items()}
            for framework, pairs in saved.items()
        }

    def edited(self) -> list[str]:
        """What was loaded, and this program builds otherwise than the one that saved it,
        in words."""
        return shortened(
            [
                f"{name} is {now!r} (built with {before[name]!r} now, with {built!r} before)"
                for framework, pairs in self._saved.items()
                for before in [self._built.get(framework, {})]
                for name, (built, now) in pairs.items()
                if before.get(name, built) not in (built, now)
            ]
        )

    def put(self, adapters: Iterable[Any], tracked: Mapping[str, Any]) -> None:
        """After each restore: set what the checkpoint holds, and all else as built."""
        for adapter in adapters:
            if built := self._built.get(adapter.name):
                pairs = self._saved.get(adapter.name, {})
                changed = {name: now for name, (_, now) in pairs.items()}
                adapter.put_attributes(tracked, {**built, **changed})

    def unsaved(self, adapters: Iterable[Any], tracked: Mapping[str, Any]) -> list[str]:
        """What has changed since the start and is in no checkpoint, in words. Told once."""
        if self._unsaved is None:
            return []
        found: list[str] = []
        for adapter in adapters:
            before = self._unsaved.get(adapter.name)
            if before:
                now = adapter.unsaved_attributes(tracked)
                found += [
                    f"{name} ({before[name]!r} -> {now[name]!r})"
                    for name in now
                    if name in before and repr(now[name]) != repr(before[name])
                ]
        if found:
            self._unsaved = None
        return shortened(found)


def shortened(lines: Collection[str]) -> list[str]:
    """At most five, and how many more there are."""
    shown = list(lines)[:_SHOWN]
    more = len(lines) - len(shown)
    return [*shown, f"{more} more"] if more else shown
