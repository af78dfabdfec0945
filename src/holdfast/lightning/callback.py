"""The callback: what Lightning calls, and where in it a step of the run is complete."""

from __future__ import annotations

import itertools
import os
import signal
from types import FrameType
from typing import Any

from torch.utils._pytree import tree_unflatten

from holdfast.errors import UsageError
from holdfast.lightning.epoch_feed import EpochFeed
from holdfast.lightning.fetcher import feed_by
from holdfast.lightning.package import CallbackBase
from holdfast.lightning.processes import (
    IN_A_SCRIPT,
    IN_THE_MIDDLE,
    check_group,
    check_strategy,
    leave_together,
    model_of,
)
from holdfast.lightning.state import State
from holdfast.run.feeds import Mode
from holdfast.run.loop import Loop
from holdfast.run.position import Label
from holdfast.run.rehearsal import Beside
from holdfast.run.run import Run
from holdfast.run.trainings import (
    check_name_is_new,
    check_run,
    expect_later,
    tell_rehearsal,
    track_later,
)

_MODES: dict[str, Mode] = {"min_size": "min", "max_size_cycle": "cycle", "max_size": "max"}
_DEFAULT_NAME = "trainer"
_ADDED = 100  # epochs that callbacks may add: StochasticWeightAveraging adds one


