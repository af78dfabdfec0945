"""What the ranks of a run agree on at the boundaries of its loops.

Saves that follow from the step are made by all of them without a word. What one rank alone
knows (the time, a signal, a notice, `run.save()`) travels in a small reduction that is begun
at a boundary and looked at in the next one: training never waits for it, and all do it at the
same step. Where a loop around others goes on, which is rare, it is waited for at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from holdfast.core.group import Group
from holdfast.errors import GroupError


class Agreed(NamedTuple):
    """What at least one rank wants, and therefore all of them do."""

    save: bool
    stop: bool


NOTHING = Agreed(save=False, stop=False)


_LEFT = -1
"""In place of a step: the rank has left its loops."""


class Agreement:
    """Of one rank with the others. Used by the loop's thread."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._count = 0
        self._result: Callable[[], list[int]] | None = None
        """Of the reduction that was begun last."""

    def tell(self, step: int, *, save: bool, stop: bool) -> None:
        """At a boundary, `heard` having been called: tell the others what this rank wants."""
        self._count += 1
        # The highest of a number and of its negative: they are one number only if all agree.
        place = [self._count, -self._count, step, -step]
        self._result = self._group.highest_later([*place, int(save), int(stop)])

    def heard(self) -> Agreed:
        """What was wanted when `tell` was called last. Raises GroupError if the ranks are not
        at the same place."""
        if self._result is None:
            return NOTHING
        most, least, step, other_step, save, stop = self._result()
        self._result = None
        if most != -least or step != -other_step:
            where = f"at steps {-other_step:,} to {step:,}, after {-least:,} to {most:,} bodies"
            if -other_step == _LEFT:
                where = f"one has left it, another one is at step {step:,}"
            raise GroupError(
                f"the ranks are at different places of the loop: {where}",
                hint="All ranks run the same loops with as many batches: DistributedSampler sees "
                "to that.",
            )
        return Agreed(bool(save), bool(stop))

    def leave(self) -> None:
        """The loops are over, on all ranks: nothing is on its way to them any more. Raises
        GroupError if others go on."""
        self.heard()
        self.tell(_LEFT, save=False, stop=False)
        self.heard()
