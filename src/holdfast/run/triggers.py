"""When a boundary becomes a save: the schedule, a metric that is among the best, a wish.

`Triggers` answers with the reason, which becomes the checkpoint's note. Clocks and
metrics are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from holdfast.core.interval import AutoInterval, parse_mtbf, parse_overhead
from holdfast.core.retention import KeepPolicy, Leaders
from holdfast.core.schedule import Schedule, parse_every
from holdfast.errors import HoldfastError, LoopError, UsageError
from holdfast.run.metrics import read
from holdfast.run.stalls import Stalls, stalls_of


class Triggers:
    """Decides at each boundary. `records` are the run's checkpoints, asked for once."""

    def __init__(
        self,
        schedule: Schedule,
        policy: KeepPolicy,
        records: Callable[[], Iterable[Any]],
        auto: AutoInterval | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.schedule = schedule
        self._auto = auto if schedule.auto else None
        self._say = say
        self._stalls = Stalls()
        self._start_s = 0.0
        self._policy = policy
        self._watched = {rule.metric for rule in policy.best}
        self._records = records
        self._leaders: Leaders | None = None
        self._wanted = ""
        self._held = ""
        self._last_step: int | None = None
        self._last_s = 0.0

    def start(self, step: int | None, now_s: float) -> None:
        """Training starts: from the checkpoint at `step`, or from nothing."""
        self._last_step = step
        self._last_s = self._start_s = now_s

    def learn(self, events: Callable[[], Iterable[Any]]) -> None:
        """Before the first step: what the run's history says about saves and failures of
        earlier processes, if it matters. Asks for it once."""
        if self._auto is None:
            return
        from holdfast.manager.goodput import failures

        try:
            found = list(events())
        except HoldfastError:
            return  # nothing depends on a history
        if line := self._auto.learn(failures(found), stalls_of(found)):
            self._say(line)

    def check(self, loops: Iterable[str]) -> None:
        """Raises LoopError if a rule never comes true in loops of these kinds."""
        if self.schedule.epoch and "epochs" not in loops:
            raise LoopError(
                'every="epoch" needs a loop over run.epochs(n), and this one is in none',
                hint="Put `for epoch in run.epochs(n):` around it, or give an interval: "
                'every="10min" or every=500.',
            )

    def want(self, reason: str) -> None:
        """Ask for a save at the next boundary. From any thread."""
        self._wanted = reason

    def improves(self, metrics: Mapping[str, Any]) -> bool:
        """Whether fresh metrics would put a checkpoint among the best.

        Only metrics that a `best` rule names are read, so others cost no device wait.
        """
        if self._watched.isdisjoint(metrics):
            return False
        watched = read({name: metrics[name] for name in self._watched & metrics.keys()})
        if self._leaders is None:
            self._leaders = Leaders(self._policy.best, self._records())
        return self._leaders.admit(watched)

    def wish(self) -> str:
        """What this rank was asked to save for, where others may not have been; passed on by
        this. "" for nothing."""
        wanted, self._wanted = self._wanted, ""
        return wanted

    def due_by_clock(self, step: int, now_s: float, *, epoch_end: bool) -> str:
        """Why to save because of the time; for the rank whose clock counts."""
        auto_s = None
        if self._auto is not None:
            auto_s = self._interval(self._auto, now_s, regular=not epoch_end)
        last_step, last_s = self._last_step, self._last_s
        return self.schedule.by_clock(step, now_s, last_step, last_s, auto_s) or ""

    @property
    def holds(self) -> bool:
        """Whether a save is due, and waits for the loop around to go on."""
        return bool(self._held)

    def due_by_step(self, step: int, wanted: str, *, epoch_end: bool, last: bool) -> str:
        """As `due`, of what is the same on all ranks: `wanted` is what they have agreed on."""
        by_step = self.schedule.by_step(step, self._last_step, epoch_end)
        self._held = wanted or self._held or by_step or ""
        return "" if last else self._held

    def due(self, step: int, now_s: float, *, epoch_end: bool, last: bool) -> str:
        """Why to save now; "" for no save.

        `last`: no item follows in this loop, so the save is held until the loop around
        it goes on, and then includes what its tail does.
        """
        by_clock = self.due_by_clock(step, now_s, epoch_end=epoch_end)
        by_step = self.schedule.by_step(step, self._last_step, epoch_end)
        self._held = self.wish() or self._held or by_step or by_clock
        return "" if last else self._held

    def _interval(self, auto: AutoInterval, now_s: float, *, regular: bool) -> float:
        """What `auto` stands for, after the saves that are durable by now."""
        for cost_s, takes_s in self._stalls.boundary(now_s, regular=regular):
            if line := auto.spent(cost_s, takes_s, now_s - self._start_s):
                self._say(line)
        return auto.seconds

    def spent(self, stats: Any) -> None:
        """What a save of this process has cost, as its event says; once it is durable."""
        if self._auto is not None:
            self._stalls.durable(stats)

    def saved(self, step: int, now_s: float) -> None:
        """A save was taken at this boundary."""
        self._stalls.begun(now_s)
        self._last_step = step
        self._last_s = now_s
        self._held = ""

    def committed(self, record: Any) -> None:
        """A save is in the store; it now competes for best."""
        if self._leaders is not None:
            self._leaders.add(record)

    def amended(self) -> None:
        """Metrics were added to checkpoints that are in the store: they compete anew."""
        self._leaders = None

    @property
    def best_metric(self) -> tuple[str, str] | None:
        """The first `best` rule's metric and mode."""
        return self._policy.default_best


def auto_interval(
    every: int | str | None, mtbf: float | str | None, overhead: float | str
) -> AutoInterval | None:
    """What `every="auto"` stands for; None if `every` says something else. Raises BadPolicy,
    and UsageError for an `mtbf` that nothing would look at."""
    budget = parse_overhead(overhead)
    if parse_every(every).auto:
        return AutoInterval(None if mtbf is None else parse_mtbf(mtbf), budget)
    if mtbf is not None:
        raise UsageError(
            f"mtbf={mtbf!r} is about every='auto', not about every={every!r}",
            hint='Write every="auto", or leave mtbf out.',
        )
    return None
