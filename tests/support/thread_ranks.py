"""Ranks as threads of one process: quick, and ended at any place like the others."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import pytest

from holdfast.core.group import Ranks
from holdfast.errors import GroupError
from holdfast.repo import together

_T = TypeVar("_T")
_WAIT_S = 60.0


class Meeting:
    """What the ranks have given, exchange by exchange."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.given: defaultdict[int, dict[int, bytes]] = defaultdict(dict)
        self.ended: set[int] = set()


class ThreadGroup:
    """Implements core.group.Group for one of several threads; see `run_ranks`."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.ranks = Ranks(rank, meeting.size)
        self._meeting = meeting
        self._count = 0

    def _exchange(self, value: object) -> list[Any]:
        self._count += 1
        return self._await(self._give(value))

    def _give(self, value: object) -> dict[int, bytes]:
        meeting = self._meeting
        with meeting.changed:
            given = meeting.given[self._count]
            given[self.ranks.rank] = msgspec.msgpack.encode(value)
            meeting.changed.notify_all()
        return given

    def _await(self, given: dict[int, bytes]) -> list[Any]:
        meeting = self._meeting

        def over() -> bool:
            return len(given) == meeting.size or bool(meeting.ended.difference(given))

        with meeting.changed:
            if not meeting.changed.wait_for(over, _WAIT_S) or len(given) < meeting.size:
                raise GroupError("another rank has ended")
        return [msgspec.msgpack.decode(given[rank]) for rank in range(meeting.size)]

    def broadcast(self, value: object) -> Any:
        return self._exchange(value)[0]

    def gather(self, value: object) -> list[Any]:
        return self._exchange(value)

    def highest_later(self, numbers: Sequence[int]) -> Callable[[], list[int]]:
        self._count += 1
        given = self._give(list(numbers))
        return lambda: [max(column) for column in zip(*self._await(given), strict=True)]


def run_ranks(size: int, work: Callable[[ThreadGroup], _T]) -> list[_T | BaseException]:
    """Call `work` once for each rank, side by side. What each returned, or raised; whom one that
    has ended does not talk to any more finds that out."""
    meeting = Meeting(size)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadGroup(rank, meeting))
        except BaseException as error:
            results[rank] = error
        with meeting.changed:
            meeting.ended.add(rank)
            meeting.changed.notify_all()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * _WAIT_S)
        assert not thread.is_alive(), "a rank hangs"
    return results


def all_ranks(size: int, work: Callable[[ThreadGroup], _T]) -> list[_T]:
    """As `run_ranks`, where none may raise."""
    results = run_ranks(size, work)
    errors = [result for result in results if isinstance(result, BaseException)]
    # The first cause, not what the others made of it.
    errors.sort(key=lambda error: isinstance(error, GroupError))
    if errors:
        raise errors[0]
    return results  # pyright: ignore[reportReturnType]


@contextmanager
def waiting(seconds: float) -> Iterator[None]:
    """How long ranks wait for one another's shares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "WAIT_S", seconds)
        yield
