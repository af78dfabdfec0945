from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest

from holdfast.core.rng import apply_rng, capture_rng, derived_rng
from holdfast.errors import DamagedObject, StateError, UnsupportedValue
from tests.core.tree_harness import Saved, roundtrip, save


def numpy_words() -> list[int]:
    state: Any = np.random.get_state()
    return state[1].tolist()


def draw() -> list[object]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.random(),
        np.random.standard_normal(3).tolist(),
    ]


def test_global_generators_go_on_where_they_were() -> None:
    random.gauss(0, 1)  # leaves a second value behind
    np.random.standard_normal()
    saved = save(capture_rng())
    expected = draw()
    apply_rng(saved.restore())
    assert draw() == expected


def test_global_states_need_no_leaves() -> None:
    states = capture_rng()
    assert save({"python": states["python"], "numpy": states["numpy"]}).leaves == []


def test_nothing_is_set_when_a_state_is_malformed() -> None:
    states: Any = copy.deepcopy(capture_rng())
    before = random.getstate(), numpy_words()
    states["python"]["words"] = states["python"]["words"][:-4] + (10**6).to_bytes(4, "little")
    with pytest.raises(StateError, match="range"):
        apply_rng(states)
    assert (random.getstate(), numpy_words()) == before
    apply_rng({})
    assert random.getstate() == before[0]


def test_an_unknown_framework_is_named() -> None:
    with pytest.raises(StateError, match="'mystery'"):
        apply_rng({"frameworks": {"mystery": {}}})


def test_other_ranks_draw_others_and_always_the_same() -> None:
    states = save(capture_rng()).restore()
    before = copy.deepcopy(states)
    drawn: list[list[object]] = []
    for rank in (1, 2, 3, 1):
        apply_rng(derived_rng(states, rank))
        drawn.append(draw())
    apply_rng(states)
    drawn.append(draw())
    assert drawn[0] == drawn[3]
    for one in range(4):  # each library's
        assert len({str(row[one]) for row in drawn}) == 4
    assert str(states) == str(before)


def test_states_of_other_moments_give_a_rank_others() -> None:
    first = derived_rng(capture_rng(), 1)
    draw()
    assert str(derived_rng(capture_rng(), 1)) != str(first)


def test_deriving_sets_nothing() -> None:
    before = str(capture_rng())
    derived_rng(capture_rng(), 1)
    assert str(capture_rng()) == before


def test_what_is_no_generator_of_a_library_stays() -> None:
    assert derived_rng({"generators": {"model": [1]}}, 3) == {"generators": {"model": [1]}}
    with pytest.raises(StateError, match="'mystery'"):
        derived_rng({"frameworks": {"mystery": {}}}, 1)


BIT_GENERATORS = [
    np.random.MT19937,
    np.random.PCG64,
    np.random.PCG64DXSM,
    np.random.Philox,
    np.random.SFC64,
]


@pytest.mark.parametrize("kind", BIT_GENERATORS)
def test_numpy_generators(kind: Any) -> None:
    generator = np.random.Generator(kind(3))
    generator.spawn(2)
    generator.integers(0, 10, dtype=np.uint32)  # half of a 64-bit draw is kept
    generator.random(5)
    saved = save({"g": generator})
    new = saved.restore()["g"]
    live = np.random.Generator(kind(99))
    bits = live.bit_generator
    restored = saved.restore({"g": live})["g"]
    assert restored is live
    assert live.bit_generator is bits

    def next_values(generator: np.random.Generator) -> list[Any]:
        child = generator.spawn(1)[0]
        return [
            generator.integers(0, 10, 3, dtype=np.uint32).tolist(),
            generator.random(3).tolist(),
            child.random(3).tolist(),
        ]

    expected = next_values(generator)
    assert next_values(new) == next_values(live) == expected


