"""`holdfast.json`: which run it is, from its first moment on."""

from __future__ import annotations

import secrets
from typing import NamedTuple

from holdfast.core.address import printable
from holdfast.core.records import RunInfo
from holdfast.errors import CorruptionError, NoStore, OtherRun, StoredWrong, StoreError
from holdfast.repo import keys
from holdfast.repo.log import logger
from holdfast.repo.repo import Repo


class Identity(NamedTuple):
    """Which run a process is about to write."""

    run: str
    is_new: bool
    """There was no `holdfast.json`, no log and no checkpoint, and this process has made the
    first of them."""
    spoiled: RunInfo | None
    """What `holdfast.json` was to hold, where this process has made it and it arrived wrong."""


def ensure_info(repo: Repo, parent: str, copy_of: RunInfo | None) -> Identity:
    """Make `holdfast.json` where it is missing. Never replaces one: what is not readable may
    be of a later format.

    One that arrives wrong is no obstacle: its key is taken, so nobody else can begin the run,
    and the first log entry will say which it is. `mend_info` then puts it right.
    """
    run = copy_of.run if copy_of else secrets.token_hex(8)
    created_s = (copy_of.created_s if copy_of else 0.0) or repo.clock()
    is_new = False
    try:
        info = repo.info()
        check_run(info.run, copy_of, repo.address)
        if info.created_s:
            return Identity(info.run, False, None)
        run = info.run  # as the log has it
    except NoStore:
        is_new = True
    except CorruptionError:
        pass  # only checkpoints are left, or it is damaged
    info = RunInfo(run=run, created_s=created_s, parent=parent)
    try:
        if repo.put_info(info):
            return Identity(run, is_new, None)
    except StoredWrong:
        return Identity(run, is_new, info)
    repo.store.settle(keys.RUN_INFO)
    run = repo.info().run
    check_run(run, copy_of, repo.address)  # another process may have been first
    return Identity(run, False, None)


def mend_info(repo: Repo, info: RunInfo) -> None:
    """Replace the `holdfast.json` that this process has made and that arrived wrong.

    For when the log says which run it is: a delete that comes late can then do no more than
    take away what the log repeats, and the next start puts that back.
    """
    try:
        repo.store.delete([keys.RUN_INFO])
        repo.put_info(info)
    except StoreError as error:
        logger.warning(
            "%s: %s did not arrive as it was sent, and could not be written again; the run goes "
            "by its log. Delete %s, and the next start writes it: %s",
            printable(repo.address),
            keys.RUN_INFO,
            keys.RUN_INFO,
            error.message,
        )


def check_run(run: str, copy_of: RunInfo | None, address: str) -> None:
    """Raise OtherRun unless the run with this id is a copy of `copy_of`, if one is wanted."""
    if copy_of is not None and run != copy_of.run:
        raise OtherRun(
            f"{address} holds another run ({run}, not {copy_of.run})",
            hint="A copy goes to an address of its own: name one where there is no run yet.",
        )
