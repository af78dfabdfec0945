"""What a run's writers write down about its mirror.

Where it is, is for whoever looks at the run: a writer copies to the mirror that its program
names. What is still to come from it is for the next start, if this process is killed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from holdfast.core.records import Coming, MirrorInfo
from holdfast.core.sealed import seal, unseal
from holdfast.core.types import MiB
from holdfast.errors import DamagedObject, ObjectNotFound
from holdfast.repo import keys
from holdfast.repo.check import MANIFEST_MAX_BYTES
from holdfast.stores.base import Store

if TYPE_CHECKING:
    from holdfast.repo.repo import Repo


def remember(repo: Repo, epoch: int, address: str) -> None:
    """Write down, as the writer of `epoch`, that the mirror is at `address`. It holds no
    secret: no address does."""
    noted = _noted(repo.store)
    if noted and _address(repo.store, noted[-1]) == address:
        return
    _, data = seal(MirrorInfo(run=repo.info().run, address=address))
    repo.store.put_new(keys.mirror_key(epoch), [data])
    repo.store.delete(keys.mirror_key(older) for older in noted if older < epoch)


def remembered(store: Store) -> str:
    """The mirror's address; "" if the run in this store never had one."""
    noted = _noted(store)
    return _address(store, noted[-1]) if noted else ""


def _noted(store: Store) -> list[int]:
    found = (keys.mirror_epoch(info.key) for info in store.list(keys.MIRRORS))
    return sorted(epoch for epoch in found if epoch is not None)


def _address(store: Store, epoch: int) -> str:
    key = keys.mirror_key(epoch)
    try:
        return unseal(store.get(key, max_bytes=MiB), MirrorInfo, key)[1].address
    except (ObjectNotFound, DamagedObject):
        return ""


def expect(repo: Repo, epoch: int, ids: Iterable[str]) -> None:
    """Write down, as the writer of `epoch`, that these checkpoints are to be brought back from
    the mirror. Raises what stores raise."""
    _, data = seal(Coming(run=repo.info().run, ids=tuple(ids)))
    repo.store.put_new(keys.coming_key(epoch), [data])


def expected(repo: Repo) -> tuple[str, ...]:
    """Those that the last one who brought any was to bring; none if that is done. What cannot
    be read says nothing."""
    noted = _coming(repo)
    if not noted:
        return ()
    key = keys.coming_key(noted[-1])
    try:
        return unseal(repo.store.get(key, max_bytes=MANIFEST_MAX_BYTES), Coming, key)[1].ids
    except (ObjectNotFound, DamagedObject):
        return ()


def expect_no_more(repo: Repo) -> None:
    """All that was to come is here."""
    repo.store.delete(map(keys.coming_key, _coming(repo)))


def _coming(repo: Repo) -> list[int]:
    found = (keys.coming_epoch(info.key) for info in repo.store.list(keys.MIRRORS))
    return sorted(epoch for epoch in found if epoch is not None)
