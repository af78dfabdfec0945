"""Holdfast's rules, files that Lightning writes, and wrong use."""

from __future__ import annotations

import copy
import os
import shutil
import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import holdfast
import holdfast.lightning
from holdfast.errors import LoopError, UsageError
from holdfast.lightning.epoch_feed import EpochFeed
from holdfast.run.iterables import open_feed
from tests.support.jobs import fresh_address, steps_of
from tests.support.lightning_jobs import RARELY, Leaving, Model, loader, train

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small data


@cache
def whole() -> str:
    """What a training comes to that is left alone."""
    return str(train(fresh_address(), run_options=RARELY))


# -- when it saves, and what it keeps ---------------------------------------------------


def test_the_best_the_last_and_every_epoch_are_kept() -> None:
    address = fresh_address()
    found = train(address, run_options={"every": "epoch", "keep": "last=1 best=1:val_loss"})
    with holdfast.CheckpointManager(address) as manager:
        by_step = {info.step: info.metrics for info in manager.checkpoints()}
        best = manager.best("val_loss")
    assert best is not None
    assert best.metrics["val_loss"] == min(one["val_loss"] for one in by_step.values())
    assert 15 in by_step
    assert by_step[15]["val_loss"] == pytest.approx(found["metrics"]["val_loss"])
    assert len(by_step) <= 2


def test_an_old_metric_makes_no_later_checkpoint_the_best() -> None:
    address = fresh_address()
    train(address, run_options={"keep": "last=100"}, max_epochs=2)
    with holdfast.CheckpointManager(address) as manager:
        validated = [i.step for i in manager.checkpoints() if "val_loss" in i.metrics]
        logged = [i.step for i in manager.checkpoints() if "loss" in i.metrics]
    assert sorted(validated) == [5, 10]
    assert sorted(logged) == list(range(1, 11))


def test_a_resume_does_not_log_old_metrics_again() -> None:
    address = fresh_address()
    leaving = Leaving(address)
    train(address, leaving, max_epochs=2)
    left = leaving.left[12]  # inside the second epoch
    before = set(steps_of(left))
    train(left, run_options={"keep": "last=100"}, max_epochs=2)
    with holdfast.CheckpointManager(left) as manager:
        fresh = [one for one in manager.checkpoints() if one.step not in before]
    assert [one.step for one in fresh if "val_loss" in one.metrics] == [10]


