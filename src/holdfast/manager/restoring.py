"""`Restoring`: what a manager reads of its run, into live objects and beside them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any

from holdfast.core.address import Selector, parse_selector
from holdfast.core.group import Group
from holdfast.core.records import Manifest
from holdfast.errors import briefly
from holdfast.manager.history import History, RestoreEvent
from holdfast.manager.info import Restored, info_of
from holdfast.manager.loaded import LoadedCheckpoint
from holdfast.manager.lookup import Ref
from holdfast.manager.mirrored import Mirrored
from holdfast.manager.overlap import Overlap
from holdfast.manager.restore import Restorer, Wish


class Restoring(Mirrored):
    """A manager's `restore` and `load`."""

    def __init__(self, address: str | os.PathLike[str], **options: Any) -> None:
        super().__init__(address, **options)
        self.history = History(self._repo.store)
        """What saves and restores have cost."""
        self._group: Group | None = None
        """Of the ranks that save and restore together; None: this process does alone."""
        self._overlap: Overlap | None = None
        """Leaves of the save in progress that are read in place."""
        self._base: Manifest | None = None
        """Manifest whose chunks the next save may reuse, with what this rank knows of it."""
        self._distrusted: set[str] = set()
        """Packs in which damage was found: never a source for reuse."""
        self._told: set[str] = set()
        """Checkpoints about whose damage something was logged."""

    @property
    def _is_first(self) -> bool:
        """Whether this process alone changes the list of checkpoints."""
        return self._group is None or self._group.ranks.rank == 0

    @property
    def _saves(self) -> bool:
        """Whether this process writes the run."""
        return False

    def drain(self) -> None:
        """Copy what a save still reads in place; live objects may change when this returns.

        From any thread. Costs nothing where no save reads.
        """
        overlap = self._overlap
        # A forked child has a copy of the lock, perhaps held by a thread that it lacks.
        if overlap is not None and self._pid == os.getpid():
            overlap.drain()

    @briefly
    def restore(
        self,
        into: MutableMapping[str, Any] | None = None,
        ref: Ref = None,
        *,
        strict: bool = True,
        only: Collection[str] = (),
        skip: Collection[str] = (),
        rename: Mapping[str, str] | None = None,
        allow_pickle: bool = False,
        rng: bool = True,
    ) -> Restored | None:
        """Put a checkpoint's state into live objects, every byte verified.

        `into` maps names to live objects, as given to `save`; tensors, modules,
        containers are filled in place, plain values replaced in `into`. Without
        `into` new values are made. Nothing live is touched before the structure was
        accepted. With `ref=None` a damaged checkpoint is skipped with a loud line and
        the newest intact one used; None is returned only where no checkpoint was ever
        committed. `only`, `skip` and `rename` ({"saved": "live"}) take names or path
        prefixes.

        Raises StructureMismatch listing every missing, unexpected and changed leaf;
        UsageError for a path that names nothing; NoIntactCheckpoint; DamagedObject for an
        explicit `ref`; PickleRefused.
        """
        self.drain()
        wish = Wish(
            into=into,
            strict=strict,
            only=only,
            skip=skip,
            rename=dict(rename or {}),
            allow_pickle=allow_pickle,
            rng=rng,
        )
        start = time.perf_counter()
        restored = self._restorer().restore(None if ref is None else self._resolve(ref), wish)
        if restored is not None:
            event = RestoreEvent(
                time_s=self._clock(),
                step=restored.info.step,
                id=restored.info.id,
                total_s=time.perf_counter() - start,
                nbytes=restored.info.nbytes,
            )
            self.history.add(event)
        return restored

    def read_loop(self, ref: Ref = None) -> Restored | None:
        """Position, config and environment of a checkpoint; touches nothing live."""
        return self._restorer().read_loop(None if ref is None else self._resolve(ref))

    def go_on(self, restore: Callable[[Restored], Restored]) -> Restored | None:
        """Call `restore` with what `read_loop` gives of the newest checkpoint; where it raises
        CorruptionError, with the one before it, and so on. Returns what it returns, or None
        where no checkpoint was ever committed.

        For callers whose wishes depend on what the checkpoint holds.
        """
        return self._restorer().go_on(restore)

    def _restorer(self) -> Restorer:
        self._check_usable()
        repo = self._nearest(self._distrusted)
        return Restorer(
            repo,
            self.address,
            self._find,
            self._distrusted,
            self._told,
            self._restored,
            self._group,
        )

    def _restored(self, manifest: Manifest) -> None:
        """What was restored is verified: the best base for reuse, until something is saved."""
        if not self._saves:
            self._base = manifest

    @briefly
    def load(self, ref: Ref = None, *, allow_pickle: bool = False) -> LoadedCheckpoint:
        """The checkpoint as a lazy mapping: each leaf is read when it is asked for."""
        return self.load_selected(parse_selector(ref), allow_pickle=allow_pickle)

    def load_selected(self, selector: Selector, *, allow_pickle: bool = False) -> LoadedCheckpoint:
        """As `load`, for a selector that `core.address` parsed."""
        record = self._select(selector)
        repo = self._nearest(self._distrusted)
        info = info_of(self.address, record)
        return LoadedCheckpoint(repo, record, info, allow_pickle=allow_pickle)
