"""`every="auto"`: how long to train between two saves.

A save costs the training C seconds, and a failure loses what was done since the newest
durable checkpoint. Saving more often costs more of the first and less of the second. With
failures that come at random, M seconds apart on average, least is lost with about
sqrt(2 C M) seconds between two saves (Young 1974); Daly's formula of higher order (2006)
is used, which also holds where C is no small part of M.

Two things do not matter for the choice, since they are lost once per failure however often
one saves: the time of a restart (Daly), and the time from a capture until it is durable, during
which the training goes on and the checkpoint before it is the newest (Vaidya 1997). So C is what
the training *loses* to a save, not how long the save takes; but a save that begins before the last
one has ended waits for it, so that the interval is no shorter than a save takes.

Pure: costs, failures and times are arguments.

- J. W. Young, "A first order approximation to the optimum checkpoint interval",
  Communications of the ACM 17(9), 1974.
- J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps",
  Future Generation Computer Systems 22(3), 2006.
- N. H. Vaidya, "Impact of checkpoint latency on overhead ratio of a checkpointing scheme",
  IEEE Transactions on Computers 46(8), 1997.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from holdfast.core.units import format_interval, format_seconds, parse_duration
from holdfast.errors import BadPolicy

DAY_S = 86400.0
FIRST_S = 30.0
"""Until the first save, which tells what one costs."""
SHORTEST_S = 10.0
"""Each save is also a few requests, an entry in the log and wear of the disk."""
LONGEST_S = 3600.0
"""The failure rate is a guess, and a bug of the program is a failure, too. It costs little: a save
per hour is within a budget of 1 % if it takes less than 36 s."""
_OWN_TIMES = 1.5  # that a save which takes longer than most still ends before the next one
_PRIOR_COUNT = 0.5
_PRIOR_OBSERVED_S = DAY_S / 2
_FASTEST_S = 1.0  # of failures and budgets: keeps every quotient finite
_MOST_S = 1e12
_RECENT = 7  # saves: what they cost has changed when four of them say so
_STAYS = 0.1  # a choice that differs by less is not worth a change
_SAID = 0.25  # nor by less than this a line
_SAVES_PER_LINE = 5  # nor are the first estimates a line each


@dataclass(frozen=True)
class Failures:
    """How often a run has lost work, and for how long it was watched."""

    count: int = 0
    observed_s: float = 0.0

    @property
    def mtbf_s(self) -> float:
        """Mean time between failures: that of a run which was not watched is a day.

        The mean of the rate, given what was seen, with a Gamma prior of shape 1/2 (Jeffreys'
        for a Poisson process: it weighs as little as half a failure) and half a day, for a
        mean of one failure per day. A wrong guess costs little: one that is wrong by a factor
        of four makes the interval wrong by two, and the loss 1.25 times the least.

        >>> seen = Failures(), Failures(0, 86400), Failures(24, 86400)
        >>> [round(failures.mtbf_s / 3600) for failures in seen]
        [24, 72, 1]
        """
        observed_s = _within(self.observed_s) + _PRIOR_OBSERVED_S
        return observed_s / (max(self.count, 0) + _PRIOR_COUNT)


@dataclass(frozen=True)
class Choice:
    """An interval, and what decided it."""

    seconds: float
    """To train between the end of one save's call and the next save."""
    optimum_s: float
    """What cost and failures alone ask for."""
    bound: str = ""
    """What asked for another interval: "budget", "save" (a save takes that long), "shortest",
    "longest"; "" if nothing did."""


def optimum_s(cost_s: float, mtbf_s: float) -> float:
    """Daly's estimate: seconds of training between two saves with the least loss.

    Grows with both arguments. Where a save costs more than twice the time between failures
    it stays at the formula's last value, 8/9 of that time (Daly: the whole of it).

    >>> round(optimum_s(10, 86400)), round(math.sqrt(2 * 10 * 86400))
    (1308, 1315)
    """
    mtbf = _within(mtbf_s, _FASTEST_S)
    z = min(math.sqrt(_within(cost_s) / (2 * mtbf)), 1.0)
    return 2 * mtbf * (z - 2 * z**2 / 3 + z**3 / 9)


def choose(cost_s: float, takes_s: float, mtbf_s: float, budget: float) -> Choice:
    """The interval for saves that cost the training `cost_s` each and take `takes_s` until
    they are durable. No more than `budget` (0.01: 1 %) of the time goes into saves.

    The budget and the time that a save takes win over everything, also over the longest
    interval.

    >>> found = choose(0.2, 2.0, 6 * 3600, 0.01)
    >>> round(found.seconds), found.bound
    (93, '')
    >>> found = choose(3.0, 9.0, 3600, 0.01)
    >>> round(found.seconds), round(found.optimum_s), found.bound
    (297, 145, 'budget')
    """
    cost = _within(cost_s)
    share = min(max(budget, 1e-6), 0.5) if budget == budget else 0.01
    best = optimum_s(cost, mtbf_s)
    chosen, bound = best, ""
    if chosen > LONGEST_S:
        chosen, bound = LONGEST_S, "longest"
    for least, why in (
        (SHORTEST_S, "shortest"),
        (_OWN_TIMES * _within(takes_s), "save"),
        (cost * (1 - share) / share, "budget"),
    ):
        if least > chosen:
            chosen, bound = least, why
    return Choice(chosen, best, bound)


def parse_mtbf(value: float | str) -> float:
    """Seconds in `mtbf=`: "6h", or a number of seconds. Raises BadPolicy.

    >>> parse_mtbf("6h"), parse_mtbf(90)
    (21600.0, 90.0)
    """
    if isinstance(value, str):
        try:
            return parse_duration(value)
        except ValueError as error:
            raise BadPolicy(f"cannot read mtbf={value!r}: {error}", hint='mtbf="6h"') from None
    if isinstance(value, bool) or not _FASTEST_S <= value <= _MOST_S:
        raise BadPolicy(f"mtbf={value!r} is no time between failures", hint='mtbf="6h"')
    return float(value)


