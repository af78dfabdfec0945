"""What iterables keep in their attributes: found, recorded, put back."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from holdfast.run.held import Held
from holdfast.run.values import MAX_ARRAY_BYTES, MAX_ITEMS
from tests.core.tree_harness import roundtrip
from tests.run.feed_checks import plain


class Sampler:
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def held(**attributes: Any) -> tuple[Any, Held]:
    sampler = Sampler(**attributes)
    return sampler, Held({"sampler": sampler}, lambda value: isinstance(value, Sampler))


CHANGES: dict[str, tuple[Any, Any]] = {
    "int": (0, 3),
    "none": (None, 1.5),
    "string": ("a", "b"),
    "list": ([1, 2], [2, 1]),
    "long": (list(range(1000)), list(range(1000, 0, -1))),
    "nested": ({"a": [1], 2: (3, 4)}, {"a": [1, 2], 2: (3, 4), "c": None}),
    "deque": (deque([1, 2], maxlen=4), deque([2, 1, 5], maxlen=4)),
    "array": (np.arange(4), np.arange(4) + 1),
    "scalar": (np.float32(1), np.float32(2)),
    "tensor": (torch.zeros(3), torch.ones(3)),
    "bfloat16": (torch.zeros(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)),
    "empty tensor": (torch.zeros(0), torch.ones(2)),
    "mixed numbers": ([1, 2.5], [2.5, 1]),
    "huge ints": ([2**70], [2**71]),
}


def copied(value: Any) -> Any:
    return roundtrip(value)


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_run_changed_is_put_back(name: str) -> None:
    before, after = CHANGES[name]
    sampler, state = held(value=copied(before))
    sampler.value = copied(after)
    saved = roundtrip(state.state())

    again, other = held(value=copied(before))
    container = again.value
    assert other.restore(saved) == []
    assert plain(again.value) == plain(after)
    if isinstance(before, list | dict | deque):
        assert again.value is container


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_program_changed_is_reported(name: str) -> None:
    before, after = CHANGES[name]
    saved = held(value=copied(before))[1].state()
    again, other = held(value=copied(after))
    (problem,) = other.restore(roundtrip(saved))
    assert problem.startswith("sampler.value ")
    assert plain(again.value) == plain(after)


def test_a_prologue_that_sets_the_saved_value_is_fine() -> None:
    sampler, state = held(epoch=0)
    sampler.epoch = 4
    saved = state.state()
    again, other = held(epoch=4)
    assert other.restore(saved) == []
    assert again.epoch == 4


def test_attributes_that_came_or_went() -> None:
    saved = held(a=1, b=2)[1].state()
    problems = held(b=2, c=3)[1].restore(saved)
    assert sorted(problems) == ["sampler.a is gone", "sampler.c is new"]


def test_what_is_no_plain_data_is_left_alone() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    _, state = held(
        file=open,
        objects=[object()],
        names={"b", "a"},  # the order of a set is another in each process
        dataset=[1, 2],
        cycle=cycle,
        large=np.zeros(MAX_ARRAY_BYTES + 1, np.uint8),
        many=[0.5] * (MAX_ITEMS + 1),
    )
    assert state.state() == {}


def test_nested_objects_are_followed_once() -> None:
    inner = Sampler(epoch=1)
    inner.outer = Sampler(inner=inner)  # type: ignore[attr-defined]
    assert set(held(sampler=inner, same=inner)[1].state()) == {"sampler.sampler.epoch"}


GENERATORS: dict[str, Any] = {
    "random": lambda seed: random.Random(seed),
    "RandomState": lambda seed: np.random.RandomState(seed),
    "PCG64": lambda seed: np.random.default_rng(seed),
    "MT19937": lambda seed: np.random.Generator(np.random.MT19937(seed)),
    "Philox": lambda seed: np.random.Generator(np.random.Philox(seed)),
    "SFC64": lambda seed: np.random.Generator(np.random.SFC64(seed)),
    "torch": lambda seed: torch.Generator().manual_seed(seed),
}


def draw(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return torch.rand(2, generator=generator).tolist()
    return [generator.random() for _ in range(2)]


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_are_put_back(name: str) -> None:
    make = GENERATORS[name]
    sampler, state = held(rng=make(1))
    draw(sampler.rng)
    saved = roundtrip(state.state())
    expected = draw(sampler.rng)
    again, other = held(rng=make(2))
    rng = again.rng
    assert other.restore(saved) == []
    assert again.rng is rng
    assert draw(rng) == expected


def test_another_kind_of_generator_is_reported() -> None:
    saved = held(rng=random.Random(1))[1].state()
    assert held(rng=np.random.default_rng(1))[1].restore(saved) == [
        "sampler.rng is another kind of generator"
    ]
    saved = held(rng=np.random.Generator(np.random.SFC64(1)))[1].state()
    assert held(rng=np.random.default_rng(1))[1].restore(saved) == [
        "sampler.rng is another kind of generator"
    ]


# -- between epochs -----------------------------------------------------------


def two_epochs(make: Any, prologue: Any) -> tuple[dict[str, Any], Any]:
    """The state at the end of the second epoch, and what the third one draws."""
    sampler, state = held(rng=make())
    for epoch in range(2):
        prologue(sampler.rng, epoch)
        state.begin()
        draw(sampler.rng)
        state.end()
    saved = roundtrip(state.state())
    prologue(sampler.rng, 2)
    return saved, draw(sampler.rng)


def seeded(rng: Any, epoch: int) -> None:
    rng.manual_seed(epoch) if isinstance(rng, torch.Generator) else rng.seed(epoch)


def constant(rng: Any, epoch: int) -> None:
    seeded(rng, 0)


def untouched(rng: Any, epoch: int) -> None:
    pass


@pytest.mark.parametrize("prologue", [untouched, seeded, constant])
@pytest.mark.parametrize("name", ["random", "RandomState", "torch"])
def test_generators_go_on_unless_the_program_seeds_them(name: str, prologue: Any) -> None:
    saved, expected = two_epochs(lambda: GENERATORS[name](5), prologue)
    rng = GENERATORS[name](5)
    prologue(rng, 2)  # a feed is made after the prologue
    _, state = held(rng=rng)
    state.settle(saved)
    assert draw(rng) == expected


def test_generators_built_with_another_seed_each_time_go_on() -> None:
    saved, expected = two_epochs(lambda: np.random.default_rng(), untouched)
    rng = np.random.default_rng()
    _, state = held(rng=rng)
    state.settle(saved)
    assert draw(rng) == expected


def test_counters_go_on_unless_the_program_sets_them() -> None:
    sampler, state = held(epoch=0, calls=0)
    sampler.epoch, sampler.calls = 2, 7
    saved = state.state()
    again, other = held(epoch=3, calls=0)  # the prologue has called set_epoch(3)
    other.settle(saved)
    assert (again.epoch, again.calls) == (3, 7)


class Pool:
    """Not followed: only its generators are found."""

    def __init__(self, *generators: Any) -> None:
        self.generators = generators
        self.count = 0


def test_containers_and_other_objects_are_searched() -> None:
    rng = random.Random(1)

    def build() -> Any:
        parts = [Sampler(count=0, rng=np.random.default_rng(2)), 3, {"more": Sampler(count=5)}]
        closure = random.Random(6)
        return held(
            parts=parts,
            pool=Pool(torch.Generator().manual_seed(1), [random.Random(4)]),
            by_name={"a": np.random.RandomState(3)},
            draw=lambda: closure.random(),
            twice=[rng, rng],
        )

    def draws(sampler: Any) -> list[Any]:
        first, _, more = sampler.parts
        return [
            (first.count, more["more"].count, first.rng.random(), sampler.by_name["a"].rand()),
            torch.rand((), generator=sampler.pool.generators[0]).item(),
            (sampler.pool.generators[1][0].random(), sampler.draw()),
        ]

    sampler, state = build()
    sampler.parts[0].count, sampler.parts[2]["more"].count = 7, 8
    draws(sampler)
    saved, generators = roundtrip(state.state()), roundtrip(state.generators())
    assert len(generators) == 6
    expected = draws(sampler)

    again, other = build()
    assert other.restore(saved) == []
    assert draws(again) == expected
    other.put(generators)
    assert draws(again) == expected


def test_closed_attributes_are_not_entered() -> None:
    sampler = Sampler(source=Sampler(rng=random.Random(1)), rng=random.Random(2))
    state = Held(
        {"sampler": sampler},
        lambda value: isinstance(value, Sampler),
        closed=lambda name, value: name == "source",
    )
    assert list(state.generators()) == ["sampler.rng"]


def test_the_variables_of_a_python_generator() -> None:
    def items(rng: random.Random) -> Any:
        while True:
            yield rng.random()

    def build() -> Any:
        return items(random.Random(3))

    stream = build()
    state = Held({"loader": stream})
    saved = roundtrip(state.state())
    expected = next(stream)
    again = build()
    other = Held({"loader": again})
    next(again)
    assert other.restore(saved) == []
    assert next(again) == expected
