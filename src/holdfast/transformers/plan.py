"""Where a training goes on, in the steps that the Trainer counts now.

The Trainer takes all epochs to have as many steps, and finds the place where it goes on by a
division. On another number of ranks, or with batches of another size from some epoch on, an
epoch has other numbers of steps than those before it. So it is told a place from which as many
steps are left of this epoch as there are, and how many there will be in all.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from holdfast.core.group import Ranks
from holdfast.errors import LoopError
from holdfast.run.console import plural


class Place(NamedTuple):
    """Where the next optimizer step is."""

    epoch: int = 0
    step: int = 0
    """In the epoch, as if all of it had been trained as the rest of it is."""


class Sizes(NamedTuple):
    """What the Trainer finds for its settings and its data, with nothing trained yet."""

    epochs: int
    steps_per_epoch: int
    steps: int
    """In all."""


class Here(NamedTuple):
    """What of this process decides how long an epoch is."""

    ranks: int
    accumulation: int
    batches: int | None
    """Of an epoch, on each rank; None where nobody knows."""
    by_steps: bool
    """`max_steps` was given, and not a number of epochs."""


@dataclass(frozen=True)
class Plan:
    """Of one training."""

    place: Place
    epochs: int
    steps: int
    """In all."""
    beyond: int = 0
    """So many more steps were made than those in front of `place`."""


def planned(
    saved: Mapping[str, Any] | None,
    sizes: Sizes,
    here: Here,
    left: Callable[[Any], int | None],
) -> Plan:
    """`saved` is what a checkpoint holds of `Progress`; None where there is none. `left` tells how
    many batches each rank has left of an epoch that was begun (see `BaseFeed.left`). Raises
    LoopError where the Trainer cannot take them in whole steps."""
    if saved is None:
        return Plan(Place(), sizes.epochs, sizes.steps)
    place, beyond = Place(*saved["place"]), int(saved.get("beyond", 0))
    other_ranks = ranks_of(saved).size != here.ranks
    feed = saved["data"]["feed"] if saved["data"] else {"at": "new"}
    inside = feed["at"] == "inside"
    if other_ranks and inside:
        place = _dealt(place, left(feed), here, ranks_of(saved).size)
    if here.batches is not None and (
        other_ranks or (not inside and saved["steps_per_epoch"] != sizes.steps_per_epoch)
    ):
        made = int(saved["state"]["global_step"])
        beyond = made - place.epoch * sizes.steps_per_epoch - place.step
    epochs, steps = sizes.epochs, sizes.steps
    if not here.by_steps:
        steps += beyond
    elif beyond and epochs < sys.maxsize:
        epochs = math.ceil((steps - beyond) / sizes.steps_per_epoch)
    return Plan(place, epochs, steps, beyond)


def ranks_of(saved: Mapping[str, Any]) -> Ranks:
    """Which rank has saved this, of how many."""
    return Ranks(*saved.get("ranks", (0, 1)))  # one alone, before there were several


def _dealt(place: Place, left: int | None, here: Here, before: int) -> Place:
    if left is None or here.batches is None:
        return place  # the feed will say why it cannot go on
    if left == 0:
        return Place(place.epoch + 1)
    gone = here.batches - left
    if gone % here.accumulation:
        raise LoopError(
            f"the training stopped inside of an epoch on {plural(before, 'rank')}, and each of "
            f"{here.ranks:,} has {plural(left, 'item')} left of it, which the Trainer cannot "
            f"divide into its steps (gradient_accumulation_steps={here.accumulation})",
            hint="For the rest of this epoch start as many ranks as before, or set "
            "gradient_accumulation_steps so that a step has as many samples as before.",
        )
    return Place(place.epoch, gone // here.accumulation)
