"""A wrapper that asks for item 1 before it hands out item 0 is refused; others are not."""

from __future__ import annotations

import itertools
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

import holdfast
from holdfast.errors import LoopError
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.jobs import Model, fresh_address
from tests.support.wrappers import (
    ONE_AT_A_TIME,
    READ_AHEAD,
    InInit,
    InIter,
    Wrapper,
    bar,
    made_elsewhere,
    moved,
    one_ahead,
)

LOADER = [0.5, 1.5, 2.5, 3.5]


@pytest.fixture(autouse=True)
def no_trace_function_is_left() -> Iterator[None]:
    assert sys.gettrace() is None
    yield
    assert sys.gettrace() is None


def new_run(address: str = "", **options: Any) -> holdfast.Run:
    return holdfast.Run(address or fresh_address(), every=1, quiet=True, **options)


def body(item: Any, seen: list[Any]) -> None:
    seen.append((item, sys.gettrace()))


def in_a_for(run: holdfast.Run, wrap: Wrapper, seen: list[Any]) -> None:
    for item in wrap(run.batches(LOADER)):
        body(item, seen)


def made_before(run: holdfast.Run, wrap: Wrapper, seen: list[Any]) -> None:
    items = wrap(run.batches(LOADER))
    for _ in range(3):
        moved([])
    for item in items:
        body(item, seen)


def on_one_line(run: holdfast.Run, wrap: Wrapper, seen: list[Any]) -> None:
    for item in wrap(run.batches(LOADER)): body(item, seen)  # fmt: skip  # noqa: E701


def by_next(run: holdfast.Run, wrap: Wrapper, seen: list[Any]) -> None:
    items = iter(wrap(run.batches(LOADER)))
    while (item := next(items, None)) is not None:
        body(item, seen)


def in_a_function(run: holdfast.Run, wrap: Wrapper, seen: list[Any]) -> None:
    def train(items: Iterable[Any]) -> None:
        for item in wrap(items):
            body(item, seen)

    train(run.batches(LOADER))


def passed_on(run: holdfast.Run, wrap: Wrapper, seen: list[Any]) -> None:
    def train(items: Iterable[Any]) -> None:
        for item in items:
            body(item, seen)

    train(wrap(run.batches(LOADER)))


def in_a_comprehension(run: holdfast.Run, wrap: Wrapper, seen: list[Any]) -> None:
    [body(item, seen) for item in wrap(run.batches(LOADER))]


def inside_epochs(run: holdfast.Run, wrap: Wrapper, seen: list[Any]) -> None:
    for _epoch in bar(run.epochs(1)):
        for item in wrap(run.batches(LOADER)):
            body(item, seen)


def in_a_generator(run: holdfast.Run, wrap: Wrapper, seen: list[Any]) -> None:
    """The body is in a generator that yields once per epoch."""

    def epochs() -> Iterator[int]:
        for epoch in run.epochs(1):
            for item in wrap(run.batches(LOADER)):
                body(item, seen)
            yield epoch

    assert list(epochs()) == [0]


def in_a_cell(run: holdfast.Run, wrap: Wrapper, seen: list[Any]) -> None:
    code = "for item in wrap(run.batches(loader)):\n    body(item, seen)\n"
    names = {"wrap": wrap, "run": run, "loader": LOADER, "seen": seen, "body": body}
    exec(compile(code, "<cell>", "exec"), names)


def in_a_with(run: holdfast.Run, wrap: Wrapper, seen: list[Any]) -> None:
    with run, threading.Lock():
        for item in wrap(run.batches(LOADER)):
            body(item, seen)


Consumer = Callable[[holdfast.Run, Wrapper, list[Any]], None]
CONSUMERS: list[Consumer] = [
    in_a_for,
    made_before,
    on_one_line,
    by_next,
    in_a_function,
    passed_on,
    in_a_comprehension,
    inside_epochs,
    in_a_generator,
    in_a_cell,
    in_a_with,
]


