"""Random streams that training neither sees nor moves."""

from __future__ import annotations

import random

import numpy as np
import torch

from holdfast.run.randomness import PrivateStreams, digest, libraries
from tests.run.feed_checks import seed_everything, train_step


def turns(count: int, *, training: bool) -> list[object]:
    seed_everything(3)
    streams = PrivateStreams()
    drawn: list[object] = []
    for _ in range(count):
        with streams:
            drawn.append(train_step())
        if training:
            train_step()
            np.random.randn(1)  # leaves a second number in numpy's state
    return drawn


def test_turns_do_not_depend_on_what_training_draws() -> None:
    assert turns(5, training=True) == turns(5, training=False)


def test_the_first_turn_is_the_global_stream() -> None:
    seed_everything(3)
    expected = train_step()
    assert turns(1, training=True) == [expected]


def test_later_turns_do_not_move_the_global_stream() -> None:
    def rest(turns: int) -> object:
        seed_everything(3)
        streams = PrivateStreams()
        for _ in range(turns):
            with streams:
                train_step()
                random.gauss(0, 1)
                np.random.randn(1)
        return [train_step(), random.gauss(0, 1), np.random.randn(1).item()]

    assert rest(1) == rest(4)


def test_private_numbers_are_not_those_of_training() -> None:
    seed_everything(3)
    streams = PrivateStreams()
    with streams:
        pass
    with streams:
        private = train_step()
    training = train_step()
    assert all(a != b for a, b in zip(private, training, strict=True))


def test_an_error_gives_the_global_streams_back() -> None:
    seed_everything(3)
    streams = PrivateStreams()
    with streams:
        pass
    expected = torch.rand(1, generator=torch.Generator().manual_seed(3))
    try:
        with streams:
            torch.rand(5)
            raise KeyError
    except KeyError:
        pass
    assert torch.rand(1) == expected


def test_frameworks_in_memory_take_part() -> None:
    assert [library.name for library in libraries()] == ["python", "numpy", "torch"]


def test_digests_never_change() -> None:
    """Seeds of batches are made of these: a new release must go on with old runs."""
    assert digest(b"batch 1 2", b"torch").hex() == "cb24691567efe9506c6114d91623870a"
    assert digest(b"a", b"bc") != digest(b"ab", b"c")