def test_saves_by_time() -> None:
    now = iter(range(100))
    address = fresh_address()
    options = {"every": "4s", "keep": "last=100", "clock": lambda: float(next(now) // 2)}
    train(address, run_options=options, max_epochs=2)
    steps = sorted(steps_of(address))
    assert steps[-1] == 10
    assert 2 <= len(steps) < 10


def test_more_epochs_for_a_finished_run() -> None:
    address = fresh_address()
    train(address, max_epochs=2)
    assert str(train(address)) == whole()


def test_more_for_a_run_that_ended_inside_an_epoch_or_early() -> None:
    """It goes on with the epoch that would follow."""
    address = fresh_address()
    assert train(address, max_steps=7, max_epochs=-1)["run"][0] == 7
    assert train(address, max_steps=9, max_epochs=-1)["run"][0] == 9
    address = fresh_address()
    stopping = {"monitor": "val_loss", "patience": 1, "min_delta": 100.0}
    assert train(address, EarlyStopping(**stopping))["epoch"] == 2
    assert train(address, EarlyStopping(**stopping))["epoch"] == 2
    assert train(address, EarlyStopping(**stopping), max_epochs=8)["epoch"] == 3


def test_behind_an_error_the_next_start_goes_on() -> None:
    class Failing(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 8:
                raise RuntimeError("out of memory")

    address = fresh_address()

    class Checking(Callback):
        def on_sanity_check_start(self, *args: Any) -> None:
            raise AssertionError("a training that goes on needs none")

    with pytest.raises(RuntimeError, match="out of memory"):
        train(address, Failing())
    assert str(train(address, Checking())) == whole()


# -- being stopped ----------------------------------------------------------------------


class Stopping(Callback):
    """Sends this process a signal in a batch of the training, or of a validation."""

    def __init__(
        self, batch: int, *, validating: bool = False, number: int = signal.SIGTERM
    ) -> None:
        self.batch = batch
        self.number = number
        self.validating = validating

    def _seen(self) -> None:
        self.batch -= 1
        if self.batch == -1:
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, *args: Any) -> None:
        if not self.validating:
            self._seen()

    def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
        if self.validating and not trainer.sanity_checking:
            self._seen()


@pytest.mark.parametrize("place", [1, 4, 14])
def test_a_signal_saves_and_leaves_with_75(place: int) -> None:
    """Behind the batch, at the end of an epoch too; Lightning's own answer to it, which saves
    nothing and leaves with status 0, is not asked."""
    address = fresh_address()
    with pytest.raises(SystemExit) as stopped:
        train(address, Stopping(place), run_options={"every": None})
    assert stopped.value.code == 75
    assert steps_of(address)[0] == place + 1
    assert str(train(address)) == whole()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def stopping_early() -> EarlyStopping:
    options: Any = {"patience": 1, "min_delta": 100.0, "check_on_train_epoch_end": False}
    return EarlyStopping("val_loss", **options)  # it decides when it has validated


@pytest.mark.parametrize(
    ("batch", "callback", "options"),
    [
        (9, Callback, {}),
        (14, Callback, {}),
        (6, Callback, {"max_steps": 7, "max_epochs": -1}),
        (9, stopping_early, {}),
    ],
    ids=["an epoch's", "the last epoch's", "the last step", "before it stops early"],
)
def test_a_signal_in_the_last_batch_and_then_the_end(
    batch: int, callback: Any, options: Any
) -> None:
    """Killed before the hooks of the epoch's end have run: they run in the next process."""
    address = fresh_address()
    leaving = Leaving(address)
    with pytest.raises(SystemExit):
        train(address, callback(), Stopping(batch), leaving, run_options={"every": None}, **options)
    alone = str(train(fresh_address(), callback(), run_options=RARELY, **options))
    tail = next(left for left in leaving.left if steps_of(left))
    for left in (tail, address):
        assert max(steps_of(left)) == batch + 1
        assert str(train(left, callback(), run_options=RARELY, **options)) == alone


def test_a_signal_in_a_validation_is_answered_behind_it() -> None:
    address = fresh_address()
    with pytest.raises(SystemExit) as stopped:
        train(address, Stopping(1, validating=True), run_options={"every": None})
    assert stopped.value.code == 75
    assert str(train(address)) == whole()


def test_a_signal_in_the_sanity_check_does_not_end_with_status_0() -> None:
    class InSanity(Callback):
        def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
            trainer._signal_connector.register_signal_handlers()
            os.kill(os.getpid(), signal.SIGTERM)

    address = fresh_address()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(address, InSanity())
    signal.signal(signal.SIGTERM, before)  # the second one is not taken away by a trainer
    assert stopped.value.code == 75


def test_under_slurm_it_writes_no_file_and_requeues_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"NTASKS": "1", "JOB_ID": "7", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0"}
    for name, value in {**names, "NODEID": "0", "NTASKS_PER_NODE": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    address = fresh_address()
    with pytest.raises(SystemExit) as stopped:
        stopping = Stopping(6, number=signal.SIGUSR1)
        train(address, stopping, run_options={"quiet": False}, default_root_dir=tmp_path)
    assert stopped.value.code == 75
    assert "holdfast run --requeue" in capsys.readouterr().err
    assert max(steps_of(address)) == 7
    assert not list(tmp_path.iterdir())


# -- what Lightning writes --------------------------------------------------------------


def files(folder: Path, address: str, *callbacks: Callback, **options: Any) -> Any:
    """A training that logs to a CSV file and keeps files of the best two models."""
    kept = ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True)
    logger = CSVLogger(folder, **options.pop("logger", {}))

    def more(trainer: Any) -> Any:
        rows = (Path(logger.log_dir) / "metrics.csv").read_text()
        best = Path(kept.best_model_path)
        assert best.is_file()
        assert Path(kept.last_model_path).is_file()
        score = None if kept.best_model_score is None else float(kept.best_model_score)
        return rows, os.path.basename(logger.log_dir), score, len(kept.best_k_models)

    found = train(
        address,
        kept,
        *callbacks,
        logger=logger,
        enable_checkpointing=True,
        log_every_n_steps=2,
        more=more,
        **options,
    )
    return found


@pytest.mark.parametrize("version", [None, "mine"])
def test_logs_and_best_models_go_on(version: str | None, tmp_path: Path) -> None:
    """The rows of the file are those of a run that was left alone, without a second folder."""
    folder, address = tmp_path / "logs", fresh_address()
    leaving = Leaving(address, folder)
    options = {"logger": {"version": version}}
    whole = files(folder, address, leaving, **options)
    for place in (4, 9, len(leaving.left) - 2):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / f"left-{place}", folder)
        assert str(files(folder, leaving.left[place], **options)) == str(whole), place
        assert len(list((folder / "lightning_logs").iterdir())) == 1


# -- wrong use --------------------------------------------------------------------------


def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="from the middle"):
        copy.deepcopy(holdfast.lightning.Callback(holdfast.Run(fresh_address(), quiet=True)))

    class Direct(Model):
        def training_step(self, dataloader_iter: Any) -> Any:
            return self.loss(next(dataloader_iter)[0])

    with pytest.raises(UsageError, match="dataloader_iter"):
        train(fresh_address(), model=Direct)
    with pytest.raises(UsageError, match="by-sample"):
        train(fresh_address(), run_options={"data": "by-sample"})

    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path)
    trainer.fit(Model(), loader())
    file = tmp_path / "some.ckpt"
    trainer.save_checkpoint(file)
    address = fresh_address()
    with pytest.raises(UsageError, match="ckpt_path"):
        train(address, data=lambda: {"train_dataloaders": loader(), "ckpt_path": file})
    with pytest.raises(UsageError, match="smaller"):
        left = Leaving(address)
        train(address, left)
        train(left.left[12], max_epochs=1)


