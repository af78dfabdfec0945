"""Fingerprints of what a program holds in the frame of its loop.

Two processes that stand at the same step of the same run are compared by these: what
differs was not restored. Each entry has a path (`sampler.rng`, `history[2]`), the kind of
the value in words, and a text that is equal where the values are: the number itself, else a
digest.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from holdfast.core.digest import fingerprint
from holdfast.run.installed import is_installed
from holdfast.run.randomness import Library, libraries, owner_of

MAX_ENTRIES = 2000
"""Of one variable. A digest of the rest makes one entry more."""
MAX_DEPTH = 6
SAMPLED_BYTES = 4 << 20
"""Of larger arrays only parts are read, since they are looked at again at every step."""
_BLOCK = 64 << 10

_NUMBERS = (bool, int, float, complex, np.number, np.bool_)
_SKIPPED = (
    *(type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType),
    *(types.FrameType, types.GeneratorType, types.CodeType, functools.partial),
)

Entry = tuple[str, str, str]
"""(path, kind, text)."""


def survey(
    scope: Mapping[str, Any], known: Collection[object], *, own: bool = False
) -> list[Entry]:
    """What the variables in `scope` hold. Objects in `known`, which are compared elsewhere,
    our own, and what cannot be looked into (iterators, functions, modules) are left out.
    `own`: so are objects of installed packages that have no state to save.

    >>> survey({"best": 0.5, "names": ["a", "b"], "f": len}, [])
    [('best', 'number', '0.5'), ('names[0]', 'text', "'a'"), ('names[1]', 'text', "'b'")]
    """
    seen = {id(item) for item in known}
    found: list[Entry] = []
    for name, value in scope.items():
        if not name.startswith("__"):
            found += _limited(_Visitor(set(seen), own=own).visit(value, name, 0))
    return found


def digest_of(value: Any, *, sampled: bool = True) -> str:
    """One text for all that `value` holds: of a batch, or of random states. Of large
    arrays all is read unless `sampled`."""
    entries = _Visitor(set(), sampled).visit(value, "", 0)
    return _short("\n".join(map(repr, entries)).encode("utf-8", "backslashreplace"))


def _limited(entries: Iterator[Entry]) -> list[Entry]:
    kept: list[Entry] = []
    for entry in entries:
        kept.append(entry)
        if len(kept) == MAX_ENTRIES:
            rest = "\n".join(map(repr, entries)).encode("utf-8", "backslashreplace")
            if rest:
                kept.append((f"{entry[0]} and what follows", "values", _short(rest)))
    return kept


class _Visitor:
    def __init__(self, seen: set[int], sampled: bool = True, own: bool = False) -> None:
        self._seen = seen
        self._sampled = sampled
        self._own = own
        self._libraries: tuple[Library, ...] = libraries()

    def visit(self, value: Any, path: str, depth: int) -> Iterator[Entry]:
        if isinstance(value, _NUMBERS):
            yield path, "number", repr(value)
            return
        if isinstance(value, str | bytes | type(None)):
            text = repr(value)
            yield path, "text", text if len(text) <= 80 else _short(text.encode())
            return
        ours = type(value).__module__.partition(".")[0] == "holdfast"
        if ours or isinstance(value, _SKIPPED) or id(value) in self._seen or depth > MAX_DEPTH:
            return
        self._seen.add(id(value))
        if (library := owner_of(value, self._libraries)) is not None:
            yield path, f"random generator of {library.name}", digest_of(library.read(value))
        elif (data := self._array(value)) is not None:
            yield path, *data
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from self.visit(item, f"{path}[{key!r}]" if path else repr(key), depth + 1)
        elif isinstance(value, set | frozenset):
            # Without their order, which a hash seed may change and equality ignores.
            texts = sorted(repr(list(self.visit(item, "", depth + 1))) for item in value)
            yield path, "set", _short(repr(texts).encode("utf-8", "backslashreplace"))
        elif isinstance(value, list | tuple | deque):
            for index, item in enumerate(value):
                yield from self.visit(item, f"{path}[{index}]", depth + 1)
        else:
            yield from self._object(value, path, depth)

    def _object(self, value: Any, path: str, depth: int) -> Iterator[Entry]:
        if callable(state_dict := getattr(value, "state_dict", None)):
            # The kind of what is inside is that of the object, which is what is tracked.
            kind = type(value).__name__
            state = state_dict()
            parts = state.items() if isinstance(state, Mapping) else [("state", state)]
            for name, item in parts:
                for inner, _, text in self.visit(item, f"{path}.{name}", depth + 1):
                    yield inner, kind, text
            if parts or not self._own:
                return  # else it is that of a class to derive from, which knows nothing
        if self._own and is_installed(type(value).__module__):
            return
        for name, item in list(getattr(value, "__dict__", {}).items()):
            yield from self.visit(item, f"{path}.{name}", depth + 1)

    def _array(self, value: Any) -> tuple[str, str] | None:
        if callable(to_host := getattr(value, "cpu", None)) and hasattr(value, "detach"):
            value = to_host()
            value = value.to_dense() if getattr(value, "is_sparse", False) else value
        array = next((a for one in self._libraries if (a := one.array(value)) is not None), None)
        if array is None:
            return None
        kind = f"{value.dtype}{list(value.shape)}".removeprefix("torch.")
        if array.dtype.hasobject:
            return kind, digest_of(array.tolist())
        if kind.endswith("[]") and not array.dtype.fields:
            return kind, repr(value.item())
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        if self._sampled and data.nbytes > SAMPLED_BYTES:
            starts = np.linspace(0, data.nbytes - _BLOCK, SAMPLED_BYTES // _BLOCK, dtype=np.int64)
            data = np.concatenate([data[start : start + _BLOCK] for start in starts])
        return kind, _short(data.data)


def _short(data: bytes | memoryview) -> str:
    return fingerprint(data).hex()[:16]
