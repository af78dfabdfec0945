"""The rules of the loop: what is tracked, and the box."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.errors import ConfigChanged, StructureMismatch, UsageError
from tests.support.jobs import Killed, Model, fresh_address, process
from tests.support.refusals import hinted


def test_box_values_survive_and_containers_keep_their_identity() -> None:
    address = fresh_address()
    for _ in range(2):
        run = holdfast.Run(address, every=1, quiet=True)
        state = run.box(best=9.0, history=[])
        history = state.history
        with process():
            for epoch in run.epochs(4):
                if run.resumed is None and epoch == 2:
                    raise Killed
                state.best -= 1
                history.append(epoch)
    assert history is state.history
    assert history == [0, 1, 2, 3]
    assert state.best == 5.0


def test_a_box_default_that_the_checkpoint_lacks() -> None:
    address = fresh_address()
    with holdfast.Run(address, quiet=True) as run:
        run.box(best=1.0)
        list(run.range(2))
    run = holdfast.Run(address, quiet=True)
    run.box(patience=3)
    list(run.range(3))
    assert run.box(best=5.0, patience=7).best == 1.0
    assert run.box.patience == 3


def test_tracking_a_name_again_replaces_it() -> None:
    address = fresh_address()
    run = holdfast.Run(address, quiet=True)
    first, second = Model(), Model()
    run.track(model=first).track(model=second)
    second.seen = 7
    list(run.range(1))
    assert run.manager.load()["model"]["seen"] == 7


def test_late_track_restores_at_once() -> None:
    address = fresh_address()
    run = holdfast.Run(address, quiet=True)
    model, late = Model(), Model()
    run.track(model=model, late=late)
    late.seen = 5
    list(run.range(3))
    run = holdfast.Run(address, late=["late"], quiet=True)
    run.track(model=Model())
    for index in run.range(5):
        if index == 3:
            again = Model()
            run.track(late=again)
            assert again.seen == 5
            again.seen = 6
            run.track(late=again)  # not restored a second time
            assert again.seen == 6


def test_names_that_nobody_claimed_raise_before_the_first_step() -> None:
    address = fresh_address()
    run = holdfast.Run(address, quiet=True)
    list(run.track(model=Model(), ema=Model()).range(3))
    run = holdfast.Run(address, quiet=True).track(model=Model())
    loop = run.range(5)
    with pytest.raises(StructureMismatch, match="'ema'") as caught:
        next(loop)
    assert "late=['ema']" in caught.value.hint
    run = holdfast.Run(address, quiet=True).track(model=Model())
    assert len(list(run.track(ema=Model()).range(5))) == 2


def test_a_renamed_object() -> None:
    address = fresh_address()
    list(holdfast.Run(address, quiet=True).track(net=Model()).range(3))
    with pytest.raises(StructureMismatch) as caught:
        next(holdfast.Run(address, quiet=True).track(model=Model()).range(5))
    assert "rename={'net': 'model'}" in caught.value.hint
    for steps in (5, 8):  # the same command again, when the new name is in the checkpoint
        run = holdfast.Run(address, rename={"net": "model"}, quiet=True).track(model=Model())
        assert len(list(run.range(steps))) == steps - (3 if steps == 5 else 5)


def refused(address: str, tracked: dict[str, Any], **options: Any) -> StructureMismatch:
    with pytest.raises(StructureMismatch) as caught:
        next(holdfast.Run(address, quiet=True, **options).track(**tracked).range(5))
    return caught.value


def test_the_hint_of_a_renamed_object_can_be_pasted_also_the_second_time() -> None:
    address = fresh_address()
    net = Model()
    list(holdfast.Run(address, quiet=True).track(net=net, opt=Model()).range(3))
    once = {"net": "model", "opt": "opt"}
    # The program had a rename, and then the same object got another name again.
    error = refused(address, {"backbone": Model(), "opt": Model()}, rename=once)
    assert f"the checkpoint of {address} holds 'model' (saved as 'net'), which" in error.message
    rename = hinted(error.hint, "rename")
    assert rename == {"net": "backbone", "opt": "opt"}
    backbone = Model()
    run = holdfast.Run(address, quiet=True, rename=rename).track(backbone=backbone, opt=Model())
    assert list(run.range(5)) == [3, 4]
    assert backbone.state_dict()["seen"] == net.seen


def test_several_renamed_objects_are_told_the_names_to_pair() -> None:
    address = fresh_address()
    list(holdfast.Run(address, quiet=True).track(net=Model(), opt=Model()).range(3))
    error = refused(address, {"model": Model(), "optimizer": Model()})
    assert "holds 'net', 'opt', which nothing tracks here" in error.message
    assert "rename={old: new}; new here: 'model', 'optimizer'" in error.hint


def test_the_hint_about_names_that_come_late_can_be_pasted() -> None:
    address = fresh_address()
    late = Model()
    list(holdfast.Run(address, quiet=True).track(a=Model(), b=Model(), c=late).range(3))
    error = refused(address, {"a": Model()}, late=["c"])
    names = hinted(error.hint, "late")
    assert names == ["b", "c"]
    run = holdfast.Run(address, quiet=True, late=names).track(a=Model())
    for _ in run.range(5):
        run.track(b=Model(), c=Model())
    assert run.step == 5


def test_the_hint_about_a_new_object_can_be_pasted() -> None:
    address = fresh_address()
    list(holdfast.Run(address, quiet=True).track(model=Model()).range(3))
    error = refused(address, {"model": Model(), "ema": Model()}, late=["other"])
    assert "missing in the checkpoint (1):\n  ema" in error.message
    names = hinted(error.hint, "late")
    assert names == ["ema", "other"]
    ema = Model()
    ema.seen = 7
    run = holdfast.Run(address, quiet=True, late=names).track(model=Model(), ema=ema)
    assert list(run.range(5)) == [3, 4]
    assert ema.seen == 7


def test_a_plain_value_goes_into_the_box_as_the_hint_says() -> None:
    address = fresh_address()
    run = holdfast.Run(address, quiet=True)
    with pytest.raises(UsageError) as caught:
        run.track(lr=0.1)
    assert "state = run.box(lr=0.1); then use state.lr." in caught.value.hint
    state = run.box(lr=0.1)
    for _ in run.range(2):
        state.lr *= 2
    run = holdfast.Run(address, quiet=True)
    state = run.box(lr=0.1)
    assert list(run.range(3)) == [2]
    assert state.lr == 0.4


def test_a_config_with_infinities_is_the_same_config_again() -> None:
    address = fresh_address()
    config = {"clip": float("inf"), "low": np.float32("-inf"), "none": float("nan")}
    for _ in range(2):
        with holdfast.Run(address, every=1, quiet=True, config=config) as run:
            for _ in run.epochs(2):
                pass
    with holdfast.CheckpointManager(address) as manager:
        assert manager.manifest("latest").config == {"clip": "inf", "low": "-inf", "none": "nan"}
    with pytest.raises(ConfigChanged, match=r"clip: 'inf' -> 1\.0"):
        list(holdfast.Run(address, quiet=True, config={**config, "clip": 1.0}).epochs(2))


def test_a_config_is_remembered_when_a_start_does_not_give_one() -> None:
    address = fresh_address()
    list(holdfast.Run(address, quiet=True, config={"lr": 1}).range(2))
    list(holdfast.Run(address, quiet=True).range(4))
    with pytest.raises(ConfigChanged, match="lr: 1 -> 9"):
        next(holdfast.Run(address, quiet=True, config={"lr": 9}).range(6))


def test_what_a_finished_run_wants_is_made_good_at_the_next_start(tmp_path: Path) -> None:
    """The process died between its last commit and the end."""
    address = fresh_address()
    export = tmp_path / "newest"
    list(holdfast.Run(address, quiet=True, every=1, keep=None).track(x=[1]).range(4))
    with holdfast.CheckpointManager(address) as manager:
        assert len(manager.checkpoints()) == 4
    with holdfast.Run(address, quiet=True, on_finish="final", publish=f"latest:{export}") as run:
        assert list(run.track(x=[0]).range(4)) == []
    with holdfast.CheckpointManager(address) as manager:
        assert [c.step for c in manager.checkpoints()] == [4]
    assert (export / "state.json").exists()


def test_a_log_that_grows_at_every_step_resumes_exactly(tmp_path: Path) -> None:
    """Opened before the loop, as scripts do: a restore must not leave it behind."""
    address, path = fresh_address(), tmp_path / "metrics.csv"
    for _ in range(2):
        run = holdfast.Run(address, every=3, quiet=True)
        run.track(log=holdfast.File(path))
        with process(), path.open("a", buffering=1) as log:
            for epoch in run.epochs(4):
                log.write(f"epoch {epoch}\n")  # a prologue, run again after a resume
                for item in run.range(4):
                    log.write(f"{epoch}.{item}\n")
                    if run.resumed is None and run.step == 10:
                        run.manager.wait()
                        raise Killed
    expected = "".join(
        f"epoch {epoch}\n" + "".join(f"{epoch}.{item}\n" for item in range(4)) for epoch in range(4)
    )
    assert path.read_text() == expected
