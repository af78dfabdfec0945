"""What cannot go on by sample, and what a `Run` has to do with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from torch.utils.data import BatchSampler, DataLoader

import holdfast
from holdfast.errors import LoopError, UsageError
from tests.support.jobs import Killed, Shuffled, fresh_address, process
from tests.torch.test_data import SAMPLES, Buckets
from tests.torch.test_data_by_sample import ORDERS, Numbers, gone_on, rest, stopped
from tests.torch.test_data_streams import Stream


def in_lists(size: int) -> Any:
    data: Any = np.arange(SAMPLES)
    return DataLoader(data, None, sampler=BatchSampler(range(SAMPLES), size, drop_last=False))


ALONE = "only a DataLoader over a dataset with indices, with batches of one size, tells which"
REFUSED: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "a list": (lambda: list(range(4)), lambda: list(range(5)), ALONE),
    "an iterable": (lambda: Shuffled(4), lambda: Shuffled(5), ALONE),
    "a stream": (lambda: DataLoader(Stream(), 3), lambda: DataLoader(Stream(), 2), ALONE),
    "another kind": (
        lambda: list(range(4)),
        lambda: DataLoader(Numbers(), 3),
        "it is another kind of loader now",
    ),
    "a batch sampler of its own now": (
        lambda: DataLoader(Numbers(), 3),
        lambda: DataLoader(Numbers(), batch_sampler=Buckets(range(SAMPLES))),
        "its batches are made by a Buckets, which alone knows their sizes",
    ),
    "a batch sampler of its own before": (
        lambda: DataLoader(Numbers(), batch_sampler=Buckets(range(SAMPLES))),
        lambda: DataLoader(Numbers(), 3),
        "the checkpoint does not say how many samples its batches had",
    ),
    "single samples before": (
        lambda: DataLoader(Numbers(), None),
        lambda: DataLoader(Numbers(), 3),
        "with batch_size=None, an item of its sampler may be more than one sample",
    ),
    "lists of indices": (
        lambda: in_lists(3),
        lambda: in_lists(2),
        "with batch_size=None yields lists of indices",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_on_by_sample_is_refused(name: str) -> None:
    before, after, words = REFUSED[name]
    saved = stopped(before(), 2)
    with pytest.raises(LoopError) as caught:
        gone_on(after(), saved)
    assert words in caught.value.message
    assert "Put it back as it was" in caught.value.hint
    assert 'data="restart-epoch"' in caught.value.hint
    assert "by-sample" not in caught.value.hint


def test_the_refusal_names_the_ways_there_are() -> None:
    with pytest.raises(LoopError) as caught:
        gone_on(ORDERS["shuffled"](3), stopped(ORDERS["shuffled"](4), 1), policy="refuse")
    assert caught.value.hint == (
        "Put it back as it was for the rest of this epoch, go on behind the samples that were "
        'taken: Run(..., data="by-sample"), or run that epoch again from its start: '
        'Run(..., data="restart-epoch").'
    )
    with pytest.raises(LoopError) as caught:
        gone_on([1, 2, 3], stopped([1, 2], 1), policy="refuse")
    assert caught.value.hint == (
        "Put it back as it was for the rest of this epoch, or run that epoch again from its "
        'start: Run(..., data="restart-epoch").'
    )


def test_a_state_that_does_not_count_samples_resumes_as_it_did() -> None:
    def make(size: int) -> Any:
        return DataLoader(Numbers(), size)

    state, rng = stopped(make(4), 1)
    for key in ("groups", "samples_taken", "sampler_length"):
        del state[key]
    assert rest(gone_on(make(4), (state, rng))) == [[4, 5, 6, 7], [8, 9, 10]]
    with pytest.raises(LoopError, match="does not say how many samples its batches had"):
        gone_on(make(2), (state, rng))


# -- in a Run -----------------------------------------------------------------


def killed_in(loop: Callable[[holdfast.Run, int], Iterator[Any]]) -> str:
    """The address of a run that died in its fourth body, with batches of 4."""
    address = fresh_address()
    with process():
        run = holdfast.Run(address, every=1, quiet=True)
        for number, _ in enumerate(loop(run, 4)):
            if number == 3:
                raise Killed
    return address


def test_two_loaders_in_one_loop_are_refused() -> None:
    def loop(run: holdfast.Run, size: int) -> Iterator[Any]:
        yield from run.batches(DataLoader(Numbers(20), size), list(range(5)))

    address = killed_in(loop)
    with pytest.raises(LoopError, match="the loop takes items of several loaders together"):
        next(loop(holdfast.Run(address, quiet=True, data="by-sample"), 2))


def test_a_loader_whose_item_was_in_progress_is_refused() -> None:
    """The loop inside has trained on that item of the old size already."""

    def loop(run: holdfast.Run, size: int) -> Iterator[Any]:
        for batch in run.batches(DataLoader(Numbers(20), size)):
            for again in run.range(3):
                yield batch, again

    address = killed_in(loop)
    run = holdfast.Run(address, quiet=True, data="by-sample")
    assert next(loop(run, 4))[1] == 0
    run.close()
    address = fresh_address()
    with process():
        run = holdfast.Run(address, every=1, quiet=True)
        for number, _ in enumerate(loop(run, 4)):
            if number == 4:
                raise Killed
    with pytest.raises(LoopError, match="the body of one of its items was half done"):
        next(loop(holdfast.Run(address, quiet=True, data="by-sample"), 2))


def test_the_length_of_such_an_epoch_is_not_news(capfd: pytest.CaptureFixture[str]) -> None:
    def loop(run: holdfast.Run, size: int) -> Iterator[Any]:
        for _ in run.epochs(2):
            yield from run.batches(DataLoader(Numbers(40), size))

    address = killed_in(loop)
    run = holdfast.Run(address, data="by-sample")
    assert len(list(loop(run, 2))) == (40 - 12) // 2 + 20
    run.close()
    lines = [line for line in capfd.readouterr().err.splitlines() if "items in an epoch" in line]
    assert lines == ["batches: 20 items in an epoch, 10 before"]


def test_an_unknown_choice_is_an_error_that_lists_the_three() -> None:
    with pytest.raises(UsageError, match="data='by-batch' is not known") as caught:
        holdfast.Run(fresh_address(), data="by-batch")  # type: ignore[arg-type]
    assert caught.value.hint == 'data="refuse", data="by-sample" or data="restart-epoch".'
