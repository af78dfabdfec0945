"""Metrics for checkpoints that are there already: a function is called for each of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, cast

from holdfast.core.choosing import Choice
from holdfast.core.group import Group
from holdfast.core.records import Manifest
from holdfast.errors import (
    CheckpointNotFound,
    CheckpointRemoved,
    CorruptionError,
    DamagedObject,
    UsageError,
    briefly,
)
from holdfast.manager.info import CheckpointInfo
from holdfast.manager.live_state import LiveState
from holdfast.manager.loaded import LoadedCheckpoint
from holdfast.manager.ranks import each, told
from holdfast.manager.reader import ChunkReader
from holdfast.manager.restore import Restorer, Wish
from holdfast.manager.restoring import Restoring
from holdfast.repo.keys import manifest_id, pack_of

logger = logging.getLogger("holdfast")

Function: TypeAlias = Callable[[LoadedCheckpoint], Any]
"""Gives a number, or {name: number}."""

Around: TypeAlias = Callable[[list[CheckpointInfo]], Iterable[CheckpointInfo]]
"""What stands around the loop over the checkpoints."""


@dataclass(frozen=True)
class Evaluation:
    """What became of one checkpoint in `evaluate`."""

    info: CheckpointInfo
    """The checkpoint, with all its metrics as of now."""
    outcome: Literal["evaluated", "known", "damaged", "removed"]
    """"known": it had the metrics already. "removed": by another process, meanwhile."""
    metrics: Mapping[str, float]
    """Those that were asked for."""
    why: str = ""
    """What is damaged."""


class Evaluating(Restoring):
    """A manager's `evaluate`."""

    @briefly
    def evaluate(
        self,
        fn: Function,
        checkpoints: Choice = "all",
        *,
        metric: str | Sequence[str] | None = None,
        into: MutableMapping[str, Any] | None = None,
        again: bool = False,
        strict: bool = True,
        rename: Mapping[str, str] | None = None,
        allow_pickle: bool = False,
    ) -> list[Evaluation]:
        """Call `fn` for each of the checkpoints and add the metrics that it gives to them.

        `fn` gets the checkpoint as `holdfast.open` gives it and returns a number, whose metric
        is called as `metric` says, else as the function is; or {name: number}. With `into`,
        names and live objects as for `restore`, each checkpoint's state is in these objects
        when `fn` is called. When all is done, or something was raised, they hold what they held
        before, bit for bit; so do all random states, which are the same at each call.
        `checkpoints` as for `choose`; oldest first.

        Each result is committed at once, so that what is killed goes on where it was: a
        checkpoint that has the metrics is not evaluated again unless `again` says so. (Name them
        in `metric` if `fn` gives several: else it takes one call to learn what they are.) A
        damaged checkpoint is named, loudly, and left out. Safe beside a live writer of the run
        in another process, and beside other evaluations. Returns one Evaluation for each.

        Of a `group` all ranks call it, and each calls `fn`, with its part of the state in its
        objects; what `fn` returns on rank 0 counts. Where it raises on one rank, all raise.

        Raises UsageError if what `fn` returns is no metric; what `fn` raises, with a note that
        names the checkpoint; StructureMismatch; CheckpointNotFound, NoStore, BadAddress.

        >>> import holdfast
        >>> with holdfast.CheckpointManager("memory://evaluated") as ckpts:
        ...     for step in (1, 2, 3):
        ...         _ = ckpts.save(step, {"w": [1.0 * step]}).result()
        ...     done = ckpts.evaluate(lambda c: abs(c["w"][0] - 2), metric="distance")
        ...     [e.metrics for e in done], ckpts.best("distance").step
        ([{'distance': 1.0}, {'distance': 0.0}, {'distance': 1.0}], 2)
        """
        chosen = self.chosen_together(checkpoints)

        def load(checkpoint: LoadedCheckpoint) -> None:
            if into is not None:
                wish = Wish(
                    into,
                    strict=strict,
                    only=tuple(into),
                    rename=dict(rename or {}),
                    allow_pickle=allow_pickle,
                    rng=False,
                )
                self.put_into(checkpoint.info.id, wish)
            live.begin()

        opened = partial(self.load, allow_pickle=allow_pickle)
        with LiveState({} if into is None else into, allow_pickle=allow_pickle) as live:
            evaluator = Evaluator(self, fn, metric, opened, load, again=again, group=self._group)
            return evaluator.run(chosen)

    def chosen_together(self, checkpoints: Choice) -> list[CheckpointInfo]:
        """As `choose`. Of several ranks the first one does it, and all of them have the same."""
        if self._group is None:
            return self.choose(checkpoints)
        ids = told(self._group, lambda: [info.id for info in self.choose(checkpoints)])
        return each(self._group, lambda: [self.info(id) for id in ids])

    def reader_of(self, id: str) -> tuple[Manifest, ChunkReader]:
        """The manifest of a checkpoint, and what reads its bytes. Raises DamagedObject."""
        record = self._resolve(id)
        repo = self._nearest(self._distrusted)
        manifest = repo.manifest(record)
        return manifest, ChunkReader(repo, record, manifest)

    def put_into(self, id: str, wish: Wish) -> None:
        """As `restore`, of this checkpoint, and nothing but that: it is no start of a run, and
        no base for what is saved next."""
        record = self._resolve(id)
        repo = self._nearest(self._distrusted)
        Restorer(
            repo,
            self.address,
            self._find,
            self._distrusted,
            self._told,
            lambda manifest: None,
            self._group,
        ).restore(record, wish)


