"""The random states that decide what the program draws next.

Those are the global streams of each library, and the generators in tracked objects. Code that
a resumed process runs again (an epoch's prologue, what lies between two loops, the start of a
loader) must draw what it drew the first time: it is given both as they were then, not as
they were at the save.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from holdfast.core.frameworks import adapter_for_value
from holdfast.core.rng import apply_rng, capture_rng
from holdfast.run.randomness import Library, libraries, owner_of
from holdfast.run.search import find_generators
from holdfast.run.values import SCALARS
from holdfast.run.variables import Variables

logger = logging.getLogger("holdfast")

_MAX_DEPTH = 8
_MAX_ITEMS = 4096
"""A container with more is data."""
_PLAIN = frozenset(SCALARS)

_GENERATORS = "generators"


class RandomStates:
    """Captures and applies them. `tracked`: names to objects, as they are at that moment;
    `rename`: names of the saved states to those of today."""

    def __init__(
        self,
        tracked: Callable[[], Mapping[str, object]] = dict,
        rename: Mapping[str, str] | None = None,
    ) -> None:
        self._tracked = tracked
        self._rename = dict(rename or {})

    def capture(self) -> dict[str, Any]:
        """A plain tree: that of `core.rng.capture_rng`, and tracked generators by name."""
        states: dict[str, Any] = capture_rng()
        generators: dict[str, list[dict[str, Any]]] = {}
        known = libraries()
        for name, value in self._tracked().items():
            found = _generators(value, known)
            if found:
                generators[name] = [
                    {"library": library.name, "state": library.read(one)} for library, one in found
                ]
        if generators:
            states[_GENERATORS] = generators
        return states

    def apply(self, states: Mapping[str, Any]) -> None:
        """Set what `capture` returned, in this process or another one."""
        apply_rng({name: state for name, state in states.items() if name != _GENERATORS})
        saved: Mapping[str, list[dict[str, Any]]] = states.get(_GENERATORS, {})
        tracked = self._tracked() if saved else {}
        known = libraries()
        for name, entries in saved.items():
            name = self._rename.get(name, name)
            if name not in tracked:
                continue  # tracked late: what draws from it comes later too
            found = _generators(tracked[name], known)
            if [library.name for library, _ in found] != [one["library"] for one in entries]:
                logger.warning(
                    "%s does not hold the random generators that it held in the checkpoint: code "
                    "that runs again before the run goes on may draw other numbers",
                    name,
                )
                continue
            for (library, one), entry in zip(found, entries, strict=True):
                library.write(one, entry["state"])


def _generators(value: object, known: tuple[Library, ...]) -> list[tuple[Library, Any]]:
    """Those in a tracked value, each once, in a fixed order."""
    found = {id(one): (library, one) for library, one in _walk(value, known, 0)}
    return list(found.values())


def _walk(value: object, known: tuple[Library, ...], depth: int) -> Iterator[tuple[Library, Any]]:
    library = owner_of(value, known)
    if library is not None:
        yield library, value
    elif isinstance(value, Variables):
        yield from _walk(value.state_dict(), known, depth)
    elif isinstance(value, dict | list | tuple):
        if depth < _MAX_DEPTH and len(value) <= _MAX_ITEMS:
            items = value.values() if isinstance(value, dict) else value
            if not _PLAIN.issuperset(map(type, items)):
                for item in items:
                    yield from _walk(item, known, depth + 1)
    elif (
        type(value) not in _PLAIN
        and hasattr(value, "__dict__")
        and adapter_for_value(value) is None
    ):
        # An environment, a sampler. (Modules and optimizers draw in the training step.)
        yield from find_generators(value, known)