def test_python_and_legacy_generators_in_place() -> None:
    python, legacy = random.Random(1), np.random.RandomState(2)
    python.gauss(0, 1)
    legacy.standard_normal()
    saved = save({"p": python, "l": legacy})
    live: Any = {"p": random.Random(), "l": np.random.RandomState()}
    objects = dict(live)
    saved.restore(live)
    assert live["p"] is objects["p"]
    assert live["l"] is objects["l"]
    assert live["p"].gauss(0, 1) == python.gauss(0, 1)
    assert live["l"].standard_normal() == legacy.standard_normal()


def test_a_shared_bit_generator_stays_shared() -> None:
    bits = np.random.PCG64(1)
    back = roundtrip([np.random.Generator(bits), np.random.Generator(bits), bits])
    assert back[0].bit_generator is back[1].bit_generator is back[2]


def test_seed_sequences() -> None:
    sequence = np.random.SeedSequence(2**200, spawn_key=(1, 2), pool_size=8)
    sequence.spawn(3)
    back = roundtrip(sequence)
    assert back.state == sequence.state
    assert (
        back.spawn(1)[0].generate_state(2).tolist()
        == sequence.spawn(1)[0].generate_state(2).tolist()
    )
    listed = np.random.SeedSequence([1, 2, 3])
    assert roundtrip(listed).state == listed.state


def test_the_systems_own_generator_cannot_be_saved() -> None:
    with pytest.raises(UnsupportedValue, match="SystemRandom"):
        save({"r": random.SystemRandom()})


def test_another_kind_of_live_generator_is_reported() -> None:
    saved = save({"a": np.random.default_rng(1), "b": random.Random(1), "c": 3})
    live: Any = {"a": np.random.Generator(np.random.MT19937(1)), "b": 5, "c": random.Random(2)}
    decoder = saved.decoder()
    decoder.apply(saved.tree, live)
    assert [line.split(":")[0] for line in decoder.mismatch.changed] == ["a", "c"]


def tampered(value: Any, change: Any) -> Saved:
    """A save whose state dict `change` was made to."""
    saved = save({"g": value})

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("!") == "dict":
                for pair in node["v"]:
                    if pair[0] in change:
                        pair[1] = change[pair[0]]
            for inner in node.values():
                walk(inner)
        elif isinstance(node, list):
            for inner in node:
                walk(inner)

    walk(saved.tree)
    return saved


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (np.random.Generator(np.random.MT19937(1)), {"pos": 10**6}),
        (np.random.Generator(np.random.MT19937(1)), {"pos": -1}),
        (np.random.Generator(np.random.MT19937(1)), {"pos": 1.5}),
        (np.random.Generator(np.random.MT19937(1)), {"key": {"!": "bytes", "b64": "AAAA"}}),
        (np.random.RandomState(1), {"pos": 625}),
        (np.random.RandomState(1), {"gauss": "x"}),
        (np.random.Philox(1), {"buffer_pos": -5}),
        (np.random.Philox(1), {"buffer_pos": 5}),
        (np.random.Philox(1), {"buffer": [1, 2]}),
        (np.random.SFC64(1), {"state": 3}),
        (np.random.PCG64(1), {"inc": -1}),
        (np.random.PCG64(1), {"has_uint32": 7}),
        (np.random.SeedSequence(1), {"pool_size": 10**9}),
        (np.random.SeedSequence(1), {"n_children_spawned": -1}),
        (np.random.SeedSequence(1), {"entropy": -1}),
        (random.Random(1), {"words": {"!": "bytes", "b64": "AAAA"}}),
        (random.Random(1), {"version": 2}),
    ],
)
def test_states_out_of_range_never_reach_the_generator(value: Any, change: Any) -> None:
    with pytest.raises((StateError, DamagedObject)):
        tampered(value, change).restore()
    live = copy.deepcopy(value)
    if not isinstance(value, np.random.SeedSequence):
        with pytest.raises((StateError, DamagedObject)):
            tampered(value, change).restore({"g": live})