class Evaluator:
    """Evaluates checkpoints of one run, one after another."""

    def __init__(
        self,
        run: Restoring,
        fn: Function,
        metric: str | Sequence[str] | None,
        open_one: Callable[[str], LoadedCheckpoint],
        load: Callable[[LoadedCheckpoint], None],
        *,
        again: bool = False,
        around: Around = lambda infos: infos,
        say: Callable[[str], None] = logger.info,
        group: Group | None = None,
    ) -> None:
        """`load` brings a checkpoint to where `fn` looks for it. With a `group` all ranks do the
        same: what rank 0 knows and finds counts, and errors of one are errors of all."""
        self._group = group
        self._run = run
        self._fn = fn
        self._own = _name_of(fn)
        self._names: tuple[str, ...] | None = None
        """What `fn` gives; None as long as that is not known."""
        if metric is not None:
            self._names = (metric,) if isinstance(metric, str) else tuple(metric)
            if not self._names:
                raise UsageError("metric=() names no metric", hint='metric="test_acc"')
        self._again = again
        self._open = open_one
        self._load = load
        self._around = around
        self._say = say

    def run(self, infos: Sequence[CheckpointInfo]) -> list[Evaluation]:
        """What became of each, in this order."""
        done: dict[str, Evaluation] = {}
        for number, info in enumerate(self._around(self._in_order(infos)), 1):
            done[info.id] = evaluation = self._one(info)
            if evaluation.outcome == "evaluated":
                values = " ".join(f"{name} {x:.4g}" for name, x in evaluation.metrics.items())
                self._say(f"{info.ref}: {values} ({number} of {len(infos)})")
        return [done[info.id] for info in infos]

    def _in_order(self, infos: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """As they are; but if it is not known what metrics come, first one that lacks most: of an
        evaluation that was interrupted it is one that was not reached."""
        order = list(infos)

        def first() -> int:
            if self._names is None and order and not any(map(self._knows, order)):
                return order.index(min(order, key=lambda i: len(i.metrics)))
            return 0

        place = told(self._group, first)
        return [*order[place : place + 1], *order[:place], *order[place + 1 :]]

    def _knows(self, info: CheckpointInfo) -> bool:
        names = self._names if self._names is not None else (self._own,)
        return all(name in info.metrics for name in names)

    def _one(self, info: CheckpointInfo) -> Evaluation:
        try:
            checkpoint = self._opened(info)
            if (known := self._known(checkpoint.info)) is not None:
                return Evaluation(checkpoint.info, "known", known)
            values = self._call(checkpoint)
            amended = each(self._group, lambda: self._run.log_metrics(info.id, values))
            return Evaluation(amended, "evaluated", values)
        except _Damaged as damage:
            logger.error("%s is damaged and was not evaluated:\n  %s", info.ref, damage)
            return Evaluation(info, "damaged", {}, str(damage))
        except (CheckpointRemoved, CheckpointNotFound):
            if told(self._group, lambda: self._is_there(info)):
                raise  # what `fn` looked for is another one
            logger.warning("%s was removed before it was evaluated", info.ref)
            return Evaluation(info, "removed", {})

    def _known(self, info: CheckpointInfo) -> dict[str, float] | None:
        """Its metrics, if it need not be evaluated."""

        def find() -> dict[str, float] | None:
            if not self._knows(info) or self._again:
                return None
            return {name: info.metrics[name] for name in self._names or (self._own,)}

        return told(self._group, find)

    def _is_there(self, info: CheckpointInfo) -> bool:
        try:
            self._run.info(info.id)
        except CheckpointNotFound:
            return False
        return True

    def _opened(self, info: CheckpointInfo) -> LoadedCheckpoint:
        """As it is now: another process may have removed or evaluated it meanwhile."""
        try:
            return each(self._group, lambda: self._open(info.id))
        except CorruptionError as error:
            raise _Damaged(_why(error)) from error

    def _call(self, checkpoint: LoadedCheckpoint) -> dict[str, float]:
        try:
            each(self._group, lambda: self._load(checkpoint))
        except CorruptionError as error:
            raise _Damaged(_why(error)) from error
        except Exception as error:
            error.add_note(f"while {checkpoint.info.ref} was loaded to be evaluated")
            raise

        def call() -> Any:
            try:
                return self._fn(checkpoint)
            except DamagedObject as error:
                if _is_object(error.key) and not checkpoint.holds(error.key):
                    raise _Elsewhere(error) from error
                raise

        try:
            found = each(self._group, call)
        except CorruptionError as error:
            raise _Damaged(_why(error)) from error
        except _Elsewhere as elsewhere:
            elsewhere.error.add_note(f"while {checkpoint.info.ref} was evaluated")
            raise elsewhere.error from None
        except Exception as error:
            error.add_note(f"while {checkpoint.info.ref} was evaluated")
            raise
        numbers = told(self._group, lambda: self._numbers(found, checkpoint.info.ref))
        self._names = self._names or tuple(numbers)
        return numbers

    def _numbers(self, found: Any, ref: str) -> dict[str, float]:
        if isinstance(found, Mapping):
            values = {str(k): v for k, v in cast(Mapping[Any, Any], found).items()}
            if not values:
                raise UsageError(f"{ref}: the function gave no metric", hint=_HINT)
        else:
            names = self._names or ((self._own,) if self._own else ())
            if len(names) != 1:
                raise UsageError(
                    f"{ref}: the function gave one value, "
                    + (f"not {', '.join(names)}" if names else "and nothing says what it is"),
                    hint='Name it: evaluate(fn, metric="test_acc").' if not names else _HINT,
                )
            values = {names[0]: found}
        if missing := [name for name in self._names or () if name not in values]:
            raise UsageError(
                f"{ref}: the function gave {', '.join(values)}, and no {', '.join(missing)}",
                hint=_HINT,
            )
        return {name: _number(name, value, ref) for name, value in values.items()}


class _Damaged(Exception):
    """The checkpoint that is evaluated is."""


class _Elsewhere(Exception):
    """What `fn` has read besides is damaged."""

    def __init__(self, error: DamagedObject) -> None:
        super().__init__(error.brief)
        self.error = error


def _why(error: CorruptionError) -> str:
    return error.brief if isinstance(error, DamagedObject) else error.message


_HINT = 'A number, or {"name": number} with all that `metric` names.'


def _name_of(fn: Function) -> str:
    """What its metric is called if nothing says otherwise; "" if that is no name."""
    name = getattr(fn, "__name__", "")
    return name if isinstance(name, str) and name.isidentifier() else ""


def _number(name: str, value: Any, ref: str) -> float:
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(
            f"{ref}: metric {name!r} is not a number: a {type(value).__name__}", hint=_HINT
        ) from None


def _is_object(key: str) -> bool:
    """Whether it is the key of an object: messages about what a tree says have other words."""
    return bool(pack_of(key) or manifest_id(key))
