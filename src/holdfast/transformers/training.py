"""One training: where the Trainer begins, its data, and the boundaries between its steps.

The Trainer computes where it goes on from a file, `trainer_state.json`, before it has an
optimizer. So it is given such a file that holds no more than that, from a look at the newest
checkpoint; all else is restored in place when everything exists, at `on_train_begin`. Should
that checkpoint turn out to be damaged, so that an older one is restored, the Trainer is made to
begin once more.

A step is complete when the Trainer asks for the batches of the next one, or when the last
epoch was evaluated. The batches come from a feed of the Trainer's own loader, which goes on in
mid-epoch; the batches of a step are fetched before the one before it is completed, since a
loader's workers may die of the signal that asks this process to stop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerState

from holdfast.errors import LoaderInterrupted, LoopError
from holdfast.run import position as at
from holdfast.run.iterables import open_feed
from holdfast.run.position import Label, Replay, Skip
from holdfast.run.random_states import RandomStates
from holdfast.run.run import Run
from holdfast.run.trainings import check_name_is_new, track_later
from holdfast.torch.accelerated import unwrapped
from holdfast.transformers.files import pretrained_files
from holdfast.transformers.known import running_loss
from holdfast.transformers.progress import Files, Place, Progress

_OVER = 10**30
"""Steps: more than any number of epochs has."""


class Elsewhere(Exception):
    """The training goes on at another place than it was planned."""


class Training:
    """Told by the callback what happens; tells the run."""

    def __init__(self, trainer: Any, callback: Any, run: Run, name: str) -> None:
        check_name_is_new(run, name)
        self._trainer = trainer
        self._run = run
        self._name = name
        self._progress = Progress(trainer, callback)
        self._random = RandomStates()
        self._loop: Any = None
        self._number: int | None = 0
        """Of the step in progress; None where all are done."""
        self._place: Place | None = None
        """The one that was planned; None where all is done."""
        self._feed: Any = None
        self._entering = True
        """The batches of the first step of this process are to come."""
        self._epoch = 0
        self._step = 0
        """Of the epoch: how many are complete, of the `_counted` in all."""
        self._counted = 0
        self._begins_epoch = True
        self._ends_epoch = False
        self._landed: dict[str, Any] = {}
        """Random states of the checkpoint."""
        self._evaluates: bool | None = None
        """What `args.eval_on_start` is, while it is off."""

    # -- where it begins ---------------------------------------------------------------

    def plan(self, sizes: tuple[int, int, int], folder: Path) -> None:
        """Write down for the Trainer where it goes on. `sizes`: see `known.sizes_of`."""
        _, self._steps_per_epoch, self._steps = sizes
        if self._loop is None:
            self._place = planned_place(self._run, self._name, self._steps)
        if self._place == Place():
            return
        args = self._trainer.args
        state = TrainerState(train_batch_size=args.train_batch_size)
        state.compute_steps(args, self._steps)
        # Divided by the steps of an epoch it is the epoch; that counts also where epochs ended
        # early, and in versions that know no better.
        place = self._place
        state.global_step = (
            _OVER if place is None else place.epoch * self._steps_per_epoch + place.step
        )
        state.save_to_json(str(folder / "trainer_state.json"))

    def begin(self, loader: Any, tokenizer: Any) -> None:
        """All objects exist. Restores them."""
        trainer, progress = self._trainer, self._progress
        progress.loss = running_loss(trainer)
        progress.steps_per_epoch = self._steps_per_epoch
        if self._loop is None:
            self._restore(tokenizer)
        else:  # once more; the model and the optimizer are the same objects
            scheduler, groups = self._kept  # a new scheduler sets the rates anew
            self._scheduler().load_state_dict(scheduler)
            for group, values in zip(trainer.optimizer.param_groups, groups, strict=True):
                group.update(values)
            track_later(self._run, {self._name: self._objects(tokenizer)}, restore=False)
        self._feed = open_feed(loader)
        self._entering = self._begins_epoch = True
        # The Trainer's own saves look for what a start from nothing has there.
        callbacks = [*trainer.callback_handler.callbacks, trainer.control]
        stateful = [one for one in callbacks if isinstance(one, ExportableState)]
        trainer.state.stateful_callbacks = TrainerState(
            stateful_callbacks=stateful  # type: ignore[arg-type]
        ).stateful_callbacks
        if progress.restored:
            progress.put_back()
        where = None if self._number is None else progress.restored_place()
        if where != self._place:
            self._place = where
            self._kept = (self._scheduler().state_dict(), _values(trainer.optimizer.param_groups))
            raise Elsewhere
        if progress.restored and trainer.args.eval_on_start:
            self._evaluates = vars(trainer.args)["eval_on_start"]
            vars(trainer.args)["eval_on_start"] = False  # it did so when the training began

    def _restore(self, tokenizer: Any) -> None:
        engine = self._run._session.engine
        objects = {self._name: self._objects(tokenizer)}
        if engine.started and engine.landed:
            track_later(self._run, objects, restore=False)  # the checkpoint has another training's
        else:
            self._run.track(**objects)
        self._loop = self._run.range(self._steps, name=self._name)
        self._loop.epoch_end = False
        self._number = next(self._loop, None)
        self._landed = self._random.capture()

    def _objects(self, tokenizer: Any) -> dict[str, Any]:
        trainer = self._trainer
        objects = {
            "model": trainer.model,
            "optimizer": unwrapped(trainer.optimizer),
            "scheduler": self._scheduler(),
            "progress": self._progress,
            "pretrained_files": Files(pretrained_files(trainer.model, tokenizer)),
        }
        if getattr(trainer.accelerator, "scaler", None) is not None:
            objects["scaler"] = trainer.accelerator.scaler
        return objects

    def _scheduler(self) -> Any:
        return unwrapped(self._trainer.lr_scheduler)

    # -- epochs and steps --------------------------------------------------------------

    def epoch_begins(self) -> None:
        self._counted = self._trainer.state.global_step
        self._begins_epoch = True
        if self._entering:
            self._epoch, self._step = self._place or Place()
        else:
            self._epoch, self._step = self._epoch + 1, 0
            self._feed.close()

    def epoch_ends(self) -> None:
        self._loop.epoch_end = self._ends_epoch = True

    def evaluated(self, loss: Any) -> None:
        """The Trainer has logged, evaluated and saved, behind a step or an epoch."""
        self._progress.loss = loss
        if self._ends_epoch:
            self._ends_epoch = False
            last = self._epoch + 1 >= self._trainer.state.num_train_epochs
            if last or self._trainer.control.should_training_stop:
                self._finish()

    def next_batches(self, count: int) -> list[Any]:
        """Those of the next step; fewer, or none, at the end of an epoch. Completes the step
        before. Raises SystemExit between steps once the process was asked to stop."""
        resumes = self._entering and bool(self._progress.restored)
        self._entering = False
        if resumes:
            self._enter()
        else:
            self._note(fetched=True)
        try:
            batches = self._fetch(count)
        except LoaderInterrupted:
            signals = self._run._session.stopping.signals
            if signals.installed and signals.wait():
                self._complete()
            raise
        if not resumes:
            if batches:
                self._complete()
        elif self._progress.data["fetched"]:
            self._random.apply(self._landed)
        return batches

    def _enter(self) -> None:
        """Go on in the data. Other callbacks have set themselves up by now, and an epoch."""
        progress = self._progress
        saved = progress.restored
        self._check_same(saved)
        progress.put_back()
        self._evaluate_on_start()
        progress.data = saved["data"]
        self._feed.open(saved["data"]["feed"])
        loader = self._feed.loader
        if self._begins_epoch and hasattr(loader, "set_epoch"):
            loader.set_epoch(self._epoch)
        self._begins_epoch = self._step == 0
        self._random.apply(saved["data"]["random"])

    def _check_same(self, saved: dict[str, Any]) -> None:
        """Raises LoopError where an epoch cannot go on behind the batches that were taken."""
        now = {
            "steps in an epoch": (saved["steps_per_epoch"], self._steps_per_epoch),
            "gradient_accumulation_steps": (
                saved["accumulation"],
                self._trainer.args.gradient_accumulation_steps,
            ),
        }
        for name, (before, here) in now.items():
            if self._step and before != here:
                raise LoopError(
                    f"the training stopped inside of an epoch ({self._step:,} steps taken), and "
                    f"{name} was {before}, is {here}",
                    hint="Put it back as it was for the rest of this epoch.",
                )

    def _note(self, *, fetched: bool) -> None:
        """Where the data are: what a checkpoint at this boundary holds. `fetched`: its random
        states will be those behind the batches that come next."""
        self._progress.data = {
            "feed": self._feed.state(),
            "random": self._random.capture(),
            "fetched": fetched,
        }

    def _fetch(self, count: int) -> list[Any]:
        if self._begins_epoch:
            self._begins_epoch = False
            self._feed.open(None)
        batches: list[Any] = []
        for _ in range(count):
            try:
                batches.append(self._feed.take())
            except StopIteration:
                break
        return batches

    def _complete(self) -> None:
        """The step in progress is complete, if the Trainer has made it."""
        made = self._count()
        if made == self._number:
            return
        self._progress.place = Place(self._epoch, self._step)
        self._number = next(self._loop, None)
        self._loop.epoch_end = False
        if self._number != made:
            raise LoopError(
                f"the Trainer has made {made:,} steps, and the run has counted {self._number}",
                hint="Do not change state.global_step or state.max_steps in a callback.",
            )

    def _count(self) -> int:
        """The steps that were made, of the epoch and in all."""
        made = self._trainer.state.global_step
        self._step += made - self._counted
        self._counted = made
        return made

    def _finish(self) -> None:
        """No step follows. (The Trainer is yet to load the best model, and to log.)"""
        made = self._count()
        if self._number is None or made == self._number:
            return
        if self._step >= self._steps_per_epoch:
            self._epoch, self._step = self._epoch + 1, 0
            self._feed.close()
        self._progress.place = Place(self._epoch, self._step)
        self._note(fetched=False)
        if made < self._steps:
            self._loop.end()  # early, and for good
        self._number = next(self._loop, None)

    def load_best(self) -> bool:
        """Load the best model where the folder that the Trainer has saved it to is gone and a
        checkpoint of the run is of the same step. Whether that was done."""
        state, manager = self._trainer.state, self._run.manager
        if Path(state.best_model_checkpoint).is_dir():
            return False
        found = [one for one in manager.checkpoints() if one.step == state.best_global_step]
        if not found:
            return False  # the Trainer says that there is none
        model = {self._name: {"model": self._trainer.model}}
        manager.restore(model, found[-1].id, only=[f"{self._name}/model"], rng=False)
        return True

    def close(self) -> None:
        """The training has ended, in whichever way."""
        self._evaluate_on_start()
        if self._feed is not None:
            self._feed.shutdown()

    def _evaluate_on_start(self) -> None:
        if self._evaluates is not None:
            vars(self._trainer.args)["eval_on_start"] = self._evaluates
            self._evaluates = None


def _values(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def planned_place(run: Run, name: str, steps: int) -> Place | None:
    """Where a training of `steps` steps will go on, by the newest checkpoint; None if it has
    nothing to do."""
    session = run._session
    engine = session.engine
    if engine.started:
        replay, resumed = engine._replay, session.restores.resumed
    else:
        found = run.manager.read_loop()
        replay = None if found is None else Replay(at.from_tree(found.loop))
        resumed = None if found is None else found.info
    if replay is None or resumed is None:
        return Place()
    met = replay.meet(engine.position, Label("range", name), steps)
    if isinstance(met, Skip):
        return None
    checkpoint = run.manager.load(resumed.id)
    saved_as = {new: old for old, new in session.tracked._rename.items() if old in checkpoint}
    return Place(*checkpoint[saved_as.get(name, name)]["progress"]["place"])
