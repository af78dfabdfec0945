"""Restore: nodes to values, into live objects where there are any."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, MutableMapping, Sequence
from typing import Any, cast

from holdfast.core import (
    containers,
    decode_array,
    frameworks,
    generators,
    object_arrays,
    objects,
    stored,
    values,
)
from holdfast.core.adapters import NOTHING, Destination
from holdfast.core.containers import DICTS, pairs_of
from holdfast.core.files import Directory, File
from holdfast.core.leaves import check_leaf, settle
from holdfast.core.records import Leaf
from holdfast.core.report import Mismatch
from holdfast.core.selection import Selection, alike, check_names, make_selection, select
from holdfast.core.types import Node
from holdfast.core.values import kind_name, malformed
from holdfast.errors import FormatTooNew

_IN_PROGRESS = object()
_ABSENT = object()
_LIVE = (*generators.TYPES, File, Directory)
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
        scope: Node = None,
    ) -> None:
        """`scope` is the tree that references look into, where only a part of it is
        decoded; else the first node that is decoded."""
        self.allow_pickle = allow_pickle
        self.requests: list[tuple[int, Destination]] = []
        self.finishers: list[Callable[[], None]] = []
        self.mismatch = Mismatch()
        self.fetch = fetch
        self._leaves = leaves
        self._specs: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.selection = Selection()
        self.selecting = False
        """Whether the selection asks for anything."""
        self.filling = False
        self.adapters = 0
        """How many adapters' nodes are being decoded, inside one another. They merge what
        was saved with what is live themselves."""
        self._depth = 0
        self._scope: Node = scope
        self._definitions: dict[int, Node] | None = None
        self._made: dict[int, Any] = {}
        self._adopted: dict[int, tuple[object, Node]] = {}
        self.arrays: dict[tuple[int, Any, Any], Any] = {}
        """New arrays by (leaf, dtype, order): those of one leaf share its memory."""
        self._aliases: dict[Hashable, dict[str, Any]] = {}
        self._discards: list[Callable[[], None]] = []

    # -- the contract of adapters.Decoder -------------------------------------------

    def decode(self, node: Node, target: object, path: str) -> Any:
        if self._depth:
            return self.decode_node(node, target, path)
        if self._scope is None:
            self._scope = node
        try:
            return self.decode_node(node, target, path)
        except RecursionError:  # the caller's own stack is deep already
            raise malformed(path, "it is nested too deeply") from None
        finally:
            self._depth = 0

    def spec(self, leaf: int) -> tuple[str, tuple[int, ...]]:
        # Type first: the number comes from a store, and True would find leaf 1.
        if type(leaf) is not int or not 0 <= leaf < len(self._leaves):
            raise malformed("", f"there is no leaf {str(leaf)[:40]!r}")
        known = self._specs.get(leaf)
        if known is None:
            known = self._specs[leaf] = check_leaf(self._leaves[leaf])
        return known

    def same_bytes(self, leaf: int, other: int) -> bool:
        a, b = self._leaves[leaf], self._leaves[other]
        # Sorted: chunks come in any order.
        pieces = sorted((chunk.start, chunk.shape, chunk.digest) for chunk in a.chunks)
        others = sorted((chunk.start, chunk.shape, chunk.digest) for chunk in b.chunks)
        return self.spec(leaf) == self.spec(other) and pieces == others

    def request(self, leaf: int, destination: Destination) -> None:
        self.spec(leaf)
        self.requests.append((leaf, destination))

    def finish(self, action: Callable[[], None]) -> None:
        self.finishers.append(action)

    def alias(self, key: Hashable) -> dict[str, Any]:
        return self._aliases.setdefault(key, {})

    def missing(self, path: str, what: str = "") -> None:
        if self.selection.wanted(path):
            self.mismatch.missing.append(f"{path}: {what}" if what else path)

    def unexpected(self, path: str, what: str = "") -> None:
        if self.selection.wanted(path):
            self.mismatch.unexpected.append(f"{path}: {what}" if what else path)

    def changed(self, path: str, saved: str, live: str) -> None:
        if self.selection.wanted(path):
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
        try:
            with values.collector_paused():
                return self._apply(tree, into, selection, path)
        except RecursionError:
            raise malformed(path, "it is nested too deeply") from None

    def _apply(
        self,
        tree: Node,
        into: MutableMapping[str, Any] | None,
        selection: Selection,
        path: str,
    ) -> dict[str, Any]:
        self._scope = tree
        self.filling = into is not None
        self._definitions = None
        self._made.clear()
        self.selection = selection
        self.selecting = bool(selection)
        if selection:
            check_names(tree, self._defined, into, selection, path)
            tree = select(tree, selection, path)
        if not isinstance(tree, dict) or cast(dict[str, Node], tree).get("!") != "dict":
            raise malformed(path, "the state is not a dict")
        result: dict[str, Any] = {}
        for key, node in pairs_of(self, cast(dict[str, Node], tree), path):
            if not isinstance(key, str):
                raise malformed(path, "a name at the top level is not a string")
            inner = f"{path}/{key}" if path else key
            if key in result:
                raise malformed(inner, "it is there twice")
            if into is not None and key not in into:
                self.unexpected(inner)
                continue
            target = NOTHING if into is None else into[key]
            value = self.decode(node, target, inner)
            result[key] = decode_array.filled(self, target, value, inner)
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

    def decode_node(self, node: Node, target: object, path: str) -> Any:
        kind = type(cast(object, node))
        if self.selecting and target is not NOTHING:
            if not self.selection.wanted(path):
                return target
            if self.selection.divides(path) and not alike(node, target):
                self.changed(path, _kind(node), kind_name(target))
                return target
        if kind is not dict and kind is not list:
            if type(target) not in _PLAIN and self.is_live(target):
                self.changed(path, repr(node)[:40], kind_name(target))
                return target
            return node
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
        return containers.decode_list(self, node, node, target, path)

    def _tagged(self, node: dict[str, Node], target: object, path: str) -> Any:
        tag = node.get("!")
        if not isinstance(tag, str):
            raise malformed(path, "a node has no tag")
        decoder = values.DECODERS.get(tag)
        if decoder is not None:
            if self.is_live(target):
                self.changed(path, tag, kind_name(target))
                return target
            return decoder(node, path)
        handler = _TAGS.get(tag)
        if handler is not None:
            if (
                type(target) not in _PLAIN
                and tag not in _LIVE_TAGS
                and type(target) not in DICTS
                and self.is_live(target)
            ):
                state = frameworks.state_node(node, target)
                if state is not None:
                    return self._tagged(state, target, path)
                self.changed(path, _kind(node), kind_name(target))
                return target
            return handler(self, node, target, path)
        adapter = frameworks.adapter_for_tag(tag)
        if adapter is None:
            raise FormatTooNew(
                f"{path!r} is a {tag[:80]!r}, which this Holdfast does not know",
                hint="Upgrade: pip install -U holdfast",
            )
        if type(target) not in _PLAIN and not adapter.is_live(target) and self.is_live(target):
            self.changed(path, _kind(node), kind_name(target))
            return target
        self.adapters += 1
        value = adapter.decode(node, target, path, self)
        self.adapters -= 1
        return value

    def is_live(self, target: object) -> bool:
        """Whether `target` is an object that only a restore in place can bring up to
        date: its owner holds it elsewhere too."""
        if type(target) in _PLAIN or type(target) in DICTS or isinstance(target, type):
            return False
        if isinstance(target, _LIVE):
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
            value = containers.decode_list(self, items[1:], items, target, path)
        else:
            value = self._tagged(cast(dict[str, Node], node), target, path)
        # Live objects that are two, where the checkpoint has one: both get its value,
        # new objects are the first.
        self._made[number] = value if known is _ABSENT else known
        return value

    def reference(self, node: dict[str, Node], target: object, path: str) -> Any:
        number = node.get("v")
        if type(number) is not int:
            raise malformed(path, "a reference is malformed")
        found = self._defined().get(number)
        if found is None:
            raise malformed(path, f"it refers to {number}, which is not there")
        return self._identified(number, found, target, path)

    def _defined(self) -> dict[int, Node]:
        if self._definitions is None:
            self._definitions = definitions(self._scope)
        return self._definitions

    def adopt(self, target: object, node: Node) -> bool:
        """Whether `target` may be updated in place from `node`: not if another node
        has it already, for then two values would fight for it."""
        known = self._adopted.setdefault(id(target), (target, node))
        return known[1] is node


def _kind(node: Node) -> str:
    if isinstance(node, dict):
        tag = str(cast(dict[str, Node], node).get("!"))
        return f"{'an' if tag[:1] in 'aeiou' else 'a'} {tag}"
    return "a list" if isinstance(node, list) else repr(node)[:40]


def definitions(tree: Node) -> dict[int, Node]:
    """Every node with an id, wherever it is. Not recursive: the tree is not checked yet."""
    found: dict[int, Node] = {}
    stack: list[Node] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            items = cast(list[Node], node)
            first = items[0] if items else None
            if isinstance(first, dict) and cast(dict[str, Node], first).get("!") == "id":
                number = cast(dict[str, Node], first).get("v")
                if type(number) is int:
                    found.setdefault(number, items)
            stack += items
        elif isinstance(node, dict):
            tagged = cast(dict[str, Node], node)
            number = tagged.get("id")
            if type(number) is int:
                found.setdefault(number, tagged)
            stack += tagged.values()
    return found


_Handler = Callable[[TreeDecoder, dict[str, Node], Any, str], Any]

_TAGS: dict[str, _Handler] = {
    "dict": containers.decode_dict,
    "odict": containers.decode_dict,
    "defaultdict": containers.decode_dict,
    "counter": containers.decode_dict,
    "tuple": containers.decode_tuple,
    "namedtuple": containers.decode_namedtuple,
    "dataclass": containers.decode_dataclass,
    "set": containers.decode_set,
    "frozenset": containers.decode_set,
    "deque": containers.decode_deque,
    "range": objects.decode_range,
    "slice": objects.decode_slice,
    "ellipsis": objects.decode_ellipsis,
    "str": objects.decode_str,
    "bytes": objects.decode_bytes,
    "bytearray": objects.decode_bytearray,
    "npstr": objects.decode_npstr,
    "npbytes": objects.decode_npstr,
    "path": objects.decode_path,
    "enum": objects.decode_enum,
    "object": objects.decode_object,
    "pickle": objects.decode_pickle,
    "random": objects.decode_generator,
    "randomstate": objects.decode_generator,
    "bitgenerator": objects.decode_generator,
    "generator": objects.decode_numpy_generator,
    "seedsequence": objects.decode_seed_sequence,
    "array": decode_array.decode_array,
    "scalar": decode_array.decode_scalar,
    "objects": object_arrays.decode_objects,
    "numbers": decode_array.decode_numbers,
    "file": stored.decode_file,
    "dir": stored.decode_directory,
    "ref": TreeDecoder.reference,
}

_LIVE_TAGS = frozenset(
    {
        *("object", "random", "randomstate", "bitgenerator", "generator"),
        *("ref", "array", "objects", "file", "dir"),
    }
)
"""Tags whose handlers look at a live target themselves."""
