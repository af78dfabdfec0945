"""One manifest of what several ranks have written, and what a rank finds in it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, cast

import msgspec
from msgspec.structs import replace

from holdfast.core.patches import differences, patched
from holdfast.core.records import Chunk, Fragment, Leaf, Manifest, OtherRank, Pack
from holdfast.core.types import Node
from holdfast.errors import DamagedObject, SaveFailed

Named = tuple[tuple[str, msgspec.Raw], ...]
"""The entries of a state, each as JSON: (key, value)."""


def named(tree: Node) -> Named:
    """The entries of a state's node."""
    raw = msgspec.json.encode
    return tuple((raw(key).decode(), msgspec.Raw(raw(value))) for key, value in tree["v"])


class Joining:
    """Joins the shares of a save in one manifest; rank 0's is the first."""

    def __init__(self, manifest: Manifest, own: Collection[int]) -> None:
        """`manifest` has rank 0's chunks only; `own` are its leaves that are no part of a leaf
        of all ranks."""
        self._manifest = manifest
        self._tree = named(manifest.tree)
        self._leaves = [(leaf, list(leaf.chunks)) for leaf in manifest.leaves]
        self._shared = {
            leaf.path: number for number, leaf in enumerate(manifest.leaves) if number not in own
        }
        self._paths = {leaf.path for leaf in manifest.leaves}
        self._packs = list(manifest.packs)
        self._numbers = {pack.name: number for number, pack in enumerate(manifest.packs)}
        self._others: list[OtherRank] = []
        self.pickled = manifest.pickled

    def add(self, fragment: Fragment) -> None:
        """The share of one more rank. Raises SaveFailed if it does not go with the others."""
        packs = [self._number(pack) for pack in fragment.packs]
        own = set(fragment.own)
        moved: list[tuple[int, int]] = []
        for number, leaf in enumerate(fragment.leaves):
            chunks = [replace(chunk, pack=packs[chunk.pack]) for chunk in leaf.chunks]
            if number in own:
                path = self._unused(f"@{fragment.rank}/{leaf.path}")
                at = self._append(replace(leaf, path=path), chunks)
            else:
                at = self._join(leaf, chunks, fragment.rank)
            if at != number:
                moved.append((number, at))
        tree = tuple(self._tree_changes(fragment.tree))
        runtime = differences(self._manifest.runtime, fragment.runtime)
        self._others.append(
            OtherRank(rank=fragment.rank, leaves=tuple(moved), tree=tree, runtime=runtime)
        )
        self.pickled = self.pickled or fragment.pickled

    def result(self) -> Manifest:
        """Of all ranks that were added; `check_manifest` tells whether they are all."""
        return replace(
            self._manifest,
            world_size=len(self._others) + 1,
            leaves=tuple(
                replace(leaf, chunks=tuple(sorted(chunks, key=_start))) if chunks else leaf
                for leaf, chunks in self._leaves
            ),
            packs=tuple(self._packs),
            others=tuple(sorted(self._others, key=lambda other: other.rank)),
            pickled=self.pickled,
        )

    def _number(self, pack: Pack) -> int:
        """In the manifest. What was written for this save was born in it."""
        number = self._numbers.get(pack.name)
        if number is None:
            number = self._numbers[pack.name] = len(self._packs)
            born = self._manifest.ordinal
            self._packs.append(replace(pack, born=born) if self._is_new(pack) else pack)
        return number

    def _is_new(self, pack: Pack) -> bool:
        return not pack.run and self._manifest.nonce in pack.name

    def _join(self, leaf: Leaf, chunks: list[Chunk], rank: int) -> int:
        at = self._shared.get(leaf.path)
        if at is None:
            # Of a part of the model that rank 0 has not, as in a pipeline.
            at = self._shared[leaf.path] = self._append(
                replace(leaf, path=self._unused(leaf.path)), chunks
            )
            return at
        known, all_chunks = self._leaves[at]
        if (known.dtype, known.shape) != (leaf.dtype, leaf.shape):
            raise SaveFailed(
                f"rank {rank} has {leaf.path} as {leaf.dtype}{list(leaf.shape)}, and another one "
                f"as {known.dtype}{list(known.shape)}",
                hint="Build the same model on all ranks.",
            )
        all_chunks.extend(chunks)
        return at

    def _append(self, leaf: Leaf, chunks: list[Chunk]) -> int:
        self._leaves.append((leaf, chunks))
        self._paths.add(leaf.path)
        return len(self._leaves) - 1

    def _unused(self, path: str) -> str:
        while path in self._paths:
            path += "#"
        return path

    def _tree_changes(self, tree: Named) -> Iterator[Any]:
        """Bytes are compared first: mostly nothing but the values in the box differs."""
        if [key for key, _ in tree] != [key for key, _ in self._tree]:
            entries = [[_plain(key.encode()), _plain(value)] for key, value in tree]
            yield from differences(self._manifest.tree, {**self._manifest.tree, "v": entries})
            return
        pairs = cast(list[list[Node]], self._manifest.tree["v"])
        for number, ((_, value), (_, ours)) in enumerate(zip(tree, self._tree, strict=True)):
            if bytes(value) != bytes(ours):
                for change in differences(pairs[number][1], _plain(value)):
                    yield replace(change, path=("v", number, 1, *change.path))


