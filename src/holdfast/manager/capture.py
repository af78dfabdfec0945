"""From a live state to a snapshot of it, while the training stands still."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from holdfast.core.adapters import LeafSource
from holdfast.core.frameworks import loaded_adapters
from holdfast.core.group import Ranks
from holdfast.core.rng import capture_rng
from holdfast.core.transfers import transport_of
from holdfast.core.tree import TreeEncoder
from holdfast.core.values import collector_paused
from holdfast.manager.restore import RUNTIME
from holdfast.manager.shares import Cut, divide, replicas
from holdfast.manager.snapshot import Snapshot, SnapshotMemories, Way
from holdfast.manager.stored import Digests

InPlace = Callable[[LeafSource, str], bool]
"""Whether the leaf of that source and path stays the same until `CheckpointManager.drain`."""


def capture(
    step: int,
    state: Mapping[str, object],
    loop: object,
    in_place: InPlace | None,
    *,
    waits: bool,
    memories: SnapshotMemories,
    digests: Digests,
    unsteady: set[str],
    allow_pickle: bool,
    clock: Callable[[], float],
    rng: bool = True,
    ranks: Ranks | None = None,
    cut: Cut | None = None,
    own: Callable[[str], bool] | None = None,
    compare: bool = False,
) -> Snapshot:
    """The snapshot of `state`, of the position `loop` and, with `rng`, of all random states.

    In the caller's thread, for a user's `state_dict` and a device's queues belong to it: a
    signal's handler may raise in the middle, and what was taken is freed then. `waits`: the caller
    does, and changes nothing before all is read. `unsteady` are paths of leaves that are copied
    in any case. Of a state that several `ranks` save only what this one writes is taken, in the
    chunks that `cut` makes; paths that are `own` are each rank's, and with `compare` a sample is
    taken of what should be alike on all. Raises UnsupportedValue, SaveFailed.
    """
    marks: dict[str, object] = {}

    def choose(source: LeafSource, path: str) -> Way:
        if path in unsteady or (in_place is None and not waits):
            return Way.COPIED
        if waits or (in_place and in_place(source, path)):
            return Way.LIVE
        marks[path] = mark = source.mark()
        # Of what lies on a device no sample is taken, for which the host would wait.
        blind = transport_of(type(source)) is not None
        unchanged = digests.seems_unchanged(path, mark, proven=blind)
        return Way.UNCHANGED if unchanged else Way.COPIED

    encoder = TreeEncoder(
        allow_pickle=allow_pickle,
        files_in_place=(lambda path: path not in unsteady) if waits else None,
        ranks=ranks,
        own=own,
    )
    try:
        with collector_paused():
            for adapter in loaded_adapters() if ranks is not None else ():
                if (mark := getattr(adapter, "mark_common", None)) is not None:
                    mark(state, encoder)
            tree = encoder.encode(dict(state), "")
            runtime = encoder.encode({"rng": capture_rng() if rng else {}, "loop": loop}, RUNTIME)
            memory = memories.take()
            captured, shares = encoder.leaves, ()
            alike: dict[str, str] = {}
            if ranks is not None and cut is not None:
                alike = replicas(encoder.leaves, ranks) if compare else {}
                captured, shares = divide(encoder.leaves, ranks, cut)
            leaves, overlap = memory.take(captured, choose, shares)
    except BaseException:
        encoder.close()
        raise
    return Snapshot(
        step=step,
        time_s=clock(),
        tree=tree,
        runtime=runtime,
        leaves=leaves,
        overlap=overlap,
        memory=memory,
        marks=marks,
        pickled=encoder.pickled,
        replicas=alike,
    )
