"""Where a run's mirror is, as its writers wrote it down for whoever looks at the run.

Nothing else goes by it: a writer copies to the mirror that its program names.
"""

from __future__ import annotations

from holdfast.core.records import MirrorInfo
from holdfast.core.sealed import seal, unseal
from holdfast.core.types import MiB
from holdfast.errors import DamagedObject, ObjectNotFound
from holdfast.repo import keys
from holdfast.repo.repo import Repo


def remember(repo: Repo, epoch: int, address: str) -> None:
    """Write down, as the writer of `epoch`, that the mirror is at `address`. It holds no
    secret: no address does."""
    noted = _noted(repo)
    if noted and _address(repo, noted[-1]) == address:
        return
    _, data = seal(MirrorInfo(run=repo.info().run, address=address))
    repo.store.put_new(keys.mirror_key(epoch), [data])
    repo.store.delete(keys.mirror_key(older) for older in noted if older < epoch)


def remembered(repo: Repo) -> str:
    """The mirror's address; "" if the run never had one."""
    noted = _noted(repo)
    return _address(repo, noted[-1]) if noted else ""


def _noted(repo: Repo) -> list[int]:
    found = (keys.mirror_epoch(info.key) for info in repo.store.list(keys.MIRRORS))
    return sorted(epoch for epoch in found if epoch is not None)


def _address(repo: Repo, epoch: int) -> str:
    key = keys.mirror_key(epoch)
    try:
        return unseal(repo.store.get(key, max_bytes=MiB), MirrorInfo, key)[1].address
    except (ObjectNotFound, DamagedObject):
        return ""