def _plain(value: Any) -> Node:
    return msgspec.json.decode(value)


def _start(chunk: Chunk) -> tuple[int, ...]:
    return chunk.start


def view_of(manifest: Manifest, rank: int) -> Manifest:
    """The manifest as this rank made it: with its own leaves under their own names, its own
    tree and runtime. That of rank 0 for a rank that was not there. Raises DamagedObject."""
    other = next((one for one in manifest.others or () if one.rank == rank), None)
    if other is None:
        return manifest
    count = len(manifest.leaves)
    leaves = list(manifest.leaves)
    for number, at in other.leaves:
        if not (0 <= at < count and 0 <= number < count):
            raise _malformed(manifest, rank, "it names a leaf that is not there")
        leaf = manifest.leaves[at]
        leaves[number] = replace(leaf, path=leaf.path.removeprefix(f"@{rank}/"))
    try:
        tree = patched(manifest.tree, other.tree)
        runtime = patched(manifest.runtime, other.runtime)
    except ValueError as error:
        raise _malformed(manifest, rank, str(error)) from None
    return replace(manifest, leaves=tuple(leaves), tree=tree, runtime=runtime)


def alike(manifest: Manifest, name: str) -> bool:
    """Whether several ranks have saved it, and the second has the same entry `name` of its
    runtime as the first, down to the bytes. Raises DamagedObject."""
    if manifest.world_size == 1:
        return False
    views = (manifest, view_of(manifest, 1))
    one, other = (_with_digests(_entry(view.runtime, name), view) for view in views)
    return one == other


def _entry(node: Node, name: str) -> Node:
    pairs = cast(dict[str, Any], node).get("v") if isinstance(node, dict) else None
    for pair in cast(list[Any], pairs) if isinstance(pairs, list) else []:
        if isinstance(pair, list) and cast(list[Any], pair)[:1] == [name]:
            return cast(list[Any], pair)[-1]
    return None


def _with_digests(node: Node, view: Manifest) -> Node:
    """The node, with what its leaves hold in place of their indexes."""
    if isinstance(node, list):
        return [_with_digests(item, view) for item in cast(list[Node], node)]
    if not isinstance(node, dict):
        return node
    fields = cast(dict[str, Node], node)
    found = {key: _with_digests(value, view) for key, value in fields.items() if key != "leaf"}
    leaf = fields.get("leaf")
    if isinstance(leaf, int) and 0 <= leaf < len(view.leaves):
        found["leaf"] = [chunk.digest for chunk in view.leaves[leaf].chunks]
    return found


def _malformed(manifest: Manifest, rank: int, reason: str) -> DamagedObject:
    return DamagedObject(f"the manifest of step {manifest.step}", f"rank {rank}: {reason}")
