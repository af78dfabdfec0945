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

Of several ranks each does all this, at the same steps: where they begin and what they save is
told among them by the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerState

from holdfast.errors import LoaderInterrupted, LoopError
from holdfast.run import position as at
from holdfast.run.iterables import open_feed
from holdfast.run.position import Label, Replay, Skip
from holdfast.run.random_states import RandomStates
from holdfast.run.rehearsal import Beside
from holdfast.run.run import Run
from holdfast.run.together import TogetherWith
from holdfast.run.trainings import check_name_is_new, tell_rehearsal, track_later
from holdfast.torch.accelerated import unwrapped
from holdfast.torch.indices import length_of
from holdfast.transformers.files import pretrained_files
from holdfast.transformers.known import running_loss, trained
from holdfast.transformers.plan import Here, Place, Plan, Sizes, planned, ranks_of
from holdfast.transformers.progress import Files, Progress

_OVER = 10**30
"""Steps: more than any number of epochs has."""


class Elsewhere(Exception):
    """The training goes on at another place than it was planned."""


class Training:
    """Told by the callback what happens; tells the run."""

    def __init__(
        self, trainer: Any, callback: Any, run: Run, name: str, ranks: TogetherWith
    ) -> None:
        check_name_is_new(run, name)
        tell_rehearsal(
            run, lambda: Beside(trainer.callback_handler.callbacks, [trainer, trainer.model])
        )
        self._trainer = trainer
        self._run = run
        self._name = name
        self._ranks = ranks
        self._progress = Progress(trainer, callback, ranks.ranks)
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

    def plan(self, sizes: Sizes, loader: Any, folder: Path) -> Plan:
        """Write down for the Trainer where it goes on, and tell how far it goes."""
        self._sizes, self._loader = sizes, loader
        if self._loop is None:
            replay, saved = newest_progress(self._run, self._name)
            self._plan = self._planned(saved)
            self._place = self._plan.place
            if replay is not None:
                at_loop = self._run._session.engine.position, Label("range", self._name)
                if isinstance(replay.meet(*at_loop, self._plan.steps), Skip):
                    self._place = None
        self._write_place(folder)
        return self._plan

    def _planned(self, saved: Mapping[str, Any] | None) -> Plan:
        args = self._trainer.args
        here = Here(
            self._ranks.ranks.size,
            args.gradient_accumulation_steps,
            length_of(self._loader),
            args.max_steps > 0,
        )
        return planned(saved, self._sizes, here, lambda feed: self._open_feed().left(feed))

    def _open_feed(self) -> Any:
        feed = open_feed(self._loader)
        feed.ranks = lambda: self._ranks.ranks
        return feed

    @property
    def _steps_per_epoch(self) -> int:
        return self._sizes.steps_per_epoch

    def _write_place(self, folder: Path) -> None:
        if self._place == Place():
            return
        args = self._trainer.args
        state = TrainerState(train_batch_size=args.train_batch_size)
        state.compute_steps(args, self._plan.steps)
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
            # A model in a wrapper is not prepared again: Accelerate would not know it any more, and
            # clip the gradients of FSDP1 by the norm of this rank's.
            models = trainer.accelerator._models
            if not any(one is trainer.model_wrapped for one in models):
                models.append(trainer.model_wrapped)
            track_later(self._run, {self._name: self._objects(tokenizer)}, restore=False)
        self._loader = loader
        self._feed = self._open_feed()
        self._entering = self._begins_epoch = True
        # The Trainer's own saves look for what a start from nothing has there.
        callbacks = [*trainer.callback_handler.callbacks, trainer.control]
        stateful = [one for one in callbacks if isinstance(one, ExportableState)]
        trainer.state.stateful_callbacks = TrainerState(
            stateful_callbacks=stateful  # type: ignore[arg-type]
        ).stateful_callbacks
        if progress.restored:
            progress.put_back()
        plan = self._plan if self._number is None else self._planned(progress.restored or None)
        if plan.steps != self._plan.steps:
            raise LoopError(
                f"the newest checkpoint is damaged; from the one before it the training has "
                f"{plan.steps:,} steps, and {self._plan.steps:,} were planned",
                hint="Start as many ranks, with the same batch size, as that one was saved with.",
            )
        progress.beyond = plan.beyond
        where = None if self._number is None else plan.place
        if where != self._place:
            self._plan, self._place = plan, where
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
        self._loop = self._run.range(self._plan.steps, name=self._name)
        self._loop.epoch_end = False
        self._number = next(self._loop, None)
        self._landed = self._random.capture()

    def _objects(self, tokenizer: Any) -> dict[str, Any]:
        trainer = self._trainer
        objects = {
            "model": trained(trainer),
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

    def has_evaluated(self) -> None:
        """What was evaluated is what has to be saved, should it be among the best."""
        if self._loop is not None:
            self._loop.waits = True

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
            stopping = self._run._session.stopping
            # Of several ranks none stops alone: the others train the next step.
            if stopping.alone and stopping.signals.installed and stopping.signals.wait():
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
        others = ranks_of(saved).size != self._ranks.ranks.size
        if not others:
            self._check_same(saved)
        progress.put_back()
        self._evaluate_on_start()
        progress.data = data = saved["data"]
        # On another number of ranks its steps were planned by what is left of the epoch.
        self._feed.open(data["feed"], fixed="" if others else "the Trainer has planned its steps")
        loader = self._feed.loader
        if self._begins_epoch and hasattr(loader, "set_epoch"):
            loader.set_epoch(self._epoch)
        goes_on = data["feed"]["at"] == "inside" and self._epoch == saved["place"][0]
        self._begins_epoch = self._step == 0 and not goes_on
        self._random.apply(data["random"])
        if progress.of_another:
            # It draws what rank 0 does, since the Trainer seeds all alike: samplers rely on it.
            progress.data = {**data, "fetched": False}

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
        self._loop.epoch_end = self._loop.waits = False
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
        if made < self._plan.steps:
            self._loop.end()  # early, and for good
        self._number = next(self._loop, None)

    def load_best(self) -> bool:
        """Load the best model where the folder that the Trainer has saved it to is gone and a
        checkpoint of the run is of the same step. Whether that was done."""
        state, manager = self._trainer.state, self._run.manager
        if self._ranks.all_agree(Path(state.best_model_checkpoint).is_dir()):
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


def newest_progress(run: Run, name: str) -> tuple[Replay | None, Mapping[str, Any] | None]:
    """What the newest checkpoint says of where the program goes on, and what it has saved of the
    training's progress. The same on all ranks."""
    session = run._session
    engine = session.engine
    if engine.started:
        replay, resumed = engine._replay, session.restores.resumed
    else:
        found = run.manager.read_loop()
        replay = None if found is None else Replay(at.from_tree(found.loop))
        resumed = None if found is None else found.info
    if replay is None or resumed is None:
        return None, None
    checkpoint = run.manager.load(resumed.id)
    saved_as = {new: old for old, new in session.tracked._rename.items() if old in checkpoint}
    saved = checkpoint.get(saved_as.get(name, name), {}).get("progress")
    return replay, saved if saved is not None and saved.get("kind") == "transformers" else None
