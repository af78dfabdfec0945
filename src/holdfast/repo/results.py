"""Results of calls: one object for each, a safetensors file that describes itself.

A result is nothing but a value under a name that says where it comes from: function,
arguments, code. Two processes that store under one name mean the same, and the first one wins.
So nobody needs to hold the run, and a writer that was overtaken does no harm
(docs/design/results.md).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

from holdfast.core.adapters import NOTHING, Destination
from holdfast.core.calls import Call
from holdfast.core.digest import digest
from holdfast.core.packing import PackChunk, header_bytes, pack_header, read_header
from holdfast.core.plan import boxes, in_c_order, itemsize
from holdfast.core.records import Chunk, Leaf, Result
from holdfast.core.sealed import seal, unseal
from holdfast.core.threads import share_out
from holdfast.core.tree import CapturedLeaf, TreeDecoder, TreeEncoder, settle
from holdfast.core.types import MiB, Node
from holdfast.errors import DamagedObject, ObjectNotFound, StateError, UnsupportedValue
from holdfast.repo import keys
from holdfast.repo.results_list import listed
from holdfast.stores.base import Store

WHOLE_BYTES = 8 * MiB  # up to here an object is written and read in one piece
_BLOCK_BYTES = 8 * MiB
_METADATA = "holdfast.result"
_ROOT = "result"
"""What the path of every leaf starts with."""
# They come back as what they save, and not as what they are.
_STATES = ("object", "torch.module", "torch.optimizer", "torch.object")
_PARTS = ("jax.node", "jax.nnx")

Read = Callable[[int, memoryview], None]
"""Fill a buffer from an offset of the object on."""


def key_of(call: Call) -> str:
    return keys.result_key(digest(call.function.encode()), call.arguments, call.code)


class Encoded(NamedTuple):
    """A value that can be stored."""

    tree: Node
    leaves: list[CapturedLeaf]
    close: Callable[[], None]
    """To be called when it was stored, or will not be."""


def encode(value: object) -> Encoded:
    """Raises UnsupportedValue naming what cannot be stored; StateError."""
    encoder = TreeEncoder(files_in_place=lambda path: True)
    try:
        tree = encoder.encode(value, _ROOT)
        _refuse_states(tree)
    except BaseException:
        encoder.close()
        raise
    return Encoded(tree, encoder.leaves, encoder.close)


def _refuse_states(tree: Node) -> None:
    waiting: list[Any] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            tagged = cast("dict[str, Any]", node)
            if tagged.get("!") in _STATES:
                kind = str(tagged.get("type", "object"))
                hint = "Return its state_dict(), and load that where it is used."
                raise UnsupportedValue(_ROOT, f"{kind}, which has a state_dict()", hint=hint)
            if tagged.get("!") in _PARTS:
                what = f"{tagged.get('type')}, of which only the arrays would come back"
                hint = "Return its arrays, for example jax.tree.leaves(value)."
                raise UnsupportedValue(_ROOT, what, hint=hint)
            waiting += tagged.values()
        elif isinstance(node, list):
            waiting += cast("list[Any]", node)


def put(store: Store, call: Call, value: Encoded, *, time_s: float, took_s: float) -> bool:
    """Store the result, durable when this returns; False if something is there already.

    Raises as `Store.put_new`, SaveFailed for a file that changed meanwhile.
    """
    total = sum(leaf.source.nbytes for leaf in value.leaves)
    whole = memoryview(bytearray(total)) if total <= WHOLE_BYTES else None
    leaves = _digested(value.leaves, whole)
    result = Result(
        function=call.function,
        arguments=call.arguments,
        code=call.code,
        time_s=time_s,
        took_s=took_s,
        tree=value.tree,
        leaves=leaves,
    )
    head = _head(seal(result)[1], leaves)
    if whole is not None:
        return store.put_new(key_of(call), [head, whole])
    made = store.create(key_of(call), at_most_bytes=len(head) + total)
    try:
        for offset, block in _blocks(head, value.leaves):
            made.write(offset, block)
        return made.publish(len(head) + total)
    finally:
        made.discard()


def _digested(captured: Sequence[CapturedLeaf], whole: memoryview | None) -> tuple[Leaf, ...]:
    """The leaves with digests of all their chunks; their bytes are put into `whole`."""
    leaves: list[Leaf] = []
    block = memoryview(bytearray(0))
    start = 0
    for path, source in ((leaf.path, leaf.source) for leaf in captured):
        chunks: list[Chunk] = []
        for first, shape, offset, nbytes in boxes(source.shape, itemsize(source.dtype)):
            if whole is not None:
                part = whole[start + offset : start + offset + nbytes]
            else:
                if block.nbytes < nbytes:
                    block = memoryview(bytearray(nbytes))
                part = block[:nbytes]
            source.copy_range(offset, part)
            chunks.append(Chunk(first, shape, 0, start + offset, nbytes, digest(part)))
        leaves.append(Leaf(path, source.dtype, source.shape, tuple(chunks)))
        start += source.nbytes
    return tuple(leaves)


def _head(sealed: bytes, leaves: Sequence[Leaf]) -> bytes:
    """The object's header: leaves under their paths, and what it says of itself. It follows
    from that, so that a reader can compare every byte."""
    entries = [
        PackChunk(leaf.path, leaf.dtype, leaf.shape, sum(chunk.nbytes for chunk in leaf.chunks))
        for leaf in leaves
    ]
    return pack_header(entries, {_METADATA: sealed.decode()})[0]


def _blocks(head: bytes, captured: Sequence[CapturedLeaf]) -> Iterator[tuple[int, memoryview]]:
    """(offset, bytes) of the whole object, in aligned blocks that are used again."""
    block = memoryview(mmap.mmap(-1, _BLOCK_BYTES))
    at = filled = 0
    pieces: list[tuple[int, Callable[[int, memoryview], object]]] = []

    def copy_head(offset: int, into: memoryview) -> None:
        into[:] = head[offset : offset + into.nbytes]

    pieces.append((len(head), copy_head))
    pieces += [(leaf.source.nbytes, leaf.source.copy_range) for leaf in captured]
    for nbytes, copy in pieces:
        done = 0
        while done < nbytes:
            count = min(nbytes - done, _BLOCK_BYTES - filled)
            copy(done, block[filled : filled + count])
            done += count
            filled += count
            if filled == _BLOCK_BYTES:
                yield at, block
                at, filled = at + filled, 0
    if filled:
        yield at, block[:filled]


class Stored:
    """A result that is in a store. Its header has been checked, its bytes not yet."""

    def __init__(self, key: str, result: Result, start: int, read: Read, threads: int) -> None:
        self.key = key
        self.result = result
        self._start = start
        self._read = read
        self._threads = threads

    @property
    def nbytes(self) -> int:
        """Of its leaves."""
        return sum(chunk.nbytes for leaf in self.result.leaves for chunk in leaf.chunks)

    def value(self) -> Any:
        """The value, made anew, every byte verified. Raises DamagedObject, ObjectNotFound,
        FormatTooNew."""
        decoder = TreeDecoder(self.result.leaves, fetch=self.fetch)
        value = decoder.decode(self.result.tree, NOTHING, _ROOT)
        self.fetch(decoder.requests)
        decoder.run()
        return settle(value)

    def verify(self) -> None:
        """Read and verify every byte. Raises as `value`."""
        self.fetch((index, _Nowhere()) for index in range(len(self.result.leaves)))

    def fetch(self, requests: Iterable[tuple[int, Destination]]) -> None:
        """Read leaves, verified, to where they go."""
        leaves = self.result.leaves
        wanted = [
            _Wanted(leaves[index], chunk, to)
            for index, to in requests
            for chunk in leaves[index].chunks
        ]
        wanted.sort(key=lambda one: one.chunk.offset)
        share_out(
            _neighbours(wanted), self._read_each, threads=self._threads, name="holdfast-results"
        )

    def _read_each(self, groups: Iterator[list[_Wanted]]) -> None:
        block = memoryview(bytearray(0))
        for group in groups:
            first, last = group[0].chunk, group[-1].chunk
            nbytes = last.offset + last.nbytes - first.offset
            if block.nbytes < nbytes:
                block = memoryview(bytearray(nbytes))
            data = block[:nbytes]
            self._read(self._start + first.offset, data)
            for leaf, chunk, to in group:
                part = data[chunk.offset - first.offset :][: chunk.nbytes]
                if digest(part) != chunk.digest:
                    raise DamagedObject(
                        self.key, "its bytes do not match their digest", leaf=leaf.path
                    )
                to.write(chunk.start, chunk.shape, part)


class _Wanted(NamedTuple):
    leaf: Leaf
    chunk: Chunk
    to: Destination


class _Nowhere:
    def write(self, start: Sequence[int], shape: Sequence[int], data: memoryview) -> None:
        """Verified is all that is asked."""


def _neighbours(wanted: Iterable[_Wanted]) -> list[list[_Wanted]]:
    """What is read together: chunks one behind the other, up to a block of them."""
    groups: list[list[_Wanted]] = []
    for one in wanted:
        if groups:
            first, last = groups[-1][0].chunk, groups[-1][-1].chunk
            end = one.chunk.offset + one.chunk.nbytes
            behind = one.chunk.offset == last.offset + last.nbytes
            if behind and end - first.offset <= _BLOCK_BYTES:
                groups[-1].append(one)
                continue
        groups.append([one])
    return groups


def stored(store: Store, key: str, call: Call | None = None) -> Stored:
    """The result at `key`; of `call`, if that is given. Raises ObjectNotFound; DamagedObject;
    FormatTooNew; StoreUnavailable."""
    try:
        data = store.get(key, max_bytes=WHOLE_BYTES)
    except DamagedObject:
        if store.size(key) <= WHOLE_BYTES:
            raise
        return _of_large(store, key, call)
    return in_memory(key, data, call)


def in_memory(key: str, data: bytes, call: Call | None = None) -> Stored:
    """As `stored`, of an object whose bytes were read."""

    def read(offset: int, into: memoryview) -> None:
        part = memoryview(data)[offset : offset + into.nbytes]
        if part.nbytes != into.nbytes:
            raise DamagedObject(key, "it is cut off")
        into[:] = part

    return _checked(key, len(data), read, call, 1)


def _of_large(store: Store, key: str, call: Call | None) -> Stored:
    def read(offset: int, into: memoryview) -> None:
        store.read_into(key, offset, into)

    return _checked(key, store.size(key), read, call, store.parallel)


def _checked(key: str, file_bytes: int, read: Read, call: Call | None, threads: int) -> Stored:
    first = bytearray(min(8, file_bytes))
    read(0, memoryview(first))
    head = bytearray(header_bytes(first, file_bytes, key))
    read(0, memoryview(head))
    header = read_header(head, file_bytes, key)
    sealed = header.metadata.get(_METADATA, "").encode("utf-8", "surrogatepass")
    result = unseal(sealed, Result, key)[1]
    if key != key_of(Call(result.function, result.arguments, result.code)):
        raise DamagedObject(key, "it is the result of another call")
    if call is not None and (result.function, result.arguments, result.code) != call:
        raise DamagedObject(key, "another call has a name that is cut to the same key")
    at = 0
    for leaf in result.leaves:
        if not in_c_order(leaf.shape, [(chunk.start, chunk.shape) for chunk in leaf.chunks]):
            raise DamagedObject(key, "its chunks are not in order", leaf=leaf.path)
        for chunk in leaf.chunks:
            if (chunk.offset, chunk.pack, chunk.codec) != (at, 0, "") or chunk.nbytes < 0:
                raise DamagedObject(key, "its bytes are not where they should be", leaf=leaf.path)
            at += chunk.nbytes
    try:
        right = _head(sealed, result.leaves) == bytes(head)
    except (StateError, ValueError):
        right = False
    if not right or len(head) + at != file_bytes:
        raise DamagedObject(key, "its header is not that of its content")
    return Stored(key, result, len(head), read, threads)


def damaged(store: Store) -> list[DamagedObject]:
    """Read every byte of every result; what is wrong. Raises FormatTooNew, StoreUnavailable."""
    found: list[DamagedObject] = []
    for info in listed(store):
        try:
            stored(store, info.key).verify()
        except DamagedObject as error:
            found.append(error)
        except ObjectNotFound:
            pass  # another process replaces it
    return sorted(found, key=lambda error: error.key)
