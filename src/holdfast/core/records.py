"""The values that a run's objects hold: manifests, log entries, segments, fragments.

All are sealed JSON (see `sealed`); `docs/format.md` specifies every field. Fields
that a reader does not know are ignored; `FORMAT` changes when that would be wrong.
"""

from __future__ import annotations

from typing import Any

import msgspec

from holdfast.core.types import Node

FORMAT = 1

# `gc=False` where there are tens of thousands: the collector would visit them again and
# again, for the whole process, and they cannot be part of a cycle.


class Chunk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A contiguous byte range of a pack: one n-d box of one leaf.

    `start` and `shape` have one number per dimension of the leaf (none for 0-d).
    The bytes are the box's elements in its own C order. The chunks of a leaf tile it, in any
    order.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    pack: int
    """Index into the manifest's `packs`."""
    offset: int
    """From the first byte of the pack."""
    nbytes: int
    """Stored bytes."""
    digest: str
    """BLAKE3 of the leaf's bytes in this box (before `codec`)."""
    codec: str = ""
    """How the stored bytes are encoded (see `codecs`): "" = as they are."""


class Leaf(msgspec.Struct, frozen=True, gc=False):
    """The bytes of one tensor, array, byte string or file."""

    path: str
    """Unique in the manifest, for people: `model/layers.0.weight`."""
    dtype: str
    """A safetensors dtype (`F32`, `BF16`, `I64`, `U8`, …). What safetensors cannot
    name is stored as `U8` with the item size as last dimension; the tree says
    what it really is."""
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Pack(msgspec.Struct, frozen=True):
    """A data file that a manifest refers to."""

    name: str
    """Key `packs/<name>.safetensors`: `<epoch>-<save nonce>-<rank>-<k>`."""
    nbytes: int
    born: int
    """`ordinal` of the checkpoint that wrote it; bounds how many share one copy."""
    head_nbytes: int
    """Bytes before the first chunk: the safetensors header."""
    head_digest: str
    run: str = ""
    """Address of the run that holds it, relative to this run's; "" = this run."""


class Change(msgspec.Struct, frozen=True, array_like=True):
    """One place where a node differs from another (see `patches`)."""

    path: tuple[int | str, ...]
    """Indexes of lists and keys of objects, from the root."""
    node: Node


class OtherRank(msgspec.Struct, frozen=True, kw_only=True):
    """How what a further rank saved differs from what the manifest says of rank 0."""

    rank: int
    leaves: tuple[tuple[int, int], ...] = ()
    """(index in this rank's nodes, index into the manifest's `leaves`), where they differ."""
    tree: tuple[Change, ...] = ()
    runtime: tuple[Change, ...] = ()


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a rank has no share of a save, or why there is no checkpoint."""

    kind: str
    """The class of the error, for those that are handled in their own way."""
    message: str
    hint: str = ""
    names: tuple[str, ...] = ()
    """Of leaves or packs, as the kind has them."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint."""

    format: int = FORMAT
    run: str
    epoch: int
    nonce: str
    ordinal: int
    """1 for a run's first checkpoint, then one more than its predecessor's."""
    step: int
    """Completed steps."""
    time_s: float
    """When the state was captured, Unix time."""
    world_size: int = 1
    tree: Node
    """The user's state (a `dict` node)."""
    runtime: Node
    """RNG states and loop position (a `dict` node)."""
    leaves: tuple[Leaf, ...]
    packs: tuple[Pack, ...]
    others: tuple[OtherRank, ...] | msgspec.UnsetType = msgspec.UNSET
    """Ranks from 1 on, if there are any. `tree` and `runtime` are those of rank 0."""
    pickled: bool = False
    """Whether any value can only be read with `allow_pickle=True`."""
    environment: dict[str, Any] = {}
    config: Any = None