def pairs(wrappers: dict[str, Wrapper]) -> list[Any]:
    """Each consumer with a third of the wrappers, each wrapper with a third of the consumers; in
    `make exhaustive`, each with each."""
    return [
        pytest.param(consume, wrap, id=f"{consume.__name__}-{name}")
        for row, consume in enumerate(CONSUMERS)
        for column, (name, wrap) in enumerate(wrappers.items())
        if EXHAUSTIVE or (row + column) % 3 == 0
    ]


@pytest.mark.parametrize(("consume", "wrap"), pairs(READ_AHEAD))
def test_reading_ahead_is_refused(consume: Consumer, wrap: Wrapper) -> None:
    address = fresh_address()
    run = new_run(address)
    seen: list[Any] = []
    with pytest.raises(LoopError, match="item 1 before it handed out item 0") as caught:
        consume(run, wrap, seen)
    assert "run.batches(Prefetcher(loader))" in caught.value.hint
    assert "wrappers.py" in caught.value.message
    assert seen == []
    run.close()
    assert holdfast.CheckpointManager(address).checkpoints() == []


@pytest.mark.parametrize(("consume", "wrap"), pairs(ONE_AT_A_TIME))
def test_one_at_a_time_is_not_refused_and_no_body_is_traced(
    consume: Consumer, wrap: Wrapper
) -> None:
    run = new_run()
    seen: list[Any] = []
    consume(run, wrap, seen)
    assert seen == [(item, None) for item in LOADER]
    assert run.step == 4


def test_a_resume_in_mid_epoch_watches_again() -> None:
    address = fresh_address()
    model = Model()
    run = new_run(address).track(model=model)
    for item in run.batches(LOADER):
        model.step(item)
        if run.step == 1:
            break
    run.close()
    run = new_run(address).track(model=model)
    with pytest.raises(LoopError, match="item 2 before it handed out item 1"):
        for _ in one_ahead(run.batches(LOADER)):
            pass
    run.close()
    run = new_run(address).track(model=model)
    assert list(bar(run.batches(LOADER))) == LOADER[1:]


def test_each_loop_is_watched() -> None:
    run = new_run()
    with pytest.raises(LoopError, match="reads ahead of the batches loop"):
        for epoch in run.epochs(2):
            for _ in one_ahead(run.batches(LOADER)) if epoch else bar(run.batches(LOADER)):
                pass
    assert run.step == 4


def test_the_frame_that_made_the_loop_may_be_gone() -> None:
    run = new_run()
    with pytest.raises(LoopError, match="one_ahead"):
        for _ in made_elsewhere(run, LOADER):
            pass
    run = new_run()

    def batches() -> Iterable[Any]:
        return bar(moved(run.batches(LOADER)))

    assert [(item, sys.gettrace()) for item in batches()] == [(item, None) for item in LOADER]


def test_advanced_by_a_method_of_its_own() -> None:
    """As NVIDIA's data_prefetcher is used."""
    run = new_run()
    batches = InInit(run.batches(LOADER))
    with pytest.raises(LoopError, match=r"InInit\.__next__"):
        batches.next()


def test_a_trainer_that_looks_at_the_first_item() -> None:
    class Trainer:
        def __init__(self, run: holdfast.Run) -> None:
            self.run = run
            self.source = iter(run.batches(LOADER))
            self.first = next(self.source)
            self.seen: list[Any] = []

        def train(self, item: Any) -> None:
            self.seen.append(item)
            self.run.log(loss=item)

        def fit(self) -> None:
            for item in itertools.chain([self.first], self.source):
                self.train(item)

        def fit_rest(self) -> None:
            self.train(self.first)
            for item in self.source:
                self.train(item)

        def fit_by_next(self) -> None:
            item = self.first
            while item is not None:
                self.train(item)
                item = next(self.source, None)

    for fit in (Trainer.fit, Trainer.fit_rest, Trainer.fit_by_next):
        trainer = Trainer(new_run())
        fit(trainer)
        assert trainer.seen == LOADER


def test_a_body_in_a_constructor() -> None:
    run = new_run()

    class Trained:
        def __init__(self, items: Iterable[Any]) -> None:
            for item in items:
                run.log(loss=item)

    Trained(run.batches(LOADER))
    assert run.step == 4


