"""Fingerprints of variables: equal where values are, and different where they differ."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from holdfast.run.survey import MAX_ENTRIES, SAMPLED_BYTES, digest_of, survey


class Holder:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def advanced(generator: Any, draw: str) -> Any:
    getattr(generator, draw)()
    return generator


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2),
        (1, True),
        (0.0, -0.0),
        ("a", b"a"),
        ([1, 2], [2, 1]),
        ({"a": 1}, {"a": 2}),
        ({1, 2}, {1, 3}),
        (deque([1]), deque([2])),
        (np.arange(3), np.arange(3.0)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.array(["a", None], object), np.array(["b", None], object)),
        (torch.ones(2), torch.ones(2, dtype=torch.bfloat16)),
        (torch.eye(2).to_sparse(), torch.zeros(2, 2).to_sparse()),
        (random.Random(1), advanced(random.Random(1), "random")),
        (np.random.default_rng(1), advanced(np.random.default_rng(1), "random")),
        (torch.Generator(), advanced(torch.Generator(), "seed")),
        (Holder(a=1), Holder(a=2)),
        (Holder(inner=Holder(rng=np.random.default_rng(1))), Holder(inner=Holder(rng=None))),
        (torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)),
    ],
)
def test_different_values_have_different_entries(one: Any, other: Any) -> None:
    assert survey({"x": one}, []) != survey({"x": other}, [])
    assert survey({"x": one}, []) == survey({"x": one}, [])


def test_the_order_of_a_set_says_nothing() -> None:
    one, other = {8, 0}, {0, 8}
    assert list(one) != list(other)
    assert survey({"x": one}, []) == survey({"x": other}, [])


def test_what_is_known_or_cannot_be_looked_into_is_left_out() -> None:
    known = [1.0]
    scope = {"a": known, "b": {"in": known}, "f": len, "m": random, "i": iter([]), "__n__": 1}
    assert survey(scope, [known]) == []


def test_an_object_with_a_state_is_named_by_its_class() -> None:
    entries = survey({"net": torch.nn.Linear(1, 1)}, [])
    assert [(path, kind) for path, kind, _ in entries] == [
        ("net.weight", "Linear"),
        ("net.bias", "Linear"),
    ]


def test_cycles_end() -> None:
    knot: dict[str, Any] = {"n": 1}
    knot["self"] = knot
    assert [entry[0] for entry in survey({"knot": knot}, [])] == ["knot['n']"]


def test_of_a_long_list_the_rest_is_one_entry() -> None:
    long = list(range(MAX_ENTRIES + 100))
    entries = survey({"x": long}, [])
    assert len(entries) == MAX_ENTRIES + 1
    assert survey({"x": [*long[:-1], -1]}, [])[:-1] == entries[:-1]
    assert survey({"x": [*long[:-1], -1]}, [])[-1] != entries[-1]


def test_of_large_arrays_parts_are_read_unless_all_is_asked_for() -> None:
    large = np.zeros(2 * SAMPLED_BYTES, np.uint8)
    sampled, whole = digest_of(large), digest_of(large, sampled=False)
    changed = large.copy()
    changed[70_000] = 1  # between two of the parts
    assert digest_of(changed) == sampled
    assert digest_of(changed, sampled=False) != whole
    assert digest_of(large + 1) != sampled
