"""Capture: values to a tree of nodes and leaves (the grammar is in `core.tree`)."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, cast

import msgspec
import numpy as np

from holdfast.core import (
    arrays,
    encode_array,
    encode_objects,
    encode_plain,
    file_copies,
    files,
    frameworks,
    generators,
    given,
    stored,
    values,
)
from holdfast.core.adapters import Adapter, LeafSource, Waiting
from holdfast.core.group import Ranks
from holdfast.core.placement import Placement
from holdfast.core.types import Node
from holdfast.errors import StateError, UnsupportedValue

MAX_PATH_CHARACTERS = 1000  # of a leaf: for people, and kept in every manifest

_IN_PROGRESS = object()  # memo of a container that is being encoded: meeting it is a cycle

_HINT = (
    "Track it as an object with state_dict() and load_state_dict(), convert it to "
    "plain values or arrays, or pass allow_pickle=True."
)


class CapturedLeaf(msgspec.Struct, frozen=True, gc=False):
    """A leaf of a save, and where its bytes come from."""

    path: str
    source: LeafSource
    placement: Placement | None = None


class TreeEncoder:
    """Builds the nodes and leaves of one save; see `adapters.Encoder`.

    Several trees may be encoded one after another (state, then runtime): they share
    leaves. A tree is final only when the last one was encoded. Nothing is read from
    the arrays here: their sources must be copied before they change.
    """

    def __init__(
        self,
        *,
        allow_pickle: bool = False,
        files_in_place: Callable[[str], bool] | None = None,
        ranks: Ranks | None = None,
        own: Callable[[str], bool] | None = None,
        stays: bool = False,
    ) -> None:
        self.allow_pickle = allow_pickle
        self.ranks = ranks
        self.own = own
        self.stays = stays
        self.pickled = False
        self.leaves: list[CapturedLeaf] = []
        self._taken: dict[str, int] = {}
        self._depth = 0
        # id -> node of each container of the current tree; all values met are kept
        # alive, temporary ones too (state_dict()), so that no id is used twice.
        self._memo: dict[int, Any] = {}
        self._kept: list[object] = []
        self._ids = 0
        self._arrays = encode_array.ArrayNodes()
        self._aliases: dict[Hashable, dict[str, Any]] = {}
        self._files = file_copies.FileCopies(files_in_place)
        self._inline = 0
        # Values that `_adapter` is to encode together; `_types` has the types of them.
        self._waiting: list[Waiting] = []
        self._adapter: Adapter | None = None
        self._types = dict(self._TYPES)

    # -- the contract of adapters.Encoder ------------------------------------------

    def encode(self, value: object, path: str) -> Node:
        if self._depth:
            return self._encode(value, path)
        self._memo.clear()
        self._ids = 0
        try:
            with values.collector_paused():
                node = self._encode(value, path)
                self._encode_waiting()
                return node
        except RecursionError:  # the caller's own stack is deep already
            raise _too_deep(path) from None
        finally:
            self._depth = self._inline = 0

    def leaf(self, source: LeafSource, path: str, placement: Placement | None = None) -> int:
        if self._waiting:
            self._encode_waiting()  # leaves are in the order of the tree
        if not path.isascii():
            path = path.encode("utf-8", "backslashreplace").decode()  # lone surrogates
        path = path[:MAX_PATH_CHARACTERS]
        count = self._taken.get(path, 0) + 1
        self._taken[path] = count
        if count > 1:
            unique = f"{path}#{count}"
            while unique in self._taken:  # a key that itself ends in "#2"
                count += 1
                unique = f"{path}#{count}"
            self._taken[path] = count
            self._taken[unique] = 1
            path = unique
        self.leaves.append(CapturedLeaf(path, source, placement))
        return len(self.leaves) - 1

    def leaves_of(
        self,
        sources: Sequence[LeafSource],
        paths: Sequence[str],
        placements: Sequence[Placement | None] | None = None,
    ) -> Sequence[int]:
        if self._waiting:
            self._encode_waiting()
        names = dict.fromkeys(paths, 1)
        if (
            len(names) < len(paths)
            or not self._taken.keys().isdisjoint(names)
            or not "".join(paths).isascii()
            or max(map(len, paths), default=0) > MAX_PATH_CHARACTERS
        ):
            places = placements or [None] * len(paths)
            return [self.leaf(*each) for each in zip(sources, paths, places, strict=True)]
        first = len(self.leaves)
        self._taken.update(names)
        columns = (paths, sources) if placements is None else (paths, sources, placements)
        self.leaves += map(CapturedLeaf, *columns)
        return range(first, len(self.leaves))

    def place(self, leaf: int, placement: Placement | None) -> None:
        known = self.leaves[leaf]
        self.leaves[leaf] = CapturedLeaf(known.path, known.source, placement)

    def alias(self, key: Hashable, keep: object) -> dict[str, Any]:
        memo = self._aliases.get(key)
        if memo is None:
            memo = self._aliases[key] = {}
            self._kept.append(keep)
        return memo

    def note_pickle(self) -> None:
        self.pickled = True

    def close(self) -> None:
        """Close every source. For a capture that is given up."""
        for leaf in self.leaves:
            leaf.source.close()

    # -- dispatch -------------------------------------------------------------------

    def _encode(self, value: object, path: str) -> Node:
        handler = self._types.get(type(value))
        if handler is not None:
            return handler(self, value, path)
        return self._encode_other(value, path)

    def _encode_other(self, value: Any, path: str) -> Node:
        known = self._memo.get(id(value))
        if known is not None:
            return self._reference(known, path)
        if isinstance(value, np.generic):
            return self._scalar(cast(Any, value), path)
        adapter = frameworks.adapter_for_value(value)
        if adapter is not None:
            if type(value) in adapter.together:
                self._collect_for(adapter)
                return self._together(value, path)
            self.enter(value, path)
            node: Any = adapter.encode(value, path, self)
            self.leave(value, cast(Node, node if isinstance(node, dict) else None))
            if node is not None:
                return cast(Node, node)
        node = encode_objects.encode(self, value, path)
        if node is not None:
            return node
        if self.allow_pickle:
            return encode_objects.encode_pickle(self, value, path)
        raise self._unsupported(value, path)

    # -- many values of a framework at once -------------------------------------------

    def _collect_for(self, adapter: Adapter) -> None:
        """Values that wait are this adapter's from now on."""
        self._encode_waiting()
        if self._adapter is not None:
            for kind in self._adapter.together:
                del self._types[kind]
        self._adapter = adapter
        self._types.update(dict.fromkeys(adapter.together, TreeEncoder._together))

    def _together(self, value: Any, path: str) -> Node:
        """A node that is completed when its adapter is called for many of them."""
        known = self._memo.get(id(value))
        if known is not None:
            return self._reference(known, path)
        node: dict[str, Node] = {}
        self._memo[id(value)] = node
        self._kept.append(value)
        self._waiting.append((value, path, node))
        return node

    def _encode_waiting(self) -> None:
        """Complete the nodes of the values that wait."""
        self._depth += 1  # what the adapter asks for is a part of this tree, not another one
        while self._waiting and self._adapter is not None:
            waiting, self._waiting = self._waiting, []
            self._adapter.encode_together(waiting, self)
        self._depth -= 1

    def _unsupported(self, value: object, path: str) -> UnsupportedValue:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        hint = frameworks.callback_hint(kind) or _HINT
        if isinstance(value, np.ma.MaskedArray):
            hint = "Save its .data and .mask as two arrays."
        elif isinstance(value, dict | list | tuple | set):
            hint = "Convert it to a plain container, or pass allow_pickle=True."
        elif isinstance(value, stored.StoredFile | stored.StoredDirectory):
            hint = "Write it with .copy_to(path) and save holdfast.File(path)."
        return UnsupportedValue(path, f"value of type {kind}", hint=hint)

    # -- containers -------------------------------------------------------------------

    def enter(self, value: object, path: str) -> None:
        """Before the parts of a container are encoded: meeting it in there is a cycle."""
        self._depth += 1
        if self._depth > values.MAX_DEPTH:
            raise _too_deep(path)
        self._memo[id(value)] = _IN_PROGRESS
        self._kept.append(value)

    def leave(self, value: object, node: Node) -> None:
        """Its parts are in `node`; None: it is not remembered, the next one is another."""
        self._depth -= 1
        if node is None:
            del self._memo[id(value)]
        else:
            self._memo[id(value)] = node

    def reference(self, value: object, path: str) -> Node | None:
        """The node of a container that was met before; None if it was not."""
        known = self._memo.get(id(value))
        return None if known is None else self._reference(known, path)

    def _reference(self, node: Any, path: str) -> Node:
        """A second occurrence of a container; its first node is given an id."""
        if node is _IN_PROGRESS:
            raise StateError(
                f"cannot save {path!r}: it contains itself",
                hint="Break the cycle: store an index or a key instead of the object.",
            )
        if isinstance(node, list):
            items = cast(list[Node], node)
            marker = items[0] if items else None
            if not (isinstance(marker, dict) and cast(dict[str, Any], marker).get("!") == "id"):
                self._ids += 1
                marker = {"!": "id", "v": self._ids}
                items.insert(0, marker)
            return {"!": "ref", "v": cast(dict[str, Any], marker)["v"]}
        tagged = cast(dict[str, Node], node)
        if "id" not in tagged:
            self._ids += 1
            tagged["id"] = self._ids
        return {"!": "ref", "v": tagged["id"]}

    def _list(self, value: list[Any], path: str) -> Node:
        known = self._memo.get(id(value))
        if known is not None:
            return self._reference(known, path)
        if len(value) > values.MAX_INLINE_ITEMS:
            source = encode_plain.numbers_source(value)
            if source is not None:
                return self.remembered(value, {"!": "numbers", "leaf": self.leaf(source, path)})
        self.enter(value, path)
        node: list[Node] = []
        for index, item in enumerate(value):
            kind = type(cast(object, item))
            if kind is float:  # without a path for each number
                node.append(values.encode_float(item))
            elif kind is int and -values.SAFE_INT <= item <= values.SAFE_INT:
                node.append(item)
            else:
                node.append(self._encode(item, f"{path}/{index}"))
        self.leave(value, node)
        return node

    def remembered(self, value: object, node: dict[str, Node]) -> dict[str, Node]:
        """The node of an object without others in it, for references to it."""
        self._kept.append(value)
        self._memo[id(value)] = node
        return node

    def _items(self, value: Any, path: str) -> list[Node]:
        return [self._encode(item, f"{path}/{index}") for index, item in enumerate(value)]

    def _key(self, key: object, path: str) -> Node:
        if type(key) is str:
            return values.encode_str(key)
        if type(key) is int:
            return values.encode_int(key)
        self._inline += 1
        node = self._encode(key, f"{path}/<key {values.key_label(key)}>")
        self._inline -= 1
        return node

    def pairs(self, value: Mapping[Any, Any], path: str) -> list[Node]:
        """[key, value] of each item, as nodes."""
        handler_of = self._types.get
        pairs: list[Node] = []
        for key, item in cast(Mapping[object, object], value).items():
            name = key if type(key) is str else values.key_label(key)
            inner = f"{path}/{name}" if path else name
            handler = handler_of(type(item))
            node = handler(self, item, inner) if handler else self._encode_other(item, inner)
            plain = key is name and name.isascii()  # nearly every key
            pairs.append([name if plain else self._key(key, path), node])
        return pairs

    def _dict(self, value: Any, path: str) -> Node:
        known = self._memo.get(id(value))
        if known is not None:
            return self._reference(known, path)
        self.enter(value, path)
        node: dict[str, Node] = {"!": "dict"}
        kind = type(cast(object, value))
        if kind is dict:
            pass
        elif kind is OrderedDict:
            node["!"] = "odict"
            attributes: dict[str, Any] = value.__dict__
            if attributes:  # state_dict()._metadata
                node["attrs"] = {"!": "dict", "v": self.pairs(attributes, path)}
        elif kind is defaultdict:
            node["!"] = "defaultdict"
            node["factory"] = self._factory(value.default_factory, path)
        elif kind is Counter:
            node["!"] = "counter"
        node["v"] = self.pairs(value, path)
        self.leave(value, node)
        return node

    def _factory(self, factory: object, path: str) -> str:
        for name, allowed in values.FACTORIES.items():
            if factory is allowed:
                return name
        raise UnsupportedValue(
            path,
            f"defaultdict whose factory is {factory!r}",
            hint=f"Use one of {', '.join(values.FACTORIES)}, or convert it to a dict.",
        )

    def _tuple(self, value: tuple[Any, ...], path: str) -> Node:
        known = self._memo.get(id(value))
        if known is not None:
            return self._reference(known, path)
        self.enter(value, path)
        node: dict[str, Node] = {"!": "tuple", "v": self._items(value, path)}
        # Flat tuples are values, often constants shared by chance ((0.9, 0.999)).
        # Others are remembered: their items keep their identity, and t = (t, t)
        # thirty times over stays small.
        nested = any(isinstance(item, dict | list) for item in node["v"])
        self.leave(value, node if nested else None)
        return node

    def _set(self, value: set[Any], path: str) -> Node:
        known = self._memo.get(id(value))
        if known is not None:
            return self._reference(known, path)
        return self._set_node("set", value, path)

    def _frozenset(self, value: frozenset[Any], path: str) -> Node:
        return self._set_node("frozenset", value, path)

    def _set_node(self, tag: str, value: Any, path: str) -> Node:
        """Items in the order of their JSON: hash order differs between processes."""
        self.enter(value, path)
        self._inline += 1
        nodes = [self._encode(item, f"{path}/<item>") for item in value]
        self._inline -= 1
        self._encode_waiting()
        node: dict[str, Node] = {"!": tag, "v": sorted(nodes, key=msgspec.json.encode)}
        self.leave(value, node if tag == "set" else None)
        return node

    def _deque(self, value: deque[Any], path: str) -> Node:
        known = self._memo.get(id(value))
        if known is not None:
            return self._reference(known, path)
        self.enter(value, path)
        node: dict[str, Node] = {"!": "deque", "v": self._items(value, path)}
        if value.maxlen is not None:
            node["maxlen"] = value.maxlen
        self.leave(value, node)
        return node

    def _slice(self, value: slice, path: str) -> Node:
        return {"!": "slice", "v": self._items((value.start, value.stop, value.step), path)}

    # -- strings and bytes ----------------------------------------------------------------

    def _str(self, value: str, path: str) -> Node:
        if len(value) <= values.MAX_INLINE_BYTES or self._inline:
            return values.encode_str(value)
        return {"!": "str", "leaf": self.leaf(arrays.BytesSource(values.utf8(value)), path)}

    def _bytes(self, value: bytes, path: str) -> Node:
        if len(value) <= values.MAX_INLINE_BYTES or self._inline:
            return {"!": "bytes", "b64": values.b64(value)}
        return {"!": "bytes", "leaf": self.leaf(arrays.BytesSource(value), path)}

    def _bytearray(self, value: bytearray, path: str) -> Node:
        known = self._memo.get(id(value))
        if known is not None:
            return self._reference(known, path)
        # A copy: a view would forbid the caller to resize it until the save is done.
        node = cast(dict[str, Node], self._bytes(bytes(value), path))
        node["!"] = "bytearray"
        return self.remembered(value, node)

    # -- NumPy ------------------------------------------------------------------------------

    def _array(self, value: arrays.Array, path: str) -> Node:
        known = self._memo.get(id(value))
        if known is not None:
            return self._reference(known, path)
        return self.remembered(value, self._arrays.encode(self, value, path))

    def _scalar(self, value: Any, path: str) -> Node:
        if type(value) is np.str_:
            return {"!": "npstr", "v": self._str("".join(value), path)}
        if type(value) is np.bytes_:
            return {"!": "npbytes", "v": self._bytes(value[:], path)}
        node = encode_array.scalar_node(value, path)
        if node is None:
            raise self._unsupported(value, path)
        return node

    # -- files ------------------------------------------------------------------------------------

    def _file(self, value: files.File, path: str) -> Node:
        return files.encode_file(value, path, self, self._files)

    def _directory(self, value: files.Directory, path: str) -> Node:
        return files.encode_directory(value, path, self, self._files)

    # -- which method for which type (exact types: a subclass may mean something else) --

    _TYPES: ClassVar[dict[type, Callable[[TreeEncoder, Any, str], Node]]] = {
        **encode_plain.PLAIN,
        str: _str,
        list: _list,
        dict: _dict,
        tuple: _tuple,
        bytes: _bytes,
        bytearray: _bytearray,
        set: _set,
        frozenset: _frozenset,
        deque: _deque,
        OrderedDict: _dict,
        defaultdict: _dict,
        Counter: _dict,
        slice: _slice,
        np.ndarray: _array,
        np.memmap: _array,
        files.File: _file,
        **given.NODES,
        files.Directory: _directory,
        **dict.fromkeys(generators.TYPES, encode_objects.encode_generator),
    }


def _too_deep(path: str) -> StateError:
    return StateError(
        f"cannot save {path[:200]!r}: it is nested deeper than {values.MAX_DEPTH} levels",
        hint="Store deep structures flat, for example as a list with indices.",
    )
