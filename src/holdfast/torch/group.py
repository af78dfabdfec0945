"""torch's default process group, for what ranks tell one another around saves and restores.

A group of its own, over gloo on the CPU, which disturbs no collective of the training and
waits for no device.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from holdfast.core.group import Ranks
from holdfast.errors import GroupError

logger = logging.getLogger("holdfast")

_SAY_AFTER = timedelta(seconds=30)
_AT_A_BOUNDARY, _TELLING, _ASKING = range(1, 4)
_MOST_NUMBERS = 6
"""That are reduced at once."""
_made: list[tuple[Any, TorchGroup]] = []
"""The default group, and ours beside it; one at most."""


def process_group() -> TorchGroup | None:
    """Of the default process group; None where there is none, or this process is alone in it.

    The first call is one that all ranks make: it returns when they have. Raises GroupError.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    default = dist.group.WORLD
    if not _made or _made[0][0] is not default:
        _made[:] = [(default, TorchGroup())]
    return _made[0][1]


class TorchGroup:
    """Implements core.group.Group."""

    def __init__(self) -> None:
        self.ranks = Ranks(dist.get_rank(), dist.get_world_size())
        store: Any = dist.distributed_c10d._get_default_store()
        self._await_all(store)
        # As long as the program lets ranks wait for one another: one may evaluate alone for hours.
        timeout = max(store.timeout, dist.default_pg_timeout)
        try:
            self._group: Any = dist.new_group(backend="gloo", timeout=timeout)
        except RuntimeError as error:
            raise _failed(error, hint=_after_restart()) from error

    def _await_all(self, store: Any) -> None:
        """Nobody knows whether the others come here, too: it is said for whom this waits."""
        names = [f"holdfast/{rank}" for rank in range(self.ranks.size)]
        store.set(names[self.ranks.rank], "here")
        left_s = store.timeout.total_seconds()
        while True:
            try:
                store.wait(names, _SAY_AFTER)
                return
            except RuntimeError as error:  # DistStoreError, of torch's newer versions, is one
                left_s -= _SAY_AFTER.total_seconds()
                absent = [rank for rank, name in enumerate(names) if not store.check([name])]
                if not absent:
                    return
                who = f"rank {', '.join(map(str, absent[:10]))}{', …' * (len(absent) > 10)}"
                if left_s <= 0:
                    raise GroupError(
                        f"{who} did not come to this run",
                        hint="Make it on every rank, or pass group=False to a Run of one rank.",
                    ) from error
                logger.warning("waiting for %s to make this run, too", who)

    def broadcast(self, value: object) -> Any:
        self._begin(_TELLING)()
        data = msgspec.msgpack.encode(value) if self.ranks.rank == 0 else b""
        size = torch.tensor([len(data)])
        try:
            dist.broadcast(size, 0, group=self._group)
            body = _tensor(data, int(size))
            dist.broadcast(body, 0, group=self._group)
        except RuntimeError as error:
            raise _failed(error) from error
        return msgspec.msgpack.decode(body.numpy().tobytes())

    def gather(self, value: object) -> list[Any]:
        self._begin(_ASKING)()
        data = msgspec.msgpack.encode(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.ranks.size)]
        try:
            dist.all_gather(sizes, torch.tensor([len(data)]), group=self._group)
            lengths = [int(size) for size in sizes]
            longest = max(lengths)
            bodies = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
            dist.all_gather(bodies, _tensor(data, longest), group=self._group)
        except RuntimeError as error:
            raise _failed(error) from error
        parts = zip(bodies, lengths, strict=True)
        return [msgspec.msgpack.decode(body.numpy()[:length].tobytes()) for body, length in parts]

    def highest_later(self, numbers: Sequence[int]) -> Callable[[], list[int]]:
        return self._begin(_AT_A_BOUNDARY, numbers)

    def _begin(self, kind: int, numbers: Sequence[int] = ()) -> Callable[[], list[int]]:
        """A reduction. Whatever ranks do begins with one of the same length, so that those that
        do different things find that out: collectives of two kinds wait for each other."""
        rest = [0] * (_MOST_NUMBERS - len(numbers))
        values = torch.tensor([kind, -kind, *numbers, *rest], dtype=torch.int64)
        try:
            work: Any = dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group, async_op=True)
        except RuntimeError as error:
            raise _failed(error) from error

        def result() -> list[int]:
            try:
                work.wait()
            except RuntimeError as error:
                raise _failed(error) from error
            highest, lowest, *found = values.tolist()
            if highest != -lowest:
                raise GroupError(
                    "the ranks do different things: some are at a boundary of a loop, and some at "
                    "a start, an evaluation or the end"
                    if -lowest == _AT_A_BOUNDARY
                    else "the ranks do different things at a start, an evaluation or the end",
                    hint="What one of them calls all call, run.evaluate, too: not behind "
                    "`if rank == 0`.",
                )
            return found[: len(numbers)]

        return result


def _tensor(data: bytes, length: int) -> torch.Tensor:
    """As bytes, and zeros up to this length."""
    memory = np.zeros(length, np.uint8)
    memory[: len(data)] = np.frombuffer(data, np.uint8)
    return torch.from_numpy(memory)


def _failed(error: RuntimeError, *, hint: str = "") -> GroupError:
    return GroupError(
        f"the ranks cannot be reached: {error}",
        hint=hint or "One of them has ended or stands still: its own output says why.",
    )


def _after_restart() -> str:
    """What to do where torchrun has started this group once more with the store of the one before,
    in which the addresses of processes still are that have ended (pytorch issue 135712)."""
    elastic = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if not elastic or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return ""
    return (
        "A restart by torchrun finds what the processes before it have left in its store: set "
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, or let `holdfast run` start it again."
    )
