"""How values become leaves and come back: the contract between tree and frameworks.

Capture: `Encoder.encode(value, path)` returns a JSON node; arrays and tensors in it
are registered as leaves, whose bytes the saver asks for through `LeafSource`.

Restore: `Decoder.decode(node, target, path)` walks the same node. Nothing live is
changed while it walks: bytes that are to come are *requested* with a `Destination`
and live objects are updated by *finishers*, which run only after the whole structure
was accepted and every requested byte was verified and delivered.

A framework adapter is an object with the verbs of `Adapter`; the frameworks are
never imported by this package: `holdfast.<name>` is imported when a value or a tag
of that framework turns up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, Protocol, TypeAlias

from holdfast.core.group import Ranks
from holdfast.core.placement import Placement
from holdfast.core.selection import Selection
from holdfast.core.types import Node


class LeafSource(Protocol):
    """Where a leaf's bytes come from while a save is captured.

    A class that can copy many leaves faster than one by one has a `copy_many` besides:
    see `copying.CopyMany`. One whose bytes lie on a device has a `transport`: see `transfers`.
    """

    @property
    def dtype(self) -> str:
        """Safetensors dtype of the stored bytes."""
        ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def streamed(self) -> bool:
        """True: held elsewhere than in memory (a file's copy); read in the background,
        in order. False: copied at once."""
        ...

    def copy_range(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the leaf's C-order little-endian bytes from `offset` on.
        Raises SaveFailed if they could not be captured (streamed sources)."""
        ...

    def mark(self) -> object:
        """Something small that differs once the bytes have changed, as far as that can be
        told quickly; compared with `==`. From any thread."""
        ...

    def close(self) -> None:
        """Called once after the last read, or when there will be none."""
        ...


class Destination(Protocol):
    """Where a leaf's verified bytes go.

    One that holds only a part of the leaf has an attribute `part` besides: (start, shape) of
    the box that it wants. Chunks that do not reach into it are not read; of others `write`
    gets all, and takes what is its own (`plan.meeting` says what that is).
    """

    def write(self, start: Sequence[int], shape: Sequence[int], data: memoryview) -> None:
        """Store `data` (C-order bytes) as the box at `start`. From any thread;
        boxes of one leaf do not overlap."""
        ...


class Encoder(Protocol):
    """Builds the tree of one save."""

    allow_pickle: bool
    ranks: Ranks | None
    """Of the processes that save together; None: this one saves alone."""
    own: Callable[[str], bool] | None
    """Whether what is at a path belongs to this process alone, though it looks like what all
    have in common: the parameters of models that are trained apart. None: nothing does."""
    stays: bool
    """The tree is for the same objects in this process again: of a tensor of several
    processes it has the part that is here."""

    def encode(self, value: object, path: str) -> Node:
        """The node of any supported value. Raises UnsupportedValue with the path."""
        ...

    def leaf(self, source: LeafSource, path: str, placement: Placement | None = None) -> int:
        """Register a leaf; its index, to be put in a node under "leaf". `placement`: the
        source is a part, or a replica, of a leaf of all the processes that save together."""
        ...

    def leaves_of(
        self,
        sources: Sequence[LeafSource],
        paths: Sequence[str],
        placements: Sequence[Placement | None] | None = None,
    ) -> Sequence[int]:
        """As `leaf` of each, in this order."""
        ...

    def place(self, leaf: int, placement: Placement | None) -> None:
        """Give a leaf that is registered already another placement: its source has become
        another one."""
        ...

    def alias(self, key: Hashable, keep: object) -> dict[str, Any]:
        """A memo that all nodes of this save share, for aliasing: one dict per `key`.

        `keep` is held until the capture ends, so that an `id()` in `key` stays
        unique. An adapter puts what it needs to recognise shared memory there.
        """
        ...

    def note_pickle(self) -> None:
        """Mark the checkpoint as holding pickled values."""
        ...


class Decoder(Protocol):
    """Accepts or refuses one checkpoint's tree, then fills it in."""

    allow_pickle: bool
    filling: bool
    """Whether this is a restore into live objects. Else all values are new."""

    @property
    def selection(self) -> Selection:
        """What the caller asked for with only= and skip=. Parts of dicts that are not
        wanted are not in the nodes; what is live there must stay as it is."""
        ...

    def decode(self, node: Node, target: object, path: str) -> Any:
        """The value of `node`; into `target` where that is a live object or
        container (and returned as the same object), else a new value. New arrays
        hold their bytes only after the restore is done. `NOTHING` = no target."""
        ...

    def spec(self, leaf: int) -> tuple[str, tuple[int, ...]]:
        """(safetensors dtype, shape) of a leaf. Checked: an allocation of this size
        is backed by as many stored bytes."""
        ...

    def same_bytes(self, leaf: int, other: int) -> bool:
        """Whether two leaves of one dtype and shape are known to hold the same bytes."""
        ...

    def request(self, leaf: int, destination: Destination) -> None:
        """Ask for a leaf's bytes."""
        ...

    def finish(self, action: Callable[[], None]) -> None:
        """Run `action` after every byte arrived, in the order of these calls."""
        ...

    def alias(self, key: Hashable) -> dict[str, Any]:
        """As Encoder.alias: one dict per `key` for the whole restore."""
        ...

    def missing(self, path: str, what: str = "") -> None:
        """The live objects need `path`, the checkpoint lacks it."""
        ...

    def unexpected(self, path: str, what: str = "") -> None:
        """The checkpoint has `path`, the live objects do not."""
        ...

    def changed(self, path: str, saved: str, live: str) -> None:
        """Shape or dtype differ: `saved` and `live` like "bfloat16[4096, 1024]"."""
        ...


class Nothing:
    """The type of `NOTHING`."""

    def __repr__(self) -> str:
        return "NOTHING"


NOTHING = Nothing()
"""No live target: decode to a new value."""


Waiting: TypeAlias = tuple[Any, str, dict[str, Node]]
"""(value, path, node) of a value that is encoded together with others. The node is still
empty, but for an "id" if there are references to it."""


class Adapter(Protocol):
    """What `holdfast.<framework>` offers as its module attribute `adapter`."""

    # Besides the verbs below an adapter may have:
    # `mark_common(state, encoder)`: note, before anything is encoded, what all ranks have alike in
    # the entries of a state, in whatever order they stand.
    # `process_group()`: see `frameworks.process_group`.
    # `claims(value)`: whether `value`, of a class of the program's own, is this framework's.
    # `state_node(node, target)`: see `frameworks.state_node`.
    # `is_structural(value)`: see `frameworks.is_structural`.
    # `is_replaced(value)`: whether a program replaces such a value at each step, so that to
    # track it, and not to put it into the box, would save the first one over and over.

    name: str
    """Tags of its nodes start with `<name>.`."""

    @property
    def together(self) -> Collection[type]:
        """Exact types of values that hold no others and are encoded by `encode_together`:
        where there are thousands, a call for each would cost most of the capture."""
        ...

    def encode(self, value: object, path: str, encoder: Encoder) -> Node | None:
        """The node of `value`, or None if the type is not this adapter's."""
        ...

    def encode_together(self, waiting: Sequence[Waiting], encoder: Encoder) -> None:
        """Complete the nodes of values whose types are in `together`, in this order.
        Raises as `encode` does."""
        ...

    def decode(self, node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
        """The value of a node with one of this adapter's tags."""
        ...

    def is_live(self, value: object) -> bool:
        """Whether `value` is restored in place (a tensor, a module), so that the
        checkpoint lacking it is an error and not simply a shorter container."""
        ...

    def capture_rng(self) -> dict[str, object]:
        """States of every generator the framework owns, as a tree of plain values
        and arrays. Forces no device synchronisation beyond reading them."""
        ...

    def apply_rng(self, states: dict[str, Any]) -> None:
        """Set them. Devices that are gone are left out with a warning."""
        ...

    def derived_rng(self, states: dict[str, Any], rank: int) -> dict[str, Any]:
        """Others, made of `states` and `rank` alone (see `core.rng.derived_rng`). Sets nothing."""
        ...
