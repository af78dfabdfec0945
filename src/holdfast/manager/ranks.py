"""What the ranks of a group tell one another, so that all save and restore the same."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from holdfast.core import process
from holdfast.core.group import Group
from holdfast.core.records import Holder
from holdfast.errors import (
    CheckpointNotFound,
    CheckpointRemoved,
    CorruptionError,
    GroupError,
    HoldfastError,
    NoStore,
)
from holdfast.repo.repo import Repo
from holdfast.repo.together import Follower, Leader, Together
from holdfast.repo.writer import Writer

_T = TypeVar("_T")


def each(group: Group | None, work: Callable[[], _T]) -> _T:
    """What `work` returns on this rank, if it went well on all of them. Raises what `agreed`
    makes of errors; one that is none of ours is told to the others before it is raised."""
    found: list[_T] = []
    error = None
    try:
        found.append(work())
    except HoldfastError as problem:
        error = problem
    except Exception as problem:
        agreed(group, GroupError(f"{type(problem).__name__}: {problem}"))
        raise
    if (error := agreed(group, error)) is not None:
        raise error
    return found[0]


def told(group: Group | None, find: Callable[[], Any]) -> Any:
    """What `find` returns on rank 0, on all ranks; it is called there alone. Raises what it
    raises, and on the others GroupError that says so."""
    if group is None:
        return find()
    if group.ranks.rank == 0:
        try:
            value = find()
        except HoldfastError as error:
            group.broadcast({"error": _text(error)})
            raise
        return group.broadcast({"value": value})["value"]
    heard = group.broadcast(None)
    if "error" in heard:
        raise GroupError(f"rank 0: {heard['error'][0]}", hint=heard["error"][1])
    return heard["value"]


def join(group: Group, repo: Repo, open_writer: Callable[[], Writer]) -> Leader | Follower:
    """Rank 0 becomes the run's writer, and the others write their shares for it. Raises what
    `open_writer` does; GroupError on the others."""
    made: list[Leader] = []
    here = process.current()
    processes = [msgspec.convert(each, Holder) for each in group.gather(msgspec.to_builtins(here))]

    def ended(rank: int) -> bool:
        other = processes[rank]
        # Another boot is another machine: two may have one name. None: it cannot be known.
        return other.boot == here.boot and process.is_alive(other) is False

    def lead() -> Any:
        seed = secrets.token_hex(16)
        made.append(Leader(repo, open_writer(), seed, group.ranks.size, ended=ended))
        return msgspec.to_builtins(made[0].together)

    heard = told(group, lead)
    together = msgspec.convert(heard, Together)
    follower = None if made else Follower(repo, together, group.ranks, ended=ended)
    error = agreed(group, None if follower is None else _not_seen(repo, follower.run))
    if error is not None:
        if made:
            made[0].close()
        raise error
    return follower or made[0]


def _not_seen(repo: Repo, run: str) -> HoldfastError | None:
    """Why this rank cannot write a share of that run."""
    try:
        if repo.info().run == run:
            return None
    except NoStore:
        pass
    except HoldfastError as error:
        return error
    return GroupError(
        f"{repo.address} is another place for rank 0 than for another rank",
        hint="All ranks have to reach the same store: a shared folder or a bucket. Where each node "
        "has a disk of its own, give them such a one as mirror=.",
    )


def agreed(group: Group | None, error: HoldfastError | None) -> HoldfastError | None:
    """What all ranks do about an attempt that has ended with `error` on this one: None only if
    it went well on all of them. Where a checkpoint is damaged, or gone, for one of them it is
    for all. Any other error of one is one of all."""
    if group is None:
        return error
    mine = None if error is None else [_kind(error), *_text(error)]
    all_errors: list[Any] = group.gather(mine)
    found = [(rank, *one) for rank, one in enumerate(all_errors) if one is not None]
    if not found:
        return None
    worst = max(kind for _, kind, *_ in found)
    if error is not None and _kind(error) == worst:
        return error
    rank, _, message, hint = next(one for one in found if one[1] == worst)
    make = (CheckpointRemoved, CorruptionError, GroupError)[worst]
    return make(f"rank {rank}: {message}", hint=hint)


def _kind(error: HoldfastError) -> int:
    """How it counts; the highest of all ranks decides."""
    if isinstance(error, CheckpointRemoved | CheckpointNotFound):
        return 0
    return 1 if isinstance(error, CorruptionError) else 2


def _text(error: HoldfastError) -> list[str]:
    return [error.message, error.hint]
