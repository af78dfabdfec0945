"""`Mirrored`: what a manager does about its run's mirror, and about forks."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from holdfast.core.address import printable
from holdfast.core.group import Group
from holdfast.errors import HoldfastError, briefly
from holdfast.manager.info import CheckpointInfo, info_of
from holdfast.manager.listing import Listing
from holdfast.manager.lookup import Ref
from holdfast.repo import keys
from holdfast.repo.fork import fork
from holdfast.repo.repo import Repo
from holdfast.stores.base import Store
from holdfast.stores.open import open_store

if TYPE_CHECKING:
    from holdfast.manager.mirror import Mirror
    from holdfast.manager.mirror_options import MirrorOptions
    from holdfast.manager.node_disks import NodeDisk
    from holdfast.repo.nearest import NearestRepo

logger = logging.getLogger("holdfast")


class Mirrored(Listing):
    """A run of this process, with or without a mirror. Without one it is a `Listing`."""

    @briefly
    def __init__(
        self,
        address: str | os.PathLike[str],
        *,
        keep: str | None,
        store: Store | None,
        clock: Callable[[], float],
        take_over: bool,
        mirror: str | os.PathLike[str] | None = None,
        mirror_keep: str | None = None,
        mirror_bandwidth: int | str | None = None,
        mirror_wait: float | str | None = None,
    ) -> None:
        super().__init__(address, keep=keep, store=store, clock=clock)
        self._take_over = take_over
        self._lock = threading.RLock()
        self._mirror: Mirror | None = None
        self._node_disk: NodeDisk | None = None
        options = self._options(mirror, mirror_keep, mirror_bandwidth, mirror_wait)
        if options is not None:
            from holdfast.manager.mirror import Mirror

            self._mirror = Mirror(self._repo, options, take_over=take_over, clock=clock)
        self._looked = self._mirror is None
        """What there is of the run in this place or in its mirror is in this place."""
        self._near: NearestRepo | None = None
        self._brought: frozenset[str] = frozenset()

    def _options(
        self,
        mirror: str | os.PathLike[str] | None,
        keep: str | None,
        bandwidth: int | str | None,
        wait: float | str | None,
    ) -> MirrorOptions | None:
        if (mirror, keep, bandwidth, wait) == (None, None, None, None):
            return None  # and nothing of it is imported
        from holdfast.manager.mirror_options import mirror_options

        return mirror_options(self.address, self.policy, mirror, keep, bandwidth, wait)

    def _divide_over_nodes(self, group: Group) -> None:
        """Where the address is another folder on each node, the run is its mirror from now on.
        All ranks call it, before anything is read. Raises UsageError, GroupError."""
        mirror = self._mirror
        if mirror is None:
            return
        from holdfast.manager.node_disks import find_node_disk
        from holdfast.repo.nearest import TieredRepo

        disk = find_node_disk(group, self._repo, mirror.options, self.policy)
        if disk is not None:
            self._repo = TieredRepo(disk.store, clock=self._clock)
            self.policy = mirror.options.keep
            self._node_disk, self._mirror, self._looked = disk, None, True

    @property
    def on_node_disks(self) -> bool:
        """Whether each node has a disk of its own, and the checkpoints are in the mirror."""
        return self._node_disk is not None

    @property
    def mirror(self) -> str:
        """The mirror's address; "" without one."""
        if self._node_disk is not None:
            return self._node_disk.store.address
        return self._mirror.address if self._mirror is not None else ""

    def brought_back(self, id: str) -> bool:
        """Whether this process found the checkpoint in the mirror only."""
        return id in self._brought or self.on_node_disks

    def not_mirrored(self) -> list[int]:
        """Steps of the checkpoints that are to be in the mirror and are not, as far as is
        known, newest first."""
        if self._mirror is None:
            return []
        try:
            return [record.step for record in reversed(self._mirror.missing())]
        except HoldfastError:
            return []  # `close` says so

    def wait_mirrored(self, timeout_s: float | None = None) -> bool:
        """Block until the mirror has every checkpoint that it is to have, with its tags and
        metrics of now. False after `timeout_s` seconds, or if it is not used any more."""
        return self._mirror is not None and self._mirror.wait(timeout_s)

    def fork(self, ref: Ref, address: str | os.PathLike[str]) -> CheckpointInfo:
        """Start a new run at `address` from a checkpoint, sharing its data.

        The checkpoint stays pinned here until the new run no longer needs it.
        """
        child = Repo(open_store(os.fspath(address)), clock=self._clock)
        try:
            return info_of(os.fspath(address), fork(self._repo, self._resolve(ref), child))
        finally:
            child.close()

    def _is_run(self) -> bool:
        self._bring_back()
        return super()._is_run()

    def _bring_back(self) -> None:
        """Where the run lists nothing, have what its mirror has. Once."""
        if self._looked:
            return
        with self._lock:
            self._check_usable()
            if self._looked or self._mirror is None:
                return
            from holdfast.manager import recovery

            start = time.perf_counter()
            nothing = recovery.lists_nothing(self._repo)
            bring = recovery.bring_back if nothing else recovery.go_on
            self._brought = bring(self._repo, self.mirror, self.policy, take_over=self._take_over)
            if nothing:
                recovery.bring_results(self._repo, self.mirror)
            if self._brought:
                logger.info(
                    "%s: %d checkpoint(s) brought back from %s in %.1f s",
                    printable(self.address),
                    len(self._brought),
                    printable(self.mirror),
                    time.perf_counter() - start,
                )
            self._looked = True

    def _nearest(self, distrusted: set[str]) -> Repo:
        """The run for a restore: what is damaged here is read from the mirror, and repaired
        afterwards. Packs of which something was damaged are added to `distrusted`."""
        mirror = self._mirror
        if mirror is None:
            return self._repo
        from holdfast.repo.nearest import NearestRepo

        def damaged(key: str) -> None:
            if name := keys.pack_of(key):
                distrusted.add(name)
            mirror.mend(key)

        with self._lock:
            if self._near is None:
                store = self._repo.store
                self._near = NearestRepo(store, mirror.store, damaged, clock=self._clock)
            return self._near

    def _start_mirror(self, epoch: int) -> None:
        """This process writes the run from now on."""
        if self._mirror is not None:
            self._mirror.start(epoch)

    def _to_mirror(self) -> None:
        """The list has changed."""
        if self._mirror is not None:
            self._mirror.expect()
            self._mirror.wake()

    def _new_to_mirror(self, id: str, tell: Callable[[], None]) -> None:
        """A new checkpoint is listed. `tell` whoever waits for it: they may wait for the mirror
        next, which must know by then that there is something to do."""
        if self._mirror is not None:
            self._mirror.expect(id)
        tell()
        if self._mirror is not None:
            self._mirror.wake()
        elif self._node_disk is not None:
            self._node_disk.tidy(self._repo)

    def results_changed(self) -> None:
        """Results of calls were stored, which the mirror is to have, too."""
        self._to_mirror()

    def _spared(self) -> str:
        return "" if self._mirror is None else self._mirror.spared()

    def hurry_mirror(self) -> None:
        """The program is about to end: what is copied from now on is not put behind others."""
        if self._mirror is not None:
            self._mirror.hurry()

    def finish_mirror(self, timeout_s: float) -> list[int]:
        """No save follows: what is copied from now on has no limit. Returns when all is there,
        or after `timeout_s`: steps that are still to be copied, newest first, for which `close`
        waits; none if the mirror is not used any more."""
        if self._mirror is None:
            return []
        self._mirror.finish()
        self._mirror.wait(timeout_s)
        return [] if self._mirror.is_over else self.not_mirrored()

    def _close_mirror(self) -> None:
        if self._mirror is not None:
            self._mirror.close()
        if self._near is not None:
            self._near.close_copy()
