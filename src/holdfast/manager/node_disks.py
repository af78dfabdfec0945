"""Ranks whose disks are their nodes' own, with a mirror that all of them reach.

No node can commit what the others have on theirs. So the run is the mirror: saves are committed
there, and each node keeps what its ranks have written on its own disk as well, from where it is
restored; what other nodes have written comes from the mirror.
"""

from __future__ import annotations

import os
import secrets

from holdfast.core.address import printable, shell_word
from holdfast.core.group import Group
from holdfast.core.records import MirrorInfo
from holdfast.core.retention import KeepPolicy, not_wanted
from holdfast.core.sealed import seal
from holdfast.errors import HoldfastError, NoStore, OtherRun, UsageError
from holdfast.manager.mirror_options import MirrorOptions
from holdfast.manager.ranks import each
from holdfast.repo import keys
from holdfast.repo.head import packs_of
from holdfast.repo.log import logger
from holdfast.repo.repo import Repo
from holdfast.stores.addresses import real_address
from holdfast.stores.base import Store
from holdfast.stores.local import LocalStore
from holdfast.stores.open import open_store
from holdfast.stores.tiered import TieredStore

FOLDER = "node"
"""In the run's folder: what this node keeps."""


class NodeDisk:
    """This rank's part of its node's disk."""

    def __init__(self, store: TieredStore, keep: KeepPolicy, *, first: bool) -> None:
        """`keep`: whose packs stay on the disk. `first`: of the ranks of this node."""
        self.store = store
        self._keep = keep
        self._first = first

    def tidy(self, repo: Repo) -> None:
        """After a commit, once for each node: what no checkpoint needs that `keep` names leaves
        the disk."""
        if not self._first:
            return
        try:
            records = repo.records()
        except HoldfastError as error:
            logger.debug("%s is not tidied: %s", self.store.near.address, error.message)
            return
        unwanted = set(not_wanted(records, self._keep))
        packs = packs_of(record for record in records if record.id not in unwanted)
        self.store.trim(set(map(keys.pack_key, packs)))


def find_node_disk(
    group: Group, local: Repo, options: MirrorOptions, keep: KeepPolicy
) -> NodeDisk | None:
    """None if all ranks see the folder of `local`. All ranks call it, and before anything is
    read. Raises UsageError, on all of them, where what is on a disk must not be passed over, or
    for what cannot be done so; GroupError."""
    if not isinstance(local.store, LocalStore):
        return None
    seen = _who_sees(group, local.store)
    if all(count == group.ranks.size for count in group.gather(len(seen))):
        return None
    store = open_store(options.address)

    def enter() -> None:
        _check(local, Repo(store), options)
        _note(local, options.address)

    try:
        each(group, enter)
    except HoldfastError:
        store.close()
        raise
    near = LocalStore(os.path.join(real_address(local.address), FOLDER))
    return NodeDisk(TieredStore(near, store, keys.PACKS), keep, first=seen[0] == group.ranks.rank)


def _who_sees(group: Group, store: Store) -> list[int]:
    """The ranks that see the same store as this one, itself among them, in their order."""
    token = group.broadcast(secrets.token_hex(8))
    names = [f"{keys.MIRRORS}{token}-{rank}" for rank in range(group.ranks.size)]
    own = names[group.ranks.rank]
    each(group, lambda: store.put_new(own, [b"here"]))
    seen = [rank for rank, name in enumerate(names) if _is_there(store, name)]
    group.gather(None)  # all have looked
    store.delete([own])
    return seen


def _is_there(store: Store, key: str) -> bool:
    try:
        store.size(key)
    except HoldfastError:
        return False
    return True


def _check(local: Repo, mirror: Repo, options: MirrorOptions) -> None:
    """Raise what speaks against going on from the mirror on this node: that it was told to copy
    slowly, or that its disk has a checkpoint that is newer."""
    if options.bytes_per_s is not None:
        raise UsageError(
            f"{printable(local.address)} is another folder on each node, and mirror_bandwidth= "
            "would hold up the saves, which are made in the mirror then",
            hint="Leave it out, or give all nodes a folder that they share.",
        )
    try:
        run, mine = local.info().run, local.newest(1)
    except NoStore:
        return
    if not mine:
        return
    here, there = printable(local.address), printable(options.address)
    try:
        other, newest = mirror.info().run, mirror.newest(1)
    except NoStore:
        other, newest = run, ()
    if other != run:
        raise OtherRun(
            f"{there} is the mirror of another run than that in {here}",
            hint="Give the run another address, or another mirror=.",
        )
    if not newest or newest[0].ordinal < mine[0].ordinal:
        raise UsageError(
            f"the nodes go on from {there}, and step {mine[0].step:,} is only in {here}",
            hint=f"holdfast sync {shell_word(here)} {shell_word(there)}",
        )


def _note(local: Repo, address: str) -> None:
    """So that whoever looks into this folder learns where the run is."""
    info = MirrorInfo(run="", address=real_address(open_store(address).address))
    local.store.put_new(keys.mirror_key(1), [seal(info)[1]])