class Callback(CallbackBase):
    """Makes `Trainer.fit` resumable: the same command goes on where it was interrupted.

        run = holdfast.Run("runs/fit", every="10min", keep="last=3 best=1:val_loss")
        trainer = Trainer(max_epochs=20, callbacks=[holdfast.lightning.Callback(run)])
        trainer.fit(model, train_loader, val_loader)

    A step of the run is a batch. What Lightning offers to its callbacks as metrics is logged.
    Its place among other callbacks does not matter: it is called first. Make it before the first
    loop of the run; each `fit` of a run that is not inside a loop of it needs a name of its own.

    With several processes (`devices=2, strategy="ddp"`, `num_nodes`, torchrun) each runs the same
    script, and all save together: see docs/lightning.md.

    `fit` raises UsageError for what cannot be resumed, and SystemExit in front of a batch once
    the process, or another one that trains with it, was asked to stop.
    """

    def __init__(self, run: Run, *, name: str = _DEFAULT_NAME) -> None:
        super().__init__()
        check_run(run)
        self._run = run
        self._name = name
        self._state = State()
        self._trainer: Any = None
        self._fitting = False
        self._goes_on = False
        self._advanced = False
        self._set_up = False
        self._sanity_steps: int | None = None
        self._epochs: Any = None
        self._batches: Loop | None = None
        self._guard: Any = None
        self._seen: dict[str, Any] = {}
        self._asked = False
        """For a stop, before the run listens."""
        self._whole: tuple[Any, Any] | None = None
        """What Lightning knows of the length of an epoch, while one of another length is on."""
        run.track(**{name: self._state})
        expect_later(run, [self._named(kind) for kind in ("model", "optimizers", "schedulers")])

    def __reduce__(self) -> Any:
        raise UsageError(IN_THE_MIDDLE, hint=IN_A_SCRIPT)

    def _named(self, kind: str) -> str:
        return kind if self._name == _DEFAULT_NAME else f"{self._name}_{kind}"

    # -- from the start of `fit` to the first batch ---------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._fitting = stage == "fit" and not trainer.fast_dev_run
        if not self._fitting:
            return
        self._check(trainer)
        check_name_is_new(self._run, self._name)
        # The list that is being gone through stays as it is.
        trainer.callbacks = [self, *(one for one in trainer.callbacks if one is not self)]
        self._trainer = trainer
        self._advanced = self._set_up = self._asked = False
        self._batches = self._guard = self._whole = None
        self._state.begin(trainer, lambda: [one for one in trainer.callbacks if one is not self])
        tell_rehearsal(self._run, lambda: Beside(trainer.callbacks, [trainer, pl_module]))
        self._state.total = _total(trainer)
        self._epochs = self._run.epochs(self._state.total, name=self._name)
        check_group(trainer, self._run._session.ranks.ranks.size)
        self._goes_on = not self._run._session.engine.landed and bool(self._state.restored)
        if self._goes_on:
            self._state.put_back_versions()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._fitting:
            return
        self._leave_out_file(trainer)
        self._track("model", model_of(trainer))
        self._state.live = True
        if self._goes_on:
            self._state.put_back()
            self._state.put_back_progress()
            self._state.show_epoch_of_data()
            self._sanity_steps, trainer.num_sanity_val_steps = trainer.num_sanity_val_steps, 0
        feed_by(trainer.fit_loop, self._take)
        # Lightning's own ends this process alone, or hangs: it speaks to the others in a handler.
        trainer._signal_connector._sigterm_notifier_fn = self._note_sigterm

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._fitting:
            return
        if self._goes_on:
            self._state.put_back_progress()
        self._give_signals_back(trainer)
        self._track_the_rest()

    def _check(self, trainer: Any) -> None:
        check_strategy(trainer)
        if self._run._session.feeds._policy != "refuse":
            raise UsageError(
                f"data={self._run._session.feeds._policy!r} is not possible with Lightning, whose "
                "loop counts batches itself",
                hint="Leave it out. An epoch that was begun must go on with the same loader.",
            )
        frames = self._run._session.engine.position.frames
        if any(frame.label.name == self._name for frame in frames):
            raise UsageError(
                f"a `fit` of this run (name={self._name!r}) was ended by an exception",
                hint="Make a new Run: it goes on from the newest checkpoint.",
            )

    def _leave_out_file(self, trainer: Any) -> None:
        """Of Lightning's own checkpoint, if it was to go on from one."""
        connector = trainer._checkpoint_connector
        if not connector._loaded_checkpoint:
            return
        path = connector._ckpt_path
        if not self._goes_on:
            raise UsageError(
                f"Lightning goes on from {path}, and this run has no checkpoint yet",
                hint="Start from its weights, Model.load_from_checkpoint(path), and leave "
                "ckpt_path out: the run knows where to go on.",
            )
        connector._loaded_checkpoint, connector._ckpt_path = {}, None
        self._say(f"going on from this run's checkpoint, not from Lightning's {path}")

    def _note_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def _give_signals_back(self, trainer: Any) -> None:
        """Lightning's handler of SIGTERM ends the training behind a batch, with status 0 and
        nothing saved; that for Slurm saves inside of the handler."""
        trainer._signal_connector.teardown()
        self._give_up_handler(trainer)
        cluster = trainer._accelerator_connector.cluster_environment
        if getattr(cluster, "auto_requeue", False):
            self._say(
                "Lightning does not requeue this Slurm job: start it with `holdfast run --requeue`"
            )

    def _give_up_handler(self, trainer: Any) -> None:
        vars(trainer._signal_connector).pop("_sigterm_notifier_fn", None)

    def _track(self, kind: str, value: Any) -> None:
        track_later(self._run, {self._named(kind): value}, restore=self._goes_on)

    def _track_the_rest(self) -> None:
        """Behind `on_fit_start` of others, which may have given optimizers more parameters."""
        if self._set_up:
            return
        self._set_up = True
        trainer = self._trainer
        if self._sanity_steps is not None:
            trainer.num_sanity_val_steps, self._sanity_steps = self._sanity_steps, None
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._track("optimizers", list(trainer.optimizers))
        self._track("schedulers", schedulers)

    # -- epochs and batches ------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._fitting:
            return
        if self._advanced:
            self._log()
        self._advanced = True
        self._batches = None
        if next(self._epochs, None) is None:
            raise UsageError(
                f"{self._run.address} is finished, and its trainer would train on",
                hint="To go on, raise max_epochs or max_steps; else use another address.",
            )
        self._seen = dict(trainer.callback_metrics)  # restored ones are old
        self._run.manager.drain()  # callbacks behind this one may change weights
        if self._asked:
            self._asked = False
            os.kill(os.getpid(), signal.SIGTERM)

    def _take(self, caller: FrameType) -> tuple[Any, bool]:
        """The next batch, and whether it is the last."""
        fit = self._trainer.fit_loop
        first = self._batches is None
        if self._batches is None:
            self._batches = self._open(fit)
        else:
            self._log()
        item = self._batches.advance(caller)
        if first:
            self._seen = dict(self._trainer.callback_metrics)  # restored ones are old
        combined, feed = fit._combined_loader, self._batches.feed
        assert isinstance(feed, EpochFeed)
        if first:
            self._plan(fit, feed.most)
        items = [item] if len(combined.flattened) == 1 else list(item)
        return tree_unflatten(items, combined._spec), feed.last

    def _open(self, fit: Any) -> Loop:
        """The loop over the batches of an epoch."""
        session, combined = self._run._session, fit._combined_loader
        loaders, mode = list(combined.flattened), _MODES[combined._mode]
        found = session.feeds.feed_for(loaders, mode)
        feed = found if isinstance(found, EpochFeed) else EpochFeed(found)
        feed.begin(fit.max_batches, fit.epoch_progress.current.processed, _samplers(loaders))
        for loader in loaders:
            session.tracked.feed(loader)
        label = Label("batches", "")
        return Loop(session.engine, label, feed, counted=True, loaders=tuple(loaders), mode=mode)

    def _plan(self, fit: Any, batches: int | None) -> None:
        """Have Lightning end and validate the epoch where its data end: what is left of one that
        was begun on another number of ranks is as long as it is dealt."""
        if batches is None or batches == fit.max_batches:
            return
        trainer = self._trainer
        self._whole = fit.max_batches, trainer.val_check_batch
        fit.max_batches = batches
        if isinstance(trainer.val_check_interval, float) and trainer.val_check_batch is not None:
            trainer.val_check_batch = max(1, int(batches * trainer.val_check_interval))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not self._fitting or self._batches is None:
            return
        if self._whole is not None:
            trainer.fit_loop.max_batches, trainer.val_check_batch = self._whole
            self._whole = None
        feed = self._batches.feed
        assert isinstance(feed, EpochFeed)
        feed.end()
        self._log()
        self._state.in_tail = True
        try:
            next(self._batches, None)
        finally:
            self._state.in_tail = False

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._fitting:
            self._log()
            self._run.manager.drain()  # averaged weights may be put in

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Behind `on_train_end` of all others, which may exchange the weights."""
        if not self._fitting:
            return
        self._give_up_handler(trainer)
        self._track_the_rest()
        if self._advanced:
            self._state.finished = True
            self._epochs.end()
        elif not self._goes_on:
            self._epochs.end()  # there was nothing to train
        if next(self._epochs, None) is not None:
            raise UsageError(
                "the trainer trains nothing more, and the run is not at its end",
                hint="Its limits (max_epochs, max_steps, limit_train_batches) are smaller than "
                "what was trained already, or zero.",
            )
        self._fitting = False

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if not self._fitting:
            return
        self._give_up_handler(trainer)
        status = self._run._session.settings.exit_code
        if isinstance(exception, SystemExit) and exception.code == status:
            leave_together(trainer, exception)

    # -- validation ----------------------------------------------------------------------

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self._fitting and not trainer.sanity_checking:
            self._guard = iter(self._run.guard(itertools.repeat(None)))

    def on_validation_batch_start(self, *args: Any, **named: Any) -> None:
        if self._guard is not None:
            next(self._guard)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._guard = None

    # -- metrics -------------------------------------------------------------------------

    def _log(self) -> None:
        """What is new among the metrics that callbacks are offered: it keeps old values."""
        metrics = dict(self._trainer.callback_metrics)
        fresh = {name: one for name, one in metrics.items() if self._seen.get(name) is not one}
        self._seen = metrics
        if fresh:
            self._run.log(**fresh)

    def _say(self, line: str) -> None:
        self._run._say(line)


def _samplers(loaders: list[Any]) -> list[Any]:
    """Those to which Lightning tells the number of an epoch."""
    holders = [*loaders, *(getattr(loader, "batch_sampler", None) for loader in loaders)]
    found = [getattr(holder, "sampler", None) for holder in holders]
    return [one for one in found if callable(getattr(one, "set_epoch", None))]


def _total(trainer: Any) -> int | None:
    """More than there can be epochs, and more again if the program is given more of them."""
    epochs, steps = trainer.fit_loop.max_epochs, trainer.max_steps
    if epochs == steps == -1:
        return None
    return max(epochs, 0) + max(steps, 0) + _ADDED
