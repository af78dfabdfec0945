"""What a run says when it refuses something: what happened, and a hint that works.

Refusals that depend on a rule of the loop are with that rule; here is what a user meets by a
wrong argument or a wrong call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.errors import (
    BadPolicy,
    ConfigChanged,
    HoldfastError,
    LoopError,
    RunClosed,
    StructureMismatch,
    UsageError,
)
from tests.support.jobs import fresh_address, killed_at
from tests.support.refusals import Refusal


def run_at(address: str = "", **options: Any) -> holdfast.Run:
    return holdfast.Run(address or fresh_address(), quiet=True, **options)


def logged(**metrics: Any) -> None:
    run = run_at()
    for _ in run.range(1):
        run.log(**metrics)


def first_of(*loaders: Any, **options: Any) -> Any:
    return next(run_at().batches(*loaders, **options))


def five(run: holdfast.Run) -> Any:
    return run.range(5)


def again(loop: Callable[[holdfast.Run], Any], was: Callable[[holdfast.Run], Any] = five) -> None:
    """A program that was killed at its second step is started as `loop` has it now."""
    address = killed_at(2, was)
    list(loop(run_at(address)))


def closed_run() -> holdfast.Run:
    run = run_at()
    run.close()
    return run


def iterated_twice() -> None:
    loop = run_at().range(2)
    list(loop)
    list(loop)


def variables_of_a_function() -> None:
    best = 1
    assert best
    holdfast.Variables(locals(), "best")


def reads_ahead() -> None:
    def prefetch(items: Any) -> Iterator[Any]:
        held = next(items)
        for item in items:
            yield held
            held = item

    for _ in prefetch(run_at().range(3)):
        pass


def in_turn() -> None:
    run = run_at()
    for _ in zip(run.batches([1, 2]), run.batches([3, 4]), strict=True):
        pass


def inside_the_data() -> None:
    run = run_at()

    def rows() -> Iterator[int]:
        yield from run.range(2)

    list(run.batches(rows()))


def other_loaders() -> None:
    address = killed_at(1, lambda run: run.batches([1, 2, 3], [4, 5, 6]))
    next(run_at(address).batches([1, 2, 3], [4, 5, 6], [7, 8, 9]))


def after_an_error() -> None:
    run = run_at(every="epoch")
    with pytest.raises(LoopError):
        next(run.range(3))
    next(run.range(3))


def on_a_second_thread() -> None:
    run = run_at()
    loop = run.range(3)
    next(loop)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(next, loop).result()


def used_up() -> None:
    numbers = iter([1, 2])
    run = run_at()
    for _ in run.epochs(2):
        list(run.batches(numbers))


def other_config() -> None:
    address = fresh_address()
    list(run_at(address, config={"lr": 0.1, "seed": 1}).range(1))
    run_at(address, config={"lr": 0.2, "seed": 1}).range(1)


def of_a_broken_rehearsal() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOLDFAST_REHEARSAL", "{not json")
        run_at()


def saved_by_a_manager() -> None:
    address = fresh_address()
    with holdfast.CheckpointManager(address) as manager:
        manager.save(3, {"x": [1]}).result()
    run_at(address).epochs(3)


def other_shape_in_a_list() -> None:
    address = fresh_address()
    list(run_at(address).track(x=[1]).range(1))
    list(run_at(address).track(x={"a": 1}).range(2))


CASES: dict[str, tuple[Callable[[], Any], type[HoldfastError], str, str]] = {
    # Run(...)
    "late": (
        lambda: run_at(late="ema"),
        UsageError,
        "late='ema' is text, not a list of names",
        "late=['ema']",
    ),
    "override": (
        lambda: run_at(override="optimizer"),
        UsageError,
        "override='optimizer' is text, not a list of names",
        "override=['optimizer']",
    ),
    "data": (
        lambda: run_at(data="whatever"),
        UsageError,
        "data='whatever' is not known",
        'data="refuse", data="by-sample" or data="restart-epoch"',
    ),
    "publish": (
        lambda: run_at(publish="newest:x"),
        UsageError,
        "cannot read publish='newest:x'",
        'Write publish="best:folder" or publish="latest:folder"',
    ),
    "publish what is best": (
        lambda: run_at(publish="best:x", keep="last=1"),
        UsageError,
        "publish='best:x' needs to know what is best",
        'keep="last=3 best=1:val_loss"',
    ),
    "on_finish without a metric": (
        lambda: run_at(on_finish="final best=1", keep="last=1"),
        BadPolicy,
        "on_finish='final best=1': best=1 names no metric, and neither does keep",
        "Write best=1:val_loss, or add best=1:val_loss to keep.",
    ),
    "on_finish without a rule": (
        lambda: run_at(on_finish=" "),
        BadPolicy,
        "on_finish=' ' has no rule",
        'Write on_finish="final".',
    ),
    "config": (
        lambda: run_at(config={"model": [object()]}),
        UsageError,
        "config.model[0] is of type object, which cannot be compared with the last run's",
        "Put only names, numbers, lists and dicts into config=.",
    ),
    "rewrite_every": (
        lambda: run_at(rewrite_every=0),
        UsageError,
        "rewrite_every must be at least 1, not 0",
        "Give a number of saves, or leave it out.",
    ),
    # tracking
    "the name of the box": (
        lambda: run_at().track(box={}),
        UsageError,
        "'box' is the name under which run.box is saved",
        "Track the object under another name.",
    ),
    "a plain value": (
        lambda: run_at().track(lr=0.1),
        UsageError,
        "cannot track lr=0.1: a float cannot be restored in place",
        "state = run.box(lr=0.1); then use state.lr",
    ),
    "a private name in the box": (
        lambda: run_at().box(_x=1),
        UsageError,
        "run.box cannot hold '_x': names that start with _ are its own",
        "Call it 'x'.",
    ),
    "another kind of object": (
        other_shape_in_a_list,
        StructureMismatch,
        "x: saved as list, tracked as dict",
        "Make them like those of the last run, or track what holds them",
    ),
    "Variables without names": (
        lambda: holdfast.Variables({}),
        UsageError,
        "Variables needs the names to keep",
        'Variables(globals(), "best", "patience")',
    ),
    "Variables without a dict": (
        lambda: holdfast.Variables("best", "x"),  # type: ignore[arg-type]
        UsageError,
        "Variables needs the dict that holds the variables, not 'best'",
        "Variables(globals(), ...) or Variables(vars(object), ...)",
    ),
    "Variables of a function": (
        variables_of_a_function,
        UsageError,
        "locals() is a copy there, and nothing can be put back into it",
        "state = run.box(best=...)",
    ),
    # loops
    "a count of epochs": (
        lambda: run_at().epochs(2.5),  # type: ignore[arg-type]
        UsageError,
        "epochs needs a whole number of at least 0, not 2.5",
        "run.epochs(20), or run.epochs(None) to go on without end",
    ),
    "no loader": (
        lambda: run_at().batches(),
        UsageError,
        "run.batches needs a loader",
        "for batch in run.batches(loader): ...",
    ),
    "a set": (
        lambda: first_of({"a", "b"}),
        LoopError,
        "a set has another order in each process, so it cannot be resumed",
        "Iterate over sorted(...) of it.",
    ),
    "a number": (
        lambda: first_of(3),
        LoopError,
        "cannot be iterated over",
        "Give run.batches a DataLoader, a sequence, or another iterable.",
    ),
    "mode": (
        lambda: first_of([1], [2], mode="most"),
        UsageError,
        "mode='most' is not known",
        'mode="min" stops with the shorter, "cycle" repeats it, "max" gives None in its place',
    ),
    "iterated twice": (
        iterated_twice,
        LoopError,
        "this range loop has ended; it can be iterated over once",
        "Call run.epochs, run.batches or run.range where the loop starts",
    ),
    "reads ahead": (
        reads_ahead,
        LoopError,
        "reads ahead of the range loop: it asked for item 1 before it handed out item 0",
        "run.batches(Prefetcher(loader)), not Prefetcher(run.batches(loader))",
    ),
    "in turn": (
        in_turn,
        LoopError,
        "this batches loop was closed when the loop around it went on, or another one was opened",
        'for two loaders use run.batches(a, b, mode="min")',
    ),
    "inside the data": (
        inside_the_data,
        LoopError,
        "range was opened while batches fetches its next item",
        "Open loops in the body of another, not in its data.",
    ),
    "every epoch in no epochs": (
        lambda: next(run_at(every="epoch").range(3)),
        LoopError,
        'every="epoch" needs a loop over run.epochs(n), and this one is in none',
        'Put `for epoch in run.epochs(n):` around it, or give an interval: every="10min"',
    ),
    # metrics
    "a metric of several numbers": (
        lambda: logged(loss=np.ones((2, 3))),
        UsageError,
        "metric 'loss' has shape (2, 3); a metric is one number",
        "run.log(loss=value.mean())",
    ),
    "a metric with a name of its own": (
        lambda: logged(**{"val/loss": np.ones(2)}),
        UsageError,
        "metric 'val/loss' has shape (2,)",
        "run.log(**{'val/loss': value.mean()})",
    ),
    "a metric of text": (
        lambda: logged(loss="high"),
        UsageError,
        "metric 'loss' is not a number: str",
        "keep other values in run.box",
    ),
    "a long text": (
        lambda: run_at().track(text="x" * 1000),
        UsageError,
        "cannot track text=...: a str cannot be restored in place",
        "state = run.box(text=...); then use state.text",
    ),
    # the place of the checkpoint
    "another loop": (
        lambda: again(lambda run: run.epochs(5)),
        LoopError,
        "saved in the loops (range 2), but the program opens epochs in the place of range",
        "give loops that run only sometimes a name=, or start under a new address",
    ),
    "another number of loaders": (
        other_loaders,
        UsageError,
        "this loop had 2 loaders, and has 3 now",
        "Give run.batches the same loaders.",
    ),
    "two loaders instead of one": (
        lambda: again(
            lambda run: run.batches([1, 2, 3], [4, 5, 6]), was=lambda run: run.batches([1, 2, 3])
        ),
        UsageError,
        "this loop had 1 loader, and has 2 now",
        "Give run.batches the same loaders.",
    ),
    "one loader instead of two": (
        lambda: again(
            lambda run: run.batches([1, 2, 3]), was=lambda run: run.batches([1, 2, 3], [4, 5, 6])
        ),
        UsageError,
        "this loop had 2 loaders, and has 1 now",
        "Give run.batches the same loaders.",
    ),
    "of a manager": (
        saved_by_a_manager,
        LoopError,
        "was written by CheckpointManager: it has no place in a loop",
        "Go on with CheckpointManager, or give the Run an address of its own.",
    ),
    "a shorter iterator": (
        lambda: again(
            lambda run: run.batches(iter([1])), was=lambda run: run.batches(iter([1, 2, 3]))
        ),
        LoopError,
        "has only 1 item now; 2 had been taken when the checkpoint was made",
        "Put its data back, or start the run at another address.",
    ),
    "another config": (
        other_config,
        ConfigChanged,
        "was started with another config:\n  lr: 0.1 -> 0.2",
        "go on with the new one: Run(..., allow_config_change=True).",
    ),
    # what came before
    "after an error": (
        after_an_error,
        LoopError,
        'the loops of this run ended with an error: every="epoch" needs',
        "every=500. Make a new Run: it goes on from the newest checkpoint.",
    ),
    "on a second thread": (
        on_a_second_thread,
        LoopError,
        "the range loop was advanced on a second thread",
        "run.batches(wrapper(loader)). All loops of a run are made and iterated over on one",
    ),
    "an iterator that is used up": (
        used_up,
        LoopError,
        "has been iterated over to its end",
        "Give run.batches an object whose __iter__ starts anew",
    ),
    "a folder where an export would be": (
        lambda: run_at(publish=f"latest:{Path(__file__).parent}"),
        UsageError,
        "it exists and is not a link made by Holdfast",
        "Move it away or choose another path.",
    ),
    "a broken rehearsal": (
        of_a_broken_rehearsal,
        UsageError,
        "HOLDFAST_REHEARSAL is set and holds no script of a rehearsal: ",
        "Unset HOLDFAST_REHEARSAL; it is set by `holdfast rehearse` alone.",
    ),
    "closed": (lambda: closed_run().save(), RunClosed, "is closed", "Make a new Run"),
}


@pytest.mark.parametrize("refusal", CASES.values(), ids=CASES)
def test_what_a_refusal_says(refusal: tuple[Any, ...]) -> None:
    Refusal(*refusal).check()
