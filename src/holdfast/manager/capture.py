"""From a live state to a snapshot of it, while the training stands still."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from holdfast.core.adapters import LeafSource
from holdfast.core.rng import capture_rng
from holdfast.core.transfers import transport_of
from holdfast.core.tree import TreeEncoder
from holdfast.core.values import collector_paused
from holdfast.manager.restore import RUNTIME
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
) -> Snapshot:
    """The snapshot of `state`, of the position `loop` and, with `rng`, of all random states.

    In the caller's thread, for a user's `state_dict` and a device's queues belong to it: a
    signal's handler may raise in the middle, and what was taken is freed then. `waits`: the caller
    does, and changes nothing before all is read. `unsteady` are paths of leaves that are copied
    in any case. Raises UnsupportedValue, SaveFailed.
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
    )
    try:
        with collector_paused():
            tree = encoder.encode(dict(state), "")
            runtime = encoder.encode({"rng": capture_rng() if rng else {}, "loop": loop}, RUNTIME)
            memory = memories.take()
            leaves, overlap = memory.take(encoder.leaves, choose)
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
    )