def test_a_checkpoint_of_lightnings_is_left_out_for_the_runs_own(tmp_path: Path) -> None:
    """As one that its OnExceptionCheckpoint wrote, which the next `fit` finds by itself."""
    address = fresh_address()
    leaving = Leaving(address)

    class Writing(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "old.ckpt")

    train(address, leaving, Writing())
    assert (
        str(
            train(
                leaving.left[12],
                data=lambda: {
                    "train_dataloaders": loader(),
                    "val_dataloaders": loader(shuffle=False),
                    "ckpt_path": tmp_path / "old.ckpt",
                },
            )
        )
        == whole()
    )


def test_each_fit_of_a_run_has_its_name() -> None:
    address = fresh_address()
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }

    def both(address: str, second: str, *others: Callback) -> Any:
        torch.manual_seed(0)
        model = Model()
        with holdfast.Run(address, every=1 if others else None, quiet=True) as run:
            made = [holdfast.lightning.Callback(run, name=name) for name in ("first", second)]
            Trainer(max_epochs=1, callbacks=[*others, made[0]], **quiet).fit(model, loader())
            Trainer(max_epochs=2, callbacks=[*others, made[1]], **quiet).fit(model, loader())
        return model.state_dict()["head.weight"].tolist()

    leaving = Leaving(address)
    whole = both(address, "second", leaving)
    for left in leaving.left[2::5]:
        assert both(left, "second") == whole
    with pytest.raises(UsageError, match="name"):
        both(fresh_address(), "first")


def test_folds_in_a_loop_of_the_run() -> None:
    def folds(address: str, *others: Callback) -> Any:
        torch.manual_seed(0)
        with holdfast.Run(address, every=1 if others else None, quiet=True) as run:
            callback = holdfast.lightning.Callback(run)
            losses = run.box(all=[]).all
            for _ in run.range(3):
                model = Model()
                trainer = Trainer(
                    max_epochs=2,
                    accelerator="cpu",
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    callbacks=[*others, callback],
                )
                trainer.fit(model, loader(), loader(shuffle=False))
                losses.append(float(trainer.callback_metrics["val_loss"]))
            return list(losses)

    address = fresh_address()
    leaving = Leaving(address)
    whole = folds(address, leaving)
    assert len(set(whole)) == 3
    for left in leaving.left[5::11]:
        assert folds(left) == whole


def test_a_quick_run_and_evaluations_leave_the_run_alone() -> None:
    address = fresh_address()
    train(address, fast_dev_run=True)
    assert steps_of(address) == []
    with holdfast.Run(fresh_address(), quiet=True) as run:
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            callbacks=[holdfast.lightning.Callback(run)],
        )
        trainer.validate(Model(), loader(shuffle=False), verbose=False)
        assert run.step == 0


def feed_on(ranks: int, samples: int, *, drop_last: bool = False, most: int = 0) -> EpochFeed:
    sampler: Any = DistributedSampler(range(samples), ranks, 0)  # type: ignore[arg-type]
    data: Any = DataLoader(range(samples), 2, sampler=sampler, drop_last=drop_last)  # type: ignore[arg-type]
    feed = EpochFeed(open_feed(data))
    feed.begin(most or len(data))
    return feed


def left_of(feed: EpochFeed) -> list[int]:
    found: list[int] = []
    while True:
        try:
            found += feed.take().tolist()
        except StopIteration:
            return found


def test_the_rest_of_an_epoch_that_is_dealt_out_anew_has_its_own_length() -> None:
    feed = feed_on(2, 24)
    feed.open(None)
    feed.take()
    for ranks, items in ((3, 5), (1, 11), (2, 6)):
        other = feed_on(ranks, 24)
        assert other.open(feed.state())
        assert other.most == other.length() == items
        again = feed_on(ranks, 24)
        again.open(other.state())  # the same ranks go on with what was dealt out to them
        assert again.most == items
        assert len(left_of(other)) == 2 * (items - 1) - (ranks == 3)
        assert other.last
        other.begin(4)
        assert other.open(None)
        assert other.most == 4
    limited = feed_on(1, 24, most=3)
    limited.open(feed.state())
    assert limited.most == 3


def test_an_epoch_of_which_no_batch_is_left_for_other_ranks_is_refused() -> None:
    feed = feed_on(2, 11, drop_last=True)
    feed.open(None)
    feed.take()
    feed.take()
    with pytest.raises(LoopError, match="no batch is left") as error:
        feed_on(4, 11, drop_last=True).open(feed.state())
    assert "as many ranks as before" in error.value.hint
