"""Feeds: iterables that can be put back to where a run left them.

A feed hands out the items of one loader, epoch after epoch. `state()` says at a step
boundary where it is; `open(state)` in another process brings an equal loader there
without handing out anything twice, and where it can without loading what was consumed.

How exact that is, and at what cost, depends on the loader: see docs/data.md. This module
has what all feeds share; `iterables` and the frameworks' `data` modules have the kinds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any, Literal, Protocol, runtime_checkable

from holdfast.core.group import ALONE, Ranks
from holdfast.core.rng import derived_rng
from holdfast.errors import LoaderInterrupted as LoaderInterrupted
from holdfast.errors import LoopError
from holdfast.run.console import plural
from holdfast.run.dealing import ranks_in
from holdfast.run.held import Held
from holdfast.run.random_states import RandomStates

logger = logging.getLogger("holdfast")

Policy = Literal["refuse", "restart-epoch", "by-sample"]
"""What to do where a loader was changed and the run was inside an epoch of it."""

TOGETHER = "the loop takes items of several loaders together"
"""Why batches of a new size would not belong together; dealt out anew they still do."""


class Feed(Protocol):
    """One loader, iterated over epoch by epoch. Used by one thread."""

    name: str
    """For messages."""
    held: list[Held]
    """What its loaders keep between epochs, where that is found in their attributes."""
    moves: bool
    """A loader itself is at a place that lasts: an iterator, one with a `state_dict`."""

    def open(self, saved: dict[str, Any] | None, *, fixed: str = "") -> bool:
        """Begin an epoch (None), or go to where `state()` was called.

        A saved place inside an epoch: the global random states are moved; the caller
        sets those of the save afterwards. A saved place at an epoch's end: nothing
        is iterated, `take` raises StopIteration, and a following `open(None)` begins
        the next epoch as the saved run would have begun it.

        If the loader has changed and the run was inside an epoch, by policy the epoch
        goes on by sample (True, as above), or begins anew from the random states it
        began with (False; the caller leaves those alone). Otherwise LoopError. `fixed`:
        why it cannot go on by sample here, whatever the policy.

        The state may be that of another rank, and the number of ranks another one than
        at the save: between epochs always, inside one where the loader deals out one order
        to all ranks (docs/data.md). Else policy and errors are as above.
        """
        ...

    def take(self) -> Any:
        """The next item; StopIteration at the end. LoaderInterrupted: a worker died,
        nothing was handed out and `state()` is still that of the last boundary."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the feed is, as a plain tree; at any time outside `take`."""
        ...

    def length(self) -> int | None:
        """Items in an epoch, where that is known."""
        ...

    def close(self) -> None:
        """End the epoch, here if it is not at its end: drop the iterator and stop its
        workers, except those that are to persist between epochs. `state()` (now that of
        an epoch's end) and `open` may be called afterwards."""
        ...

    def shutdown(self) -> None:
        """Also stop workers that persist. `open` starts them again."""
        ...

    def inherit(self, before: Any) -> None:
        """The program has built its loader anew: `before` is the feed of the last one.
        Called before the first `open`."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """A loader that knows its own position."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


def describe(loader: object) -> str:
    """A loader's type for messages."""
    return type(loader).__qualname__


