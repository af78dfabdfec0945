"""The rules of the loop: when it saves, metrics, settings."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.errors import (
    ConfigChanged,
    LoopError,
    UsageError,
)
from tests.support.jobs import (
    Model,
    Shuffled,
    fresh_address,
    steps_of,
    train,
)


def nothing() -> None: ...


def test_a_save_due_after_the_last_batch_waits_for_the_tail() -> None:
    address = fresh_address()
    with holdfast.Run(address, every=4, keep=None, quiet=True) as run:
        model = Model()
        run.track(model=model)
        train(run, model, Shuffled(4), 3, nothing)
    with holdfast.CheckpointManager(address) as manager:
        infos = manager.checkpoints()
    assert [info.step for info in infos] == [4, 8, 12]
    assert [info.metrics["val_loss"] for info in infos] == [3, 2, 1]
    assert [info.note for info in infos] == ["every=4", "every=4", "final"]


def test_metrics_after_a_loop_belong_to_its_last_step() -> None:
    address = fresh_address()
    run = holdfast.Run(address, every="epoch", keep=None, quiet=True)
    for epoch in run.epochs(2):
        for index in run.range(2):
            run.log(loss=index)
        run.log(val_loss=epoch)
    run.log(test_loss=0.125)
    run.log(test_loss=0.25)
    found = {info.step: dict(info.metrics) for info in run.manager.checkpoints()}
    assert found == {
        2: {"loss": 1.0, "val_loss": 0.0},
        4: {"loss": 1.0, "val_loss": 1.0, "test_loss": 0.25},
    }
    assert run.metrics == {"loss": 1.0, "val_loss": 1.0, "test_loss": 0.25}


def test_metrics_of_an_earlier_step_are_not_a_later_checkpoints() -> None:
    run = holdfast.Run(fresh_address(), every=2, keep=None, quiet=True)
    for index in run.range(5):
        if index == 0:
            run.log(val_loss=0.1)
    assert [dict(info.metrics) for info in run.manager.checkpoints()] == [{}, {}, {}]
    assert run.metrics == {"val_loss": 0.1}


def test_metrics_survive_a_resume() -> None:
    address = fresh_address()
    run = holdfast.Run(address, quiet=True)
    for index in run.range(3):
        run.log(loss=index)
    run = holdfast.Run(address, quiet=True)
    list(run.range(3))
    assert run.metrics == {"loss": 2.0}


def test_an_improving_metric_saves_at_the_next_boundary() -> None:
    address = fresh_address()
    losses = [5.0, 4.0, 6.0, float("nan"), 3.0, 3.0, 9.0]
    run = holdfast.Run(address, every=None, keep="best=1:loss", quiet=True)
    for index in run.range(len(losses)):
        run.log(loss=losses[index])
    infos = run.manager.checkpoints()
    assert [info.step for info in infos] == [5, 7]
    best = run.manager.best("loss")
    assert best is not None
    assert (best.step, best.note) == (5, "best")


def test_metrics_of_a_prologue_that_runs_again_are_what_they_were() -> None:
    """It logs once more, from a state that is later than the one it had."""

    def train(address: str, stop_at: int | None) -> holdfast.Run:
        run = holdfast.Run(address, every=1, keep=None, quiet=True)
        box = run.box(value=0)
        for _ in run.epochs(2):
            run.log(before=box.value)
            for _ in run.range(3):
                if run.step == stop_at:
                    return run
                box.value += 1
        return run

    whole = train(fresh_address(), None)
    assert whole.metrics == {"before": 3}
    address = fresh_address()
    train(address, stop_at=5)
    again = train(address, None)
    assert again.metrics == whole.metrics
    found = [
        [(info.step, dict(info.metrics)) for info in run.manager.checkpoints()]
        for run in (again, whole)
    ]
    assert found[0] == found[1]


def test_best_survives_a_restart() -> None:
    address = fresh_address()
    losses = [5.0, 2.0, 4.0, 4.0, 1.0, 3.0]
    for end in (3, 6):
        run = holdfast.Run(address, every=None, keep="last=1 best=1:loss", quiet=True)
        for index in run.range(end):
            run.log(loss=losses[index])
        best = run.manager.best("loss")
        assert best is not None
        assert best.metrics["loss"] == min(losses[:end])


def test_a_metric_logged_before_the_next_step_joins_the_checkpoint_of_the_last() -> None:
    run = holdfast.Run(fresh_address(), every="epoch", keep=None, quiet=True)
    for epoch in run.epochs(3):
        if epoch:
            run.log(val_loss=epoch)  # evaluates what the epoch before has trained
        list(run.range(2))
    found = {info.step: dict(info.metrics) for info in run.manager.checkpoints()}
    assert found == {2: {"val_loss": 1.0}, 4: {"val_loss": 2.0}, 6: {}}


def test_a_metric_of_the_tail_does_not_join_a_checkpoint_from_before_the_tail() -> None:
    class NoLength:
        def __iter__(self) -> Any:
            yield from (1, 2)

    run = holdfast.Run(fresh_address(), every=2, keep=None, quiet=True)
    box = run.box(value=0)
    for epoch in run.epochs(1):
        list(run.batches(NoLength()))  # saves at its end, which it cannot know to be it
        box.value = 1  # the state changes
        run.log(val_loss=epoch)
        list(run.range(1))
    found = [(info.step, dict(info.metrics)) for info in run.manager.checkpoints()]
    assert found == [(2, {}), (3, {})]


def test_a_step_saved_twice_is_the_newest_commit() -> None:
    address = fresh_address()
    run = holdfast.Run(address, every=2, keep=None, quiet=True)
    box = run.box(value=0)
    for _ in run.range(2, count=False):
        for index in run.range(2):
            box.value = index
            run.save()
        box.value = 10
    with holdfast.CheckpointManager(address) as manager:
        assert manager.load(2)["box"]["value"] == 10
        assert [info.step for info in manager.checkpoints()] == [1, 2, 3, 4]


def test_every_epoch_saves_after_the_tail() -> None:
    run = holdfast.Run(fresh_address(), every="epoch", keep=None, quiet=True)
    box = run.box(tails=0)
    for _ in run.epochs(3):
        list(run.range(2))
        box.tails += 1
    infos = run.manager.checkpoints()
    assert [info.step for info in infos] == [2, 4, 6]
    assert [run.manager.load(info.step)["box"]["tails"] for info in infos] == [1, 2, 3]


def test_every_epoch_without_epochs_is_an_error_at_the_first_item() -> None:
    run = holdfast.Run(fresh_address(), every="10min epoch", quiet=True)
    loop = iter(run.range(3))
    with pytest.raises(LoopError, match=r"run.epochs"):
        next(loop)


def test_log_and_save_from_other_threads() -> None:
    address = fresh_address()
    run = holdfast.Run(address, every=None, keep=None, quiet=True)
    for index in run.range(4):
        if index == 1:
            thread = threading.Thread(target=lambda: (run.log(loss=0.5), run.save()))
            thread.start()
            thread.join()
    found = [(info.step, dict(info.metrics)) for info in run.manager.checkpoints()]
    assert found == [(2, {"loss": 0.5}), (4, {})]
    assert run.manager.info(2).note == "asked"


def test_a_changed_config_is_refused_with_a_diff(capfd) -> None:
    address = fresh_address()
    list(holdfast.Run(address, config={"lr": 0.1, "seed": 1}, quiet=True).range(2))
    model = Model()
    run = holdfast.Run(address, config={"lr": 0.2, "seed": 1}, quiet=True).track(model=model)
    with pytest.raises(ConfigChanged, match=r"lr: 0.1 -> 0.2"):
        run.range(3)
    run = holdfast.Run(address, config={"lr": 0.2}, allow_config_change=True)
    assert list(run.range(3)) == [2]
    err = capfd.readouterr().err
    assert "lr: 0.1 -> 0.2" in err
    assert "seed: 1 -> (absent)" in err
    assert run.manager.manifest().config == {"lr": 0.2}


def test_wrong_settings() -> None:
    for settings in (
        {"late": "ema"},
        {"data": "whatever"},
        {"publish": "best:x", "keep": "last=1"},
        {"on_finish": "final best=1", "keep": "last=1"},
        {"on_finish": " "},
    ):
        with pytest.raises(UsageError):
            holdfast.Run(fresh_address(), **settings)  # type: ignore[arg-type]
    run = holdfast.Run(fresh_address(), quiet=True)
    for wrong in (-1, 2.5, True):
        with pytest.raises(UsageError, match="epochs"):
            run.epochs(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="needs a loader"):
        run.batches()
    with pytest.raises(UsageError, match=r"run\.box\(lr=0\.1\)"):
        run.track(lr=0.1)
    with pytest.raises(UsageError, match="another name"):
        run.track(box={})


def test_on_finish_keeps_what_it_says() -> None:
    address = fresh_address()
    run = holdfast.Run(
        address, every=1, keep="last=5 best=1:loss", on_finish="final best=1", quiet=True
    )
    for index in run.range(6):
        run.log(loss=abs(index - 2))
    assert steps_of(address) == [3, 6]


def test_environment_and_names_are_recorded() -> None:
    address = fresh_address()
    run = holdfast.Run(address, quiet=True)
    list(run.track(model=Model()).range(1))
    environment = run.manager.manifest().environment
    assert environment["packages"]["numpy"] == np.__version__
    assert "argv" in environment