def test_items_that_a_generator_drops() -> None:
    def large(items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            if item > 2:
                yield item

    run = new_run()
    assert list(large(run.batches(LOADER))) == [2.5, 3.5]
    assert run.step == 4


def test_a_body_in_a_generator_that_yields_rarely() -> None:
    def train(items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            run.log(loss=item)
        yield "done"

    run = new_run()
    assert list(train(bar(run.batches(LOADER)))) == ["done"]

    def train_epochs(epochs: Iterable[int]) -> Iterator[Any]:
        for _ in epochs:
            for item in bar(run.batches(LOADER)):
                body(item, seen)
        yield "done"

    run, seen = new_run(), []
    assert list(train_epochs(run.epochs(2))) == ["done"]
    assert [item for item, _ in seen] == LOADER * 2


def test_a_debugger_is_left_alone() -> None:
    def tracer(frame: Any, event: str, arg: Any) -> Any:
        return tracer

    run = new_run()
    sys.settrace(tracer)
    try:
        seen = [item for item in one_ahead(run.batches(LOADER)) if sys.gettrace() is tracer]
    finally:
        sys.settrace(None)
    assert seen == LOADER


def test_a_debugger_that_starts_in_between_is_left_alone() -> None:
    def tracer(frame: Any, event: str, arg: Any) -> None:
        return None

    run = new_run()
    items = InInit(run.batches(LOADER))
    sys.settrace(tracer)
    try:
        assert list(items) == LOADER
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(None)


def test_an_object_that_is_not_iterated_over_is_given_up() -> None:
    run = new_run()
    items = InIter(run.batches(LOADER))
    iter(items)
    assert sys.gettrace() is not None
    for _ in range(20_001):
        len([])
        (lambda: None)()
    assert sys.gettrace() is None


def test_a_loop_that_is_closed_is_not_watched_any_more() -> None:
    with new_run() as run:
        for _ in run.epochs(1):
            iter(InIter(run.batches(LOADER)))
            assert sys.gettrace() is not None


def test_a_wrapper_that_fails_is_not_watched_any_more() -> None:
    def failing(items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            raise ValueError(item)
            yield

    with pytest.raises(ValueError, match=r"0\.5"):
        list(failing(new_run().batches(LOADER)))


class OnAThread:
    """A prefetcher with a thread of its own. `quiet`: it ends where its source fails."""

    def __init__(self, items: Iterable[Any], *, quiet: bool = False) -> None:
        self.queue: queue.Queue[Any] = queue.Queue(2)
        self.quiet = quiet
        self.thread = threading.Thread(target=self.fill, args=(items,), daemon=True)
        self.thread.start()

    def fill(self, items: Iterable[Any]) -> None:
        try:
            for item in items:
                self.queue.put(item)
        except LoopError as error:
            if not self.quiet:
                self.queue.put(error)
        self.queue.put(None)

    def __iter__(self) -> Iterator[Any]:
        while (item := self.queue.get()) is not None:
            if isinstance(item, LoopError):
                raise item
            yield item


@pytest.mark.parametrize("epochs", [False, True])
def test_a_prefetcher_with_a_thread_of_its_own_is_refused(epochs: bool) -> None:
    run = new_run()
    with pytest.raises(LoopError, match="on a second thread") as caught:
        for _ in run.epochs(1) if epochs else range(1):
            for _ in OnAThread(run.batches(LOADER)):
                pytest.fail("an item was handed out")
    assert "run.batches(wrapper(loader))" in caught.value.hint


def test_a_prefetcher_that_hides_the_error_does_not_finish_the_run() -> None:
    address = fresh_address()
    with pytest.raises(LoopError, match="ended with an error"), new_run(address) as run:
        for _ in OnAThread(run.batches(LOADER), quiet=True):
            pytest.fail("an item was handed out")
    assert holdfast.CheckpointManager(address).checkpoints() == []


def test_a_prefetcher_with_a_thread_goes_inside() -> None:
    assert list(new_run().batches(OnAThread(LOADER))) == LOADER
    assert list(new_run().batches(one_ahead(LOADER))) == LOADER
