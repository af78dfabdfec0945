"""The rules of the loop: places, tracking, finishing. Saving and data have files of their own."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.errors import (
    LoopError,
    RunClosed,
    StructureMismatch,
)
from tests.support.jobs import (
    Countdown,
    Model,
    Shuffled,
    fresh_address,
    kill_everywhere,
    killed_at,
    process,
    steps_of,
    train,
)


def nothing() -> None: ...


def plain(every: Any) -> Any:
    def script(address: str, die: Any, trace: list) -> None:
        run = holdfast.Run(address, every=every, keep="last=3 best=1:val_loss", quiet=True)
        model, loader = Model(), Shuffled(4)
        run.track(model=model, trace=trace, data=loader)
        state = run.box(best=float("inf"), history=[])
        history = state.history
        for epoch in run.epochs(3):
            die()
            noise = np.random.rand()
            for batch in run.batches(loader):
                die()
                run.log(loss=model.step(batch))
                trace.append((epoch, run.step, float(batch), noise, model.weights.sum()))
                die()
            die()
            state.best = min(state.best, 10 - epoch)
            history.append((epoch, state.best))
            model.weights = model.weights * 0.5
            run.log(val_loss=10 - epoch)
            die()
        trace.append((list(history), run.step, run.epoch, model.seen))

    return script


@pytest.mark.parametrize("every", [1, 3, "epoch"])
def test_killed_anywhere_the_same_things_happen(every: Any) -> None:
    assert kill_everywhere(plain(every)) == 3 * (1 + 4 * 2 + 2)


def test_loops_are_iterators() -> None:
    run = holdfast.Run(fresh_address(), quiet=True)
    loop = run.epochs(3)
    assert next(loop) == 0
    assert next(iter(loop)) == 1
    assert len(loop) == 3
    assert list(loop) == [2]
    with pytest.raises(LoopError, match="iterated over once"):
        iter(loop)


def test_the_prologue_runs_again_with_the_random_numbers_it_had() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        run = holdfast.Run(address, every=1, quiet=True).track(trace=trace)
        for epoch in run.epochs(2):
            order = np.random.permutation(4)  # a local that the prologue draws
            for index in run.range(len(order)):
                die()
                trace.append((epoch, int(order[index]), np.random.rand()))

    kill_everywhere(script)


def test_break_in_the_inner_loop_closes_it() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        run = holdfast.Run(address, every=1, quiet=True).track(trace=trace)
        for epoch in run.epochs(3):
            for item in run.batches(Shuffled(5)):
                die()
                trace.append((epoch, float(item), run.step))
                if len(trace) % 3 == 0:
                    break
            die()
            trace.append(np.random.rand())
            for index in run.range(2):
                die()
                trace.append((index, run.step))

    kill_everywhere(script)


def test_break_from_the_outermost_loop_and_finish_means_finished() -> None:
    address = fresh_address()
    for attempt in range(2):
        run = holdfast.Run(address, quiet=True)
        with run:
            seen = []
            for epoch in run.epochs(10):
                seen.append(epoch)
                if epoch == 3:
                    break
        assert seen == ([0, 1, 2, 3] if attempt == 0 else [])
    assert steps_of(address) == [3]  # the item that was left by break is not complete


def test_return_out_of_nested_loops_and_finish_means_finished() -> None:
    address = fresh_address()

    def search(run: holdfast.Run) -> int | None:
        for epoch in run.epochs(10):
            for index in run.range(10):
                if (epoch, index) == (2, 5):
                    return 1
        return None

    with holdfast.Run(address, quiet=True) as run:
        assert search(run) == 1
    assert steps_of(address) == [25]
    with holdfast.Run(address, quiet=True) as run:
        assert run.finished
        assert search(run) is None


def test_break_from_the_outermost_loop_without_finish_goes_on(capfd) -> None:
    address = fresh_address()
    run = holdfast.Run(address, every=2, quiet=False)
    for index in run.range(10):
        if index == 5:
            break
    run.close()
    run = holdfast.Run(address, every=2)
    assert list(run.range(10)) == [4, 5, 6, 7, 8, 9]
    assert f"resumed {address} at step 4 (verified, saved" in capfd.readouterr().err


def test_finish_inside_the_loop_ends_it() -> None:
    address = fresh_address()
    run = holdfast.Run(address, quiet=True)
    seen = []
    for index in run.range(10):
        seen.append(index)
        if index == 3:
            run.finish()
    assert seen == [0, 1, 2, 3]
    assert run.finished
    run.close()


def test_the_number_of_the_batch_survives_where_enumerate_starts_again() -> None:
    def loop(run: holdfast.Run) -> Any:
        for _ in run.epochs(2):
            yield from run.batches("abcde")

    address = killed_at(3, loop)
    run = holdfast.Run(address, quiet=True)
    assert [(run.epoch, run.batch, x) for x in loop(run)] == [
        (0, 3, "d"),
        (0, 4, "e"),
        *((1, number, "abcde"[number]) for number in range(5)),
    ]
    assert run.batch == 0


def test_continue_completes_the_step() -> None:
    run = holdfast.Run(fresh_address(), quiet=True)
    for index in run.range(6):
        assert run.step == index
        if index % 2:
            continue
    assert run.step == 6


def test_an_exception_saves_nothing_new_and_is_raised() -> None:
    address = fresh_address()
    with pytest.raises(ZeroDivisionError), holdfast.Run(address, every=2, quiet=True) as run:
        for index in run.range(10):
            if index == 5:
                _ = 1 / 0
    assert steps_of(address) == [2, 4]


def test_leaving_the_outermost_loop_saves_the_last_step() -> None:
    address = fresh_address()
    run = holdfast.Run(address, every=None, quiet=True)
    list(run.range(7))
    assert run.manager.latest() is not None
    assert steps_of(address) == [7]
    assert run.finished


def test_steps_count_on_innermost_loops_only() -> None:
    run = holdfast.Run(fresh_address(), quiet=True)
    for _ in run.epochs(2):
        for _ in run.range(3):
            pass
        for _ in run.range(2, count=False):
            pass
        for _ in run.range(2, name="more"):
            for _ in run.range(2):
                pass
    assert run.step == 2 * (3 + 2 * 2)


def test_completed_loops_yield_nothing() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        run = holdfast.Run(address, every=1, quiet=True).track(trace=trace)
        for _ in run.epochs(2, name="pretrain"):
            die()
            trace.append(("pretrain", run.step, np.random.rand()))
        middle = np.random.rand()
        for _ in run.epochs(2, name="tune"):
            for _ in run.range(2):
                die()
                trace.append(("tune", middle, run.step))
            for _ in run.range(2):
                die()
                trace.append(("more", np.random.rand(), run.step))

    kill_everywhere(script)


def test_other_loops_than_those_of_the_checkpoint_are_an_error() -> None:
    def nested(run: holdfast.Run) -> Any:
        for _ in run.epochs(3):
            yield from run.range(4)

    address = killed_at(6, nested)
    run = holdfast.Run(address, quiet=True)
    with pytest.raises(LoopError, match=r"saved in the loops \(epochs 1, range 2\).*batches"):
        for _ in run.epochs(3):
            list(run.batches([1]))
    run = holdfast.Run(address, quiet=True)
    with pytest.raises(LoopError, match="the body of epochs 1 ended without it"):
        list(run.epochs(3))
    run = holdfast.Run(address, quiet=True)
    with pytest.raises(LoopError, match="opens the loop epochs 'other'"):
        list(run.epochs(3, name="other"))


def test_interleaving_two_loops_raises(capsys: pytest.CaptureFixture[str]) -> None:
    run = holdfast.Run(fresh_address(), quiet=True)
    with pytest.raises(LoopError, match="cannot be advanced in turn"):
        for _ in zip(run.batches([1, 2]), run.batches([3, 4]), strict=True):
            pass
    assert capsys.readouterr().err == ""  # no line about a loop that was left


def test_guard_counts_and_saves_nothing() -> None:
    address = fresh_address()
    run = holdfast.Run(address, every=1, keep=None, quiet=True)
    for _ in run.epochs(2):
        assert list(run.guard([1, 2, 3])) == [1, 2, 3]
        assert len(run.guard([1, 2])) == 2
    assert steps_of(address) == [1, 2]


def test_more_epochs_for_a_finished_run_continue() -> None:
    address = fresh_address()
    model = Model()
    with process():
        train(holdfast.Run(address, quiet=True).track(m=model), model, Shuffled(3), 2, nothing)
        again = Model()
        run = holdfast.Run(address, quiet=True).track(m=again)
        train(run, again, Shuffled(3), 5, nothing)
    whole = Model()
    with process():
        run = holdfast.Run(fresh_address(), quiet=True).track(m=whole)
        train(run, whole, Shuffled(3), 5, nothing)
    assert again.seen == whole.seen == 15
    assert again.weights.tolist() == whole.weights.tolist()


def test_a_finished_run_says_so_and_goes_on_after_the_loop(capfd) -> None:
    address = fresh_address()
    for _ in range(2):
        run = holdfast.Run(address)
        model = Model()
        run.track(model=model)
        train(run, model, Shuffled(3), 2, nothing)
        assert model.seen == 6
        run.close()
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == f"no checkpoint in {address}: starting at step 0"
    assert lines[1].startswith(f"resumed {address} at step 6 (verified, saved ")
    assert lines[2] == f"{address} is finished at step 6: nothing to train"
    assert len(steps_of(address)) == 1


def test_a_newer_run_at_the_address_closes_the_older(capfd) -> None:
    address = fresh_address()
    older = holdfast.Run(address)
    next(older.range(3))
    newer = holdfast.Run(address)
    assert list(newer.range(2)) == [0, 1]
    assert f"{address}: closing the Run that this process opened before" in capfd.readouterr().err
    with pytest.raises(RunClosed):
        older.log(loss=1)


def test_a_cell_that_runs_its_loop_again_needs_a_new_run() -> None:
    address = fresh_address()
    cell = "for index in run.range(9):\n    if index == 5: raise ValueError"
    scope = {"run": holdfast.Run(address, every=2, quiet=True)}
    with pytest.raises(ValueError):
        exec(compile(cell, "<cell 1>", "exec"), scope)
    with pytest.raises(LoopError, match="left after 5 items") as caught:
        exec(compile(cell, "<cell 2>", "exec"), scope)
    assert "new Run" in caught.value.hint
    scope["run"] = holdfast.Run(address, every=2, quiet=True)
    with pytest.raises(ValueError):
        exec(compile(cell, "<cell 3>", "exec"), scope)
    assert scope["index"] == 5
    resumed = scope["run"].resumed
    assert resumed is not None
    assert resumed.step == 4


def test_a_loop_after_one_that_was_left_is_another_loop_and_says_so(capfd) -> None:
    run = holdfast.Run(fresh_address(), quiet=True)

    def search() -> int:
        for index in run.range(4):
            if index == 2:
                return index
        return -1

    assert [search(), search()] == [2, 2]
    err = capfd.readouterr().err
    assert err.count("range loop was left after 2 items; the next one is another loop") == 1


def test_after_an_error_of_ours_the_loops_stay_ended() -> None:
    address = fresh_address()
    list(holdfast.Run(address, quiet=True).track(model=Model()).range(3))
    run = holdfast.Run(address, quiet=True)
    with pytest.raises(StructureMismatch):
        next(run.range(5))
    run.track(model=Model())
    with pytest.raises(LoopError, match="ended with an error"):
        next(run.range(5))


def test_a_start_that_failed_can_be_tried_again() -> None:
    address = fresh_address()
    list(holdfast.Run(address, quiet=True).track(model=Model()).range(3))
    run = holdfast.Run(address, quiet=True).track(model=Model(), other=Model())
    for _ in range(2):
        with pytest.raises(StructureMismatch, match="other"):
            run.range(5)
    assert run.step == 0


def test_loops_stay_on_one_thread_and_only_the_main_one_takes_signals(capfd) -> None:
    run = holdfast.Run(fresh_address())
    errors: list[BaseException] = []
    loops: list[Any] = []

    def advance() -> None:
        try:
            loops.append(run.range(3))
            next(loops[0])
        except LoopError as error:
            errors.append(error)

    thread = threading.Thread(target=advance)
    thread.start()
    thread.join()
    assert errors == []
    assert capfd.readouterr().err.count("not on the main thread") == 1
    with pytest.raises(LoopError, match="second thread"):
        next(loops[0])


def test_epochs_without_end() -> None:
    run = holdfast.Run(fresh_address(), quiet=True)
    seen = []
    with run:
        for epoch in run.epochs(None):
            seen.append(epoch)
            if epoch == 2:
                break
    assert seen == [0, 1, 2]


def test_resumed_and_finished_before_the_loop() -> None:
    address = fresh_address()
    run = holdfast.Run(address, quiet=True)
    assert run.resumed is None
    assert not run.finished
    list(run.range(2))
    run = holdfast.Run(address, quiet=True)
    assert run.resumed is not None
    assert run.resumed.step == 2
    assert run.finished
    assert run.step == 0
    list(run.range(2))
    assert (run.step, repr(run)) == (2, f"<Run {address!r} at step 2>")


def test_a_checkpoint_that_no_run_saved_is_refused() -> None:
    address = fresh_address()
    with holdfast.CheckpointManager(address) as manager:
        manager.save(3, {"x": [1]}).result()
    with pytest.raises(LoopError, match="written by CheckpointManager"):
        holdfast.Run(address, quiet=True).epochs(3)


def test_killed_again_and_again() -> None:
    whole: list[Any] = []
    with process():
        plain(1)(fresh_address(), Countdown(), whole)
    address, trace = fresh_address(), []
    for _ in range(12):
        with process():
            plain(1)(address, Countdown(5), [])
    with process():
        plain(1)(address, Countdown(), trace)
    assert trace == whole