class Fragment(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's share of a manifest: `fragments/<epoch>-<nonce>-<rank>.json`."""

    format: int = FORMAT
    run: str
    epoch: int
    nonce: str
    rank: int
    world_size: int
    step: int
    leaves: tuple[Leaf, ...] = ()
    """Every leaf of the rank, those of which others write all chunks too."""
    own: tuple[int, ...] = ()
    """Which of `leaves` are no part of a leaf of all ranks."""
    packs: tuple[Pack, ...] = ()
    tree: tuple[tuple[str, msgspec.Raw], ...] = ()
    """The state, name by name: a key node and a value node, both as they are in JSON."""
    runtime: Node = None
    marks: dict[str, str] = {}
    """Name of the state -> what its replicated leaves look like; equal on all ranks."""
    pickled: bool = False
    error: Failure | None = None
    """Why there is no share."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a save of several ranks: `fragments/<epoch>-<nonce>-outcome.json`."""

    format: int = FORMAT
    run: str
    epoch: int
    nonce: str
    record: Record | None = None
    """The checkpoint, if there is one."""
    error: Failure | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A live checkpoint, as the log lists it.

    It holds nothing that could lead back to it, so the garbage collector need not know it:
    with 10,000 in memory, each of its full passes in the training process would look at all.
    """

    id: str
    """Key `manifests/<id>.json`; the digest that seals the manifest."""
    step: int
    ordinal: int
    time_s: float
    nbytes: int
    """Logical bytes of all leaves."""
    new_bytes: int
    """Bytes of the packs written for it."""
    packs: dict[str, int]
    """Every pack of this run that it needs -> its size."""
    borrowed: tuple[str, ...] = ()
    """Addresses of parent runs whose packs it needs."""
    metrics: dict[str, float] = {}
    """Finite values only: these compete for `best`."""
    odd_metrics: dict[str, str] = {}
    """`"nan"`, `"inf"`, `"-inf"`: shown, never best (JSON has no such numbers)."""
    tags: tuple[str, ...] = ()
    pins: tuple[str, ...] = ()
    """Why it must stay: a user's words, or `fork:<address>` of a run that borrows from it."""
    note: str = ""
    """What caused the save: "every=500", "final", "preempted", …"""
    pickled: bool = False


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A run of older records, moved out of the entries: `segments/<name>.json`."""

    format: int = FORMAT
    run: str
    records: tuple[Record, ...]


class SegmentRef(msgspec.Struct, frozen=True):
    """An entry's reference to a segment."""

    name: str
    id: str
    count: int
    """Records in the segment."""
    removed: tuple[tuple[int, int], ...] = ()
    """Positions of those that are no longer live, as ascending ranges [first, end)."""


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """The process that writes the run."""

    host: str
    boot: str
    namespace: str
    """PID namespace: pids of two containers are not comparable."""
    pid: int
    started: str
    """The process's start time as its kernel states it: pids are reused."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One transaction: the whole list of live checkpoints after it."""

    format: int = FORMAT
    run: str
    number: int
    commit: str
    """Random; makes two writers' entries differ, so that each finds its own."""
    parent: tuple[int, str] | None
    """(number, id) of the entry it was made from; None for a first or rebuilt one."""
    ancestors: tuple[tuple[int, str], ...] = ()
    """The newest ancestors before `parent`, newest first."""
    epoch: int
    """Raised by each writer that opens the run; an older writer is fenced."""
    holder: Holder | None = None
    """Who writes; None after a clean close."""
    time_s: float
    action: str
    """For people: "save", "open", "close", "tag", "pin", "prune", "repair", …"""
    ordinal: int = 0
    """The newest ordinal ever given out."""
    segments: tuple[SegmentRef, ...] = ()
    records: tuple[Record, ...] = ()
    """The newest live checkpoints, oldest first, after those of `segments`."""
    edited: tuple[Record, ...] = ()
    """Stand in for the records of the same ids in `segments`, at their places."""
    finished: bool = False
    keep: str = ""
    """The retention rule (`keep=`) that the newest save was made under: says what
    `best` means. "" = no rule."""
    rebuilt: bool = False
    """Made by repair, from the manifests that were whole."""


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`holdfast.json`: says that this folder is a run."""

    format: int = FORMAT
    run: str
    """Random id of the run."""
    created_s: float
    parent: str = ""
    """Where it was forked from: `address@id`."""


class MirrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`mirrors/<epoch>.json`: where the writer of that epoch copies the run to."""

    format: int = FORMAT
    run: str
    address: str


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What `results/….safetensors` says of itself: one call's result."""

    format: int = FORMAT
    function: str
    """Module and qualified name."""
    arguments: str
    """Digest of the arguments."""
    code: str
    """Digest of the code, or of the version that stands for it."""
    time_s: float
    took_s: float = 0.0
    """How long it was computed; 0 = not known."""
    tree: Node
    leaves: tuple[Leaf, ...]
    """Offsets of their chunks are from the end of the object's header."""


class Coming(msgspec.Struct, frozen=True, kw_only=True):
    """`mirrors/<epoch>-coming.json`: what a run that was lost is to have of its mirror."""

    format: int = FORMAT
    run: str
    ids: tuple[str, ...]


# msgspec finds out about a type when it is first used, and another thread that comes to it
# meanwhile ends the process (a null pointer in `json_decode_struct_map`, msgspec 0.22). While a
# module is imported no other thread has its types.
for _kind in list(vars().values()):
    if isinstance(_kind, type) and issubclass(_kind, msgspec.Struct):
        msgspec.json.Decoder(_kind)
