"""Restore: nodes to values, into live objects where there are any."""

from __future__ import annotations

import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Mapping, MutableMapping, Sequence
from typing import Any, cast

import numpy as np

from holdfast.core import arrays, classes, decode_array, frameworks, generators, stored, values
from holdfast.core.adapters import NOTHING, Destination
from holdfast.core.encode import FACTORIES
from holdfast.core.leaves import BufferDestination, Later, check_leaf, settle, then, together
from holdfast.core.records import Leaf
from holdfast.core.report import Mismatch, Selection, make_selection, select
from holdfast.core.types import Node
from holdfast.core.values import malformed
from holdfast.errors import FormatTooNew, HoldfastError, PickleRefused, UsageError

_IN_PROGRESS = object()
_ABSENT = object()
_DICTS: tuple[type, ...] = (dict, OrderedDict, defaultdict, Counter)
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, type(NOTHING)})

Fetch = Callable[[Sequence[tuple[int, Destination]]], None]
"""Reads and verifies leaves now: what a `StoredFile` needs to give its bytes."""


class TreeDecoder:
    """Reads one checkpoint's trees; see `adapters.Decoder`.

        decoder = TreeDecoder(manifest.leaves)
        values = decoder.apply(manifest.tree, into)     # live objects untouched
        decoder.report()                                # raises StructureMismatch
        ... read and verify `decoder.requests` into their destinations ...
        decoder.run()                                   # finishers

    or `decoder.discard()` if that failed: no temporary files stay behind.
    """

    def __init__(
        self,
        leaves: Sequence[Leaf],
        *,
        allow_pickle: bool = False,
        fetch: Fetch | None = None,
    ) -> None:
        self.allow_pickle = allow_pickle
        self.requests: list[tuple[int, Destination]] = []
        self.finishers: list[Callable[[], None]] = []
        self.mismatch = Mismatch()
        self.fetch = fetch
        self._leaves = leaves
        self._specs: dict[int, tuple[str, tuple[int, ...]]] = {}
        self._selection = Selection()
        self._depth = 0
        self._scope: Node = None
        self._definitions: dict[int, tuple[Node, str]] | None = None
        self._made: dict[int, Any] = {}
        self._adopted: dict[int, tuple[object, Node]] = {}
        self._aliases: dict[Hashable, dict[str, Any]] = {}
        self._discards: list[Callable[[], None]] = []
        tuples: dict[str, Callable[[dict[str, Node], Any, str], Any]] = {
            "dict": self._dict,
            "odict": self._dict,
            "defaultdict": self._dict,
            "counter": self._dict,
            "tuple": self._tuple,
            "namedtuple": self._namedtuple,
            "dataclass": self._dataclass,
            "set": self._set,
            "frozenset": self._frozenset,
            "deque": self._deque,
            "range": self._range,
            "slice": self._slice,
            "ellipsis": lambda node, target, path: ...,
            "str": self._str,
            "bytes": self._bytes,
            "bytearray": self._bytearray,
            "path": self._path,
            "enum": self._enum,
            "array": lambda node, target, path: decode_array.array(self, node, target, path),
            "scalar": lambda node, target, path: decode_array.scalar(node, path),
            "npstr": lambda node, target, path: self._text(node, np.str_, str, path),
            "npbytes": lambda node, target, path: self._text(node, np.bytes_, bytes, path),
            "object": self._object,
            "pickle": self._pickle,
            "random": self._generator,
            "randomstate": self._generator,
            "bitgenerator": self._generator,
            "generator": self._numpy_generator,
            "seedsequence": self._seed_sequence,
            "file": lambda node, target, path: stored.decode_file(self, node, target, path),
            "dir": lambda node, target, path: stored.decode_directory(self, node, target, path),
            "ref": self._ref,
        }
        self._tags = tuples

    # -- the contract of adapters.Decoder -------------------------------------------

    def decode(self, node: Node, target: object, path: str) -> Any:
        if self._depth:
            return self._decode(node, target, path)
        if self._scope is None:
            self._scope = node
        try:
            return self._decode(node, target, path)
        finally:
            self._depth = 0

    def spec(self, leaf: int) -> tuple[str, tuple[int, ...]]:
        known = self._specs.get(leaf)
        if known is None:
            if type(leaf) is not int or not 0 <= leaf < len(self._leaves):
                raise malformed("", f"there is no leaf {leaf!r}")
            known = self._specs[leaf] = check_leaf(self._leaves[leaf])
        return known

    def request(self, leaf: int, destination: Destination) -> None:
        self.spec(leaf)
        self.requests.append((leaf, destination))

    def finish(self, action: Callable[[], None]) -> None:
        self.finishers.append(action)

    def alias(self, key: Hashable) -> dict[str, Any]:
        return self._aliases.setdefault(key, {})

    def missing(self, path: str, what: str = "") -> None:
        if self._selection.wanted(path):
            self.mismatch.missing.append(f"{path}: {what}" if what else path)

    def unexpected(self, path: str, what: str = "") -> None:
        if self._selection.wanted(path):
            self.mismatch.unexpected.append(f"{path}: {what}" if what else path)

    def changed(self, path: str, saved: str, live: str) -> None:
        if self._selection.wanted(path):
            self.mismatch.changed.append(f"{path}: saved as {saved}, live is {live}")

    # -- the whole restore ---------------------------------------------------------------

    def apply(
        self,
        tree: Node,
        into: MutableMapping[str, Any] | None = None,
        *,
        only: Collection[str] = (),
        skip: Collection[str] = (),
        rename: Mapping[str, str] | None = None,
        path: str = "",
    ) -> dict[str, Any]:
        """Decode a state (a dict node) into the values of `into`, or to new values.

        Returns the top-level values; complete, and put into `into` where they are new
        objects, once the finishers ran.
        """
        selection = make_selection(only, skip, rename or {})
        self._scope = tree
        self._definitions = None
        self._made.clear()
        if selection:
            tree = self._select(tree, selection, into, path)
        self._selection = selection
        if not isinstance(tree, dict) or cast(dict[str, Node], tree).get("!") != "dict":
            raise malformed(path, "the state is not a dict")
        result: dict[str, Any] = {}
        for key, node in self._pairs(cast(dict[str, Node], tree), path):
            if not isinstance(key, str):
                raise malformed(path, "a name at the top level is not a string")
            inner = f"{path}/{key}" if path else key
            if into is not None and key not in into:
                self.unexpected(inner)
                continue
            result[key] = self.decode(node, NOTHING if into is None else into[key], inner)
        if into is not None:
            for key in into:
                if key not in result:
                    self.missing(f"{path}/{key}" if path else key)

        def settle_all() -> None:
            for key, value in result.items():
                result[key] = value = settle(value)
                if into is not None and into.get(key, NOTHING) is not value:
                    into[key] = value

        self.finish(settle_all)
        return result

    def _select(
        self, tree: Node, selection: Selection, into: Mapping[str, Any] | None, path: str
    ) -> Node:
        seen: set[str] = set()
        selected = select(tree, selection, path, seen)
        entries = [*selection.only, *selection.skip, *(old for old, _ in selection.rename)]
        unknown = [
            entry
            for entry in entries
            if entry not in seen and entry.partition("/")[0] not in (into or {})
        ]
        if unknown:
            names = ", ".join(str(key) for key, _ in self._pairs(tree, path))
            raise UsageError(
                f"nothing in the checkpoint is called {', '.join(map(repr, unknown))}",
                hint=f"At the top level it has: {names}.",
            )
        return selected

    def report(self, *, strict: bool = True) -> Mismatch:
        """What differs. Raises StructureMismatch if anything does and `strict`."""
        if strict and self.mismatch:
            raise self.mismatch.error()
        return self.mismatch

    def run(self) -> None:
        """Run the finishers, once every requested byte is in its destination."""
        for action in self.finishers:
            action()
        self.finishers.clear()
        self._discards.clear()

    def discard(self) -> None:
        """Give up: remove what was prepared on disk. Safe to call at any time."""
        while self._discards:
            self._discards.pop()()
        self.finishers.clear()

    def on_discard(self, action: Callable[[], None]) -> None:
        self._discards.append(action)

    # -- dispatch ------------------------------------------------------------------------

    def _decode(self, node: Node, target: object, path: str) -> Any:
        kind = type(node)
        if kind is not dict and kind is not list:
            if type(target) not in _PLAIN and self.is_live(target):
                self.changed(path, repr(node)[:40], _kind(target))
                return target
            return node
        if target is not NOTHING and self._selection and not self._selection.wanted(path):
            return target
        self._depth += 1
        if self._depth > values.MAX_DEPTH + 2:  # an apply() and a key are levels here
            raise malformed(path[:200], "it is nested too deeply")
        if kind is list:
            value = self._array_node(node, target, path)
        elif "id" in node and node.get("!") != "ref":
            value = self._identified(node["id"], node, target, path)
        else:
            value = self._tagged(node, target, path)
        self._depth -= 1
        return value

    def _array_node(self, node: list[Node], target: object, path: str) -> Any:
        first = node[0] if node else None
        if isinstance(first, dict) and cast(dict[str, Node], first).get("!") == "id":
            return self._identified(cast(dict[str, Node], first).get("v"), node, target, path)
        return self._list(node, node, target, path)

    def _tagged(self, node: dict[str, Node], target: object, path: str) -> Any:
        tag = node.get("!")
        if not isinstance(tag, str):
            raise malformed(path, "a node has no tag")
        decoder = values.DECODERS.get(tag)
        if decoder is not None:
            if self.is_live(target):
                self.changed(path, tag, _kind(target))
                return target
            return decoder(node, path)
        handler = self._tags.get(tag)
        if handler is not None:
            if (
                type(target) not in _PLAIN
                and tag not in _LIVE_TAGS
                and type(target) not in _DICTS
                and self.is_live(target)
            ):
                self.changed(path, f"a {tag}", _kind(target))
                return target
            return handler(node, target, path)
        adapter = frameworks.adapter_for_tag(tag)
        if adapter is None:
            raise FormatTooNew(
                f"{path!r} is a {tag[:80]!r}, which this Holdfast does not know",
                hint="Upgrade: pip install -U holdfast",
            )
        return adapter.decode(node, target, path, self)

    def is_live(self, target: object) -> bool:
        """Whether `target` is an object that only a restore in place can bring up to
        date: its owner holds it elsewhere too."""
        if type(target) in _PLAIN or type(target) in _DICTS or isinstance(target, type):
            return False
        if isinstance(target, generators.TYPES):
            return True
        adapter = frameworks.adapter_for_value(target)
        if adapter is not None and adapter.is_live(target):
            return True
        return callable(getattr(target, "load_state_dict", None))

    # -- references --------------------------------------------------------------------------

    def _identified(self, number: object, node: Node, target: object, path: str) -> Any:
        """A container that references elsewhere in the tree name."""
        if type(number) is not int:
            raise malformed(path, "its id is malformed")
        known = self._made.get(number, _ABSENT)
        if known is _IN_PROGRESS:
            raise malformed(path, "it contains itself")
        if known is not _ABSENT and (target is known or type(target) in _PLAIN):
            return known
        self._made[number] = _IN_PROGRESS
        if isinstance(node, list):
            items = cast(list[Node], node)
            value = self._list(items[1:], items, target, path)
        else:
            value = self._tagged(cast(dict[str, Node], node), target, path)
        # Live objects that are two, where the checkpoint has one: both get its value,
        # new objects are the first.
        self._made[number] = value if known is _ABSENT else known
        return value

    def _ref(self, node: dict[str, Node], target: object, path: str) -> Any:
        number = node.get("v")
        if type(number) is not int:
            raise malformed(path, "a reference is malformed")
        if self._definitions is None:
            self._definitions = _definitions(self._scope)
        found = self._definitions.get(number)
        if found is None:
            raise malformed(path, f"it refers to {number}, which is not there")
        return self._identified(number, found, target, path)

    def adopt(self, target: object, node: Node) -> bool:
        """Whether `target` may be updated in place from `node`: not if another node
        has it already, for then two values would fight for it."""
        known = self._adopted.setdefault(id(target), (target, node))
        return known[1] is node

