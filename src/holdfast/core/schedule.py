"""When to save: the `every=` language.

    500, "500", "500 steps"     when a multiple of 500 steps has been passed
    "10min", "90s", "2h", "1d"  when that long has gone by since the last save
    "epoch"                     at each end of an epoch, after its tail
    "auto"                      at the interval of `core.interval`, from what saves cost
    "10min epoch"               whichever comes first
    None                        only at the end

Pure: clocks and steps are arguments. Steps are *completed* steps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from holdfast.core.units import exact_duration, parse_duration
from holdfast.errors import BadPolicy

GRAMMAR = (
    'every: 500 (steps), "10min", "2h", "epoch", "auto", several ("10min epoch"), None (at the end)'
)
_STEPS = re.compile(r"([0-9]{1,18})(steps?)?")


@dataclass(frozen=True)
class Schedule:
    """A parsed `every=`. `str()` gives a text that parses to the same schedule."""

    steps: int | None = None
    seconds: float | None = None
    epoch: bool = False
    auto: bool = False

    @property
    def timed(self) -> bool:
        """Whether a clock decides, so that ranks of one job may disagree."""
        return self.seconds is not None or self.auto

    def due(
        self,
        step: int,
        now_s: float,
        last_step: int | None,
        last_time_s: float,
        epoch_end: bool = False,
        auto_s: float | None = None,
    ) -> str | None:
        """Why a save is due after `step` completed steps ("every=500"), or None.

        `last_step` is the step of the last save or of the checkpoint that was
        restored (None: none yet), `last_time_s` when that was (or the start), on the
        same clock as `now_s`; a monotonic one is best, one that was set back only
        delays. Steps count in multiples from step 0, not from the last save, so that
        a run that was interrupted saves at the same steps as one that was not. `auto_s`
        is the interval that `auto` stands for.

        >>> Schedule(steps=500).due(1000, 0.0, 730, 0.0)
        'every=500'
        """
        by_step = self.by_step(step, last_step, epoch_end)
        return by_step or self.by_clock(step, now_s, last_step, last_time_s, auto_s)

    def by_step(self, step: int, last_step: int | None, epoch_end: bool) -> str | None:
        """What of `due` depends on where the loop is."""
        # After the tail the state may differ from the one saved at the same step.
        if self.epoch and epoch_end:
            return "every=epoch"
        since = last_step or 0
        if self.steps is not None and step > since and step // self.steps > since // self.steps:
            return f"every={self.steps}"
        return None

    def by_clock(
        self,
        step: int,
        now_s: float,
        last_step: int | None,
        last_time_s: float,
        auto_s: float | None,
    ) -> str | None:
        """What of `due` depends on the time."""
        if step <= (last_step or 0):
            return None
        if self.seconds is not None and now_s - last_time_s >= self.seconds:
            return f"every={exact_duration(self.seconds)}"
        if self.auto and auto_s is not None and now_s - last_time_s >= auto_s:
            return "every=auto"
        return None

    def __str__(self) -> str:
        words: list[str] = []
        if self.steps is not None:
            words.append(str(self.steps))
        if self.seconds is not None:
            words.append(exact_duration(self.seconds))
        if self.auto:
            words.append("auto")
        if self.epoch:
            words.append("epoch")
        return " ".join(words)


def parse_every(value: int | str | None) -> Schedule:
    """The schedule that `value` writes down. Raises BadPolicy with the word and the grammar.

    >>> parse_every("10min epoch")
    Schedule(steps=None, seconds=600.0, epoch=True, auto=False)
    """
    if value is None:
        return Schedule()
    if isinstance(value, bool) or not isinstance(value, int | str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise BadPolicy(f"every={value!r} is neither a number of steps nor text", hint=GRAMMAR)
    if isinstance(value, int):
        return Schedule(steps=_steps(str(value), value))
    steps: int | None = None
    seconds: float | None = None
    epoch = auto = False
    words = re.sub(r"(?<=[0-9])\s+(?=steps?\b)", "", value).split()
    if not words:
        raise BadPolicy(f"every={value!r} has no rule", hint=GRAMMAR)
    for word in words:
        if word == "auto":
            twice, auto = auto, True
        elif word == "epoch":
            twice, epoch = epoch, True
        elif match := _STEPS.fullmatch(word):
            twice, steps = steps is not None, _steps(match[1], value)
        else:
            twice = seconds is not None
            try:
                seconds = parse_duration(word)
            except ValueError as error:
                raise BadPolicy(
                    f"cannot read {word!r} in every={value!r}: {error}", hint=GRAMMAR
                ) from None
        if twice:
            raise BadPolicy(f"every={value!r} has two rules like {word!r}", hint=GRAMMAR)
    return Schedule(steps, seconds, epoch, auto)


def _steps(word: str, value: int | str) -> int:
    steps = int(word)
    if steps <= 0:
        raise BadPolicy(f"every={value!r}: steps must be above 0", hint=GRAMMAR)
    return steps
