"""What watches the tracked objects, one for each framework in use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def watch_all(
    watches: dict[str, Any],
    verb: str,
    adapters: Iterable[Any],
    tracked: Mapping[str, Any],
    *arguments: object,
) -> None:
    """Let `watches`, by the framework's name, watch `tracked` from now on. One is made, with
    an adapter's `verb(*arguments)`, when its framework is met first."""
    for adapter in adapters:
        make = getattr(adapter, verb, None)
        if make is None:
            continue
        if adapter.name not in watches:
            watches[adapter.name] = make(*arguments)
        watches[adapter.name].watch(tracked)