class BaseFeed:
    """What all feeds share: where in an epoch we are, and whether the loader changed."""

    kind = ""

    def __init__(self, loader: Any, *, policy: Policy = "refuse") -> None:
        self.name = describe(loader)
        self.held: list[Held] = []
        self.moves = False
        self.random = RandomStates()
        """Of what the start of an epoch draws from."""
        self.ranks: Callable[[], Ranks] = lambda: ALONE
        """Those of the run, which are known when an epoch is opened."""
        self.loader = loader
        self._policy: Policy = policy
        self._tell: list[object] = []
        """What in the loader may say whose part of the data it deals."""
        self._whose = ALONE  # the items of the epoch in progress
        self._at: Literal["new", "inside", "end"] = "new"
        self._taken = 0
        self._identity: dict[str, Any] = {}  # of the epoch in progress
        self._begun = False
        self._lasts: bool | None = None
        """Whether the program uses one loader for several epochs, where that was seen."""

    # -- for subclasses ----------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Facts of the loader that must not change inside an epoch."""
        return {"type": self.name, "length": self.length()}

    def length(self) -> int | None:
        try:
            return len(self.loader)
        except (TypeError, NotImplementedError):
            return None

    def whose(self) -> Ranks:
        """Whose part of the data the items are, and of how many: as the loader says, else
        that of this process in the run."""
        return ranks_in(*self._tell) or self.ranks()

    def _undealt(self, saved: dict[str, Any]) -> str:
        """Why the rest of the saved epoch cannot be dealt out to another number of ranks;
        "" if it can."""
        return (
            "each rank has data or an order of its own, and where the others were is not known here"
        )

    def _dealt(self) -> str:
        """The rest of the epoch was dealt out to another number of ranks: in words what that
        means; "" if nothing is to be said."""
        return ""

    def _rewind(self, saved: dict[str, Any]) -> None:
        """Bring what the loader keeps to where it was when the saved epoch began."""

    def _begin(self) -> None:
        """Record what a replay of this epoch needs, and start to iterate."""
        raise NotImplementedError

    def _prepare(self, saved: dict[str, Any]) -> list[str]:
        """Bring the loader to the beginning of the saved epoch. Returns changes that
        forbid to go on inside it."""
        raise NotImplementedError

    def _resume(self, saved: dict[str, Any]) -> None:
        """After `_prepare`: start to iterate and skip `self._taken` items."""
        raise NotImplementedError

    def _settle(self, saved: dict[str, Any]) -> None:
        """Bring the loader to the end of the saved epoch. If the program builds it anew
        in each epoch (`self._lasts` is False), only what it shares with the last one."""

    def _fixed_because(self, saved: dict[str, Any]) -> str:
        """Why a changed loader cannot go on by sample inside the saved epoch; "" if it can."""
        return (
            "only a DataLoader over a dataset with indices, with batches of one size, tells "
            "which samples an item has"
        )

    def _regroup(self, saved: dict[str, Any]) -> str:
        """Go on inside the saved epoch behind the samples that were taken, with the loader
        as it is now, where `_fixed_because` allows it. Returns in words what that means."""
        raise NotImplementedError

    def _share(self, before: Any) -> list[str]:
        """Compare what is kept between epochs with that of the feed `before`, of this
        kind. Returns what a resume put back wrongly."""
        return []

    def _next(self) -> Any:
        raise NotImplementedError

    def _record(self) -> dict[str, Any]:
        """What `_prepare` or `_settle` needs."""
        raise NotImplementedError

    def _drop(self) -> None:
        """Forget the iterator."""

    def _ended(self) -> None:
        """The epoch is over: at its end, or left early."""

    def left(self, saved: dict[str, Any]) -> int | None:
        """Items of the saved epoch that are left for each of the ranks that there are now; None
        where that is not known, or cannot be dealt out to them. Iterates over nothing."""
        return None

    # -- Feed --------------------------------------------------------------------

    def open(self, saved: dict[str, Any] | None, *, fixed: str = "") -> bool:
        self._drop()
        if saved is None or saved.get("at") == "new":
            self._start()
            return True
        self._identity = self.identity()
        self._whose = self.whose()
        self._lasts = saved.get("lasts")
        ranks = self._other_ranks(saved)
        if saved["at"] == "end":
            changes = self._changes(saved, besides=("batches", "length") if ranks else ())
            if changes:
                logger.warning("%s changed since the last epoch: %s", self.name, "; ".join(changes))
            self._at, self._taken = "end", int(saved["taken"])
            if saved.get("kind") == self.kind and saved["identity"]["type"] == self.name:
                self._settle(saved)
            return True
        if ranks:
            half = "" if fixed == TOGETHER else fixed
            if why := half or self._undealt(saved):
                return self._cannot_deal(saved, ranks, why)
        changes = self._changes(saved, besides=("batches",) if ranks else ())
        if not changes:
            changes = self._prepare(saved)
        if changes:
            return self._go_on(saved, [*([ranks] if ranks else []), *changes], fixed)
        self._at, self._taken = "inside", int(saved["taken"])
        self._begun = True
        self._resume(saved)
        if ranks and self._whose.rank == 0 and (words := self._dealt()):
            logger.warning("%s: %s, inside an epoch. %s.", self.name, ranks, words)
        return True

    def take(self) -> Any:
        if self._at != "inside":
            raise StopIteration
        try:
            item = self._next()
        except StopIteration:
            self._at = "end"
            self._ended()
            self._drop()
            raise
        self._taken += 1
        return item

    def state(self) -> dict[str, Any]:
        if self._at == "new":
            return {"kind": self.kind, "at": "new", "taken": 0}
        return {
            "kind": self.kind,
            "at": self._at,
            "taken": self._taken,
            "identity": self._identity,
            "ranks": {"rank": self._whose.rank, "size": self._whose.size},
            "lasts": self._lasts,
            **self._record(),
        }

    def close(self) -> None:
        if self._at == "inside":
            self._at = "end"
            self._ended()
        self._drop()

    def shutdown(self) -> None:
        self.close()

    def inherit(self, before: Any) -> None:
        if not isinstance(before, BaseFeed):
            self._lasts = False
            return
        # One that had lasted was exchanged: another that lasts, for all we know.
        self._lasts = None if before._lasts else False
        if type(before) is type(self) and (wrong := self._share(before)):
            logger.warning(
                "%s is built anew in each epoch, which nobody could know when the run was resumed "
                "after the first one: %s went on where the last one had ended. The epoch before "
                "this one may have had another order than in a run that was not stopped.",
                self.name,
                ", ".join(wrong),
            )

    # -- the loader has changed --------------------------------------------------

    def _start(self) -> None:
        if self._begun:
            self._lasts = True
        self._begun = True
        self._at, self._taken = "inside", 0
        self._identity = self.identity()
        self._whose = self.whose()
        self._begin()

    def _changes(self, saved: dict[str, Any], *, besides: Collection[str] = ()) -> list[str]:
        if saved.get("kind") != self.kind:
            return [f"the kind of loader was {saved.get('kind')!r}, is {self.kind!r}"]
        was, now = saved["identity"], self._identity
        return [
            f"{key} was {was.get(key)!r}, is {now.get(key)!r}"
            for key in dict.fromkeys([*was, *now])
            if was.get(key) != now.get(key) and key not in besides
        ]

    # -- the number of ranks has changed -----------------------------------------

    def _other_ranks(self, saved: dict[str, Any]) -> str:
        """In words that the items were dealt to another number of ranks; "" if not. (Old
        checkpoints do not say it.)"""
        before = saved.get("ranks", {}).get("size", self._whose.size)
        if before == self._whose.size:
            return ""
        return f"the number of ranks was {before}, is {self._whose.size}"

    def _of_another(self, saved: dict[str, Any]) -> bool:
        """Whether the state is that of a rank which dealt with another part of the data."""
        return saved.get("ranks", {}).get("rank", self._whose.rank) != self._whose.rank

    def _own_rng(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The random states in which the saved epoch began; if those are another rank's, some
        of this one's own."""
        rng: dict[str, Any] = saved["rng"]
        return derived_rng(rng, self._whose.rank) if self._of_another(saved) else rng

    def _cannot_deal(self, saved: dict[str, Any], ranks: str, why: str) -> bool:
        if int(saved["taken"]) == 0 or self._policy == "restart-epoch":
            if self._whose.rank == 0:
                logger.warning("%s: %s. The epoch begins anew.", self.name, ranks)
            if saved.get("rng") is not None:
                self.random.apply(self._own_rng(saved))
            self._rewind(saved)
            self._start()
            return False
        before = saved["ranks"]["size"]
        raise LoopError(
            f"{self.name}: {ranks}, and the run stopped inside an epoch of it "
            f"({plural(saved['taken'], 'item')} taken on each). It cannot go on there: {why}",
            hint=f"Start it on {plural(before, 'rank')} for the rest of this epoch, or run that "
            'epoch again from its start: Run(..., data="restart-epoch"). A DataLoader with '
            "torch's DistributedSampler, on one rank, too, goes on on any number of ranks.",
        )

    def _go_on(self, saved: dict[str, Any], changes: list[str], fixed: str) -> bool:
        """The loader has changed inside an epoch: what the policy says. As `open`."""
        what = (
            f"{self.name} changed, and the run stopped inside an epoch of it "
            f"({plural(saved['taken'], 'item')} taken): {'; '.join(changes)}"
        )
        fixed = fixed or self._fixed_because(saved)
        if self._policy == "restart-epoch":
            logger.warning("%s. The epoch begins anew.", what)
            if saved.get("rng") is not None:
                self.random.apply(self._own_rng(saved))
            self._start()
            return False
        if self._policy == "by-sample" and not fixed:
            self._at, self._taken = "inside", int(saved["taken"])
            self._begun = True
            logger.warning("%s. %s.", what, self._regroup(saved))
            return True
        ways = ["Put it back as it was for the rest of this epoch"]
        if self._policy == "by-sample":
            what += f". It cannot go on by sample: {fixed}"
        elif not fixed:
            ways.append('go on behind the samples that were taken: Run(..., data="by-sample")')
        ways.append('run that epoch again from its start: Run(..., data="restart-epoch")')
        raise LoopError(what, hint=f"{', '.join(ways[:-1])}, or {ways[-1]}.")