class AutoInterval:
    """The interval of a run, as its saves tell what they cost."""

    def __init__(self, mtbf_s: float | None = None, budget: float = 0.01) -> None:
        self.seconds = FIRST_S
        self._mtbf_s = mtbf_s
        self._budget = budget
        self._failures = Failures()
        self._costs: deque[float] = deque(maxlen=_RECENT)
        self._takes: deque[float] = deque(maxlen=_RECENT)
        self._said_s = 0.0
        self._since = 0
        """Saves since a line was said."""

    def learn(self, failures: Failures, saves: Iterable[tuple[float, float]]) -> str:
        """What earlier processes of the run have seen: its failures, and of each save what it
        cost the training and how long it took. Returns as `spent` does."""
        self._failures = failures
        for cost_s, takes_s in saves:
            self._costs.append(_within(cost_s))
            self._takes.append(_within(takes_s))
        return self._choose(0.0) if self._costs else ""

    def spent(self, cost_s: float, takes_s: float, trained_s: float) -> str:
        """A save is durable: what it cost the training, how long it took; and for how long
        this process has trained, without a failure. Returns what there is to say: why the
        interval is what it is, when it is the first one or quite another than was said."""
        self._since += 1
        self._costs.append(_within(cost_s))
        self._takes.append(_within(takes_s))
        return self._choose(trained_s)

    def _choose(self, trained_s: float) -> str:
        seen = Failures(self._failures.count, self._failures.observed_s + _within(trained_s))
        mtbf_s = seen.mtbf_s if self._mtbf_s is None else self._mtbf_s
        # The lower one of two: a first save often costs several times what others do.
        cost_s, takes_s = middle(self._costs), middle(self._takes)
        choice = choose(cost_s, takes_s, mtbf_s, self._budget)
        says = not self._said_s or (
            self._since >= _SAVES_PER_LINE and not _close(choice.seconds, self._said_s, _SAID)
        )
        stays = _close(choice.seconds, self.seconds, _STAYS)
        if choice.bound in ("budget", "save"):  # these are kept, not approached
            stays = stays and choice.seconds <= self.seconds
        if says or not stays:
            self.seconds = choice.seconds
        if not says:
            return ""
        self._said_s, self._since = self.seconds, 0
        given = None if self._mtbf_s is not None else seen
        return explain(choice, cost_s, takes_s, mtbf_s, self._budget, given)


def explain(
    choice: Choice,
    cost_s: float,
    takes_s: float,
    mtbf_s: float,
    budget: float,
    seen: Failures | None = None,
) -> str:
    """`seen`: what the time between failures was estimated from; None if it was given.

    >>> explain(choose(0.2, 2, 21600, 0.01), 0.2, 2, 21600, 0.01)
    'saving every 1 min 33 s (a save costs 200 ms, one failure in 6 h as given; budget 1 %)'
    >>> explain(choose(3, 9, 3600, 0.01), 3, 9, 3600, 0.01, Failures(12, 43200))
    'saving every 4 min 57 s, as the budget of 1 % allows (a save costs 3.00 s, one failure in \
1 h as seen; least is lost with every 2 min 25 s, at 2 %)'
    """
    if seen is None:
        source = "as given"
    elif seen.count or seen.observed_s > DAY_S:
        source = "as seen"
    else:
        source = "until seen otherwise"
    percent = f"{100 * budget:.3g} %"
    why = {
        "": "",
        "budget": f", as the budget of {percent} allows",
        "save": f", as a save takes {format_seconds(takes_s)}",
        "shortest": ", the shortest interval",
        "longest": ", the longest interval",
    }[choice.bound]
    last = f"budget {percent}"
    if choice.bound == "budget":
        needs = 100 * cost_s / (cost_s + choice.optimum_s)
        last = f"least is lost with every {format_interval(choice.optimum_s)}, at {needs:.2g} %"
    return (
        f"saving every {format_interval(choice.seconds)}{why} (a save costs "
        f"{format_seconds(cost_s)}, one failure in {format_interval(mtbf_s)} {source}; {last})"
    )


def middle(values: Iterable[float]) -> float:
    """The median; of an even number the lower one of two. (`statistics` is slow to import.)

    >>> middle([5.0, 1.0]), middle([5.0, 1.0, 3.0])
    (1.0, 3.0)
    """
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]


def _close(seconds: float, other_s: float, share: float) -> bool:
    return abs(seconds - other_s) <= share * other_s


_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")


def parse_overhead(value: float | str) -> float:
    """The share in `overhead=`: "1%" or 0.01. Raises BadPolicy.

    >>> parse_overhead("1%"), parse_overhead(0.05)
    (0.01, 0.05)
    """
    hint = 'overhead="1%" or overhead=0.01; at most half of the time.'
    share = value
    if isinstance(value, str):
        if not (match := _PERCENT.fullmatch(value.strip())):
            raise BadPolicy(f"cannot read overhead={value!r}", hint=hint)
        share = float(match[1]) / 100
    if isinstance(share, bool | str) or not 1e-6 <= share <= 0.5:
        raise BadPolicy(f"overhead={value!r} is not between 0.0001 % and 50 %", hint=hint)
    return float(share)


def _within(seconds: float, least: float = 0.0) -> float:
    """A time that sums and quotients stay finite with. What is no number counts as the least."""
    return min(max(seconds, least), _MOST_S) if seconds == seconds else least
