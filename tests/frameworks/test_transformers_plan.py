"""Where a Trainer goes on if an epoch has other numbers of steps than before."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from holdfast.errors import LoopError
from holdfast.transformers.plan import Here, Place, Plan, Sizes, planned


def saved(
    place: Place, made: int, *, of: int, per_epoch: int, inside: bool = True, beyond: int = 0
) -> dict[str, Any]:
    return {
        "place": list(place),
        "ranks": [0, of],
        "steps_per_epoch": per_epoch,
        "beyond": beyond,
        "state": {"global_step": made},
        "data": {"feed": {"at": "inside" if inside else "end"}},
    }


def left(count: int | None) -> Any:
    return lambda feed: count


ALONE, TWO = Sizes(3, 12, 36), Sizes(3, 6, 18)


def test_as_many_ranks_go_on_at_the_same_place() -> None:
    here = Here(2, 1, 6, by_steps=False)
    assert planned(None, TWO, here, left(None)) == Plan(Place(), 3, 18)
    for place, inside in ((Place(1, 2), True), (Place(2), False)):
        made = 6 * place.epoch + place.step
        found = planned(saved(place, made, of=2, per_epoch=6, inside=inside), TWO, here, left(None))
        assert found == Plan(place, 3, 18)
    # Epochs that were ended early: the Trainer counts as if they had not been.
    found = planned(saved(Place(2), 5, of=2, per_epoch=6, inside=False), TWO, here, left(None))
    assert found == Plan(Place(2), 3, 18)


def test_more_and_fewer_ranks() -> None:
    state = saved(Place(1, 2), 8, of=2, per_epoch=6)
    found = planned(state, ALONE, Here(1, 1, 12, by_steps=False), left(8))
    assert found == Plan(Place(1, 4), 3, 8 + 8 + 12, beyond=8 - 16)
    # Killed once more before the next epoch, and on two ranks again.
    state = saved(Place(1, 6), 10, of=1, per_epoch=12, beyond=-8)
    assert planned(state, ALONE, Here(1, 1, 12, by_steps=False), left(None)).steps == 28
    found = planned(state, TWO, Here(2, 1, 6, by_steps=False), left(3))
    assert found == Plan(Place(1, 3), 3, 10 + 3 + 6, beyond=1)


def test_between_epochs() -> None:
    state = saved(Place(1), 12, of=1, per_epoch=12, inside=False)
    assert planned(state, TWO, Here(2, 1, 6, by_steps=False), left(None)) == Plan(
        Place(1), 3, 12 + 12, beyond=6
    )
    # Of one process, too, when its batches are larger from here on.
    assert planned(state, TWO, Here(1, 1, 6, by_steps=False), left(None)).steps == 24


def test_a_number_of_steps_takes_as_many_epochs_as_it_takes() -> None:
    state = saved(Place(1, 2), 14, of=1, per_epoch=12)
    found = planned(state, Sizes(4, 6, 20), Here(2, 1, 6, by_steps=True), left(5))
    assert found == Plan(Place(1, 1), 3, 20, beyond=7)
    state = saved(Place(1, 2), 8, of=2, per_epoch=6)
    found = planned(state, Sizes(2, 12, 20), Here(1, 1, 12, by_steps=True), left(8))
    assert found == Plan(Place(1, 4), 3, 20, beyond=-8)


def test_the_end_of_an_epoch_that_nothing_is_left_of() -> None:
    state = saved(Place(1, 5), 11, of=2, per_epoch=6)
    found = planned(state, Sizes(3, 4, 12), Here(3, 1, 4, by_steps=False), left(0))
    assert found == Plan(Place(2), 3, 11 + 4, beyond=3)


def test_whole_steps() -> None:
    state = saved(Place(1, 2), 8, of=2, per_epoch=6)
    found = planned(state, Sizes(3, 6, 18), Here(1, 2, 12, by_steps=False), left(8))
    assert found == Plan(Place(1, 2), 3, 18)
    with pytest.raises(LoopError, match=r"each of 1 has 8 items left of it.*steps=5"):
        planned(state, Sizes(3, 3, 9), Here(1, 5, 12, by_steps=False), left(8))


def test_data_without_a_length() -> None:
    state = saved(Place(1), 8, of=2, per_epoch=20, inside=False)
    sizes = Sizes(sys.maxsize, 20, 20)
    found = planned(state, sizes, Here(1, 1, None, by_steps=True), left(None))
    assert found == Plan(Place(1), sys.maxsize, 20)
