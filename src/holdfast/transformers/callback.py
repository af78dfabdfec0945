"""The callback, and how the Trainer's loop is told to the run."""

from __future__ import annotations

import inspect
import tempfile
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from holdfast.errors import UsageError
from holdfast.run.run import Run
from holdfast.run.trainings import check_run, expect_later, meet_ranks
from holdfast.transformers.known import (
    calling_trainer,
    check_known,
    check_supported,
    sizes_of,
    with_sizes,
    wrap,
)
from holdfast.transformers.training import Elsewhere, Training


class Callback(TrainerCallback):
    """Makes a Trainer's `train()` resumable.

        trainer = Trainer(model, args, ..., callbacks=[holdfast.transformers.Callback(run)])
        trainer.train()

    Its place among the other callbacks does not matter. The run saves as its `every=` says,
    between optimizer steps, and logs each number that the Trainer logs ("loss", "eval_loss").
    Under torchrun every process makes both, and all save together.
    `args.max_steps`, or what the epochs come to, is the total, whichever process trains them.

    name: of the training in checkpoints. Each training of a run that is not inside a loop of it
        needs its own.

    `train` raises UsageError for what cannot be resumed, StateError where the checkpoint is of
    another training, and SystemExit between two steps once the process was asked to stop.
    """

    def __init__(self, run: Run, *, name: str = "trainer") -> None:
        super().__init__()
        check_run(run)
        self._run = run
        self._name = name
        self._trainer: Any = None
        self._training: Training | None = None
        self._folder = ""
        expect_later(run, [name])

    # -- called by the Trainer as a callback ------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer: Any = calling_trainer(self)
        check_known(trainer)
        self._trainer = trainer
        wrap(trainer, "_inner_training_loop", partial(self._train, trainer))
        wrap(trainer, "set_initial_training_values", self._plan)
        wrap(trainer, "get_batch_samples", self._next_batches)
        wrap(trainer, "_maybe_log_save_evaluate", self._evaluated)
        wrap(trainer, "_load_from_checkpoint", self._load)
        wrap(trainer, "_load_best_model", self._load_best)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer is None or self._trainer.state is not state:
            raise UsageError(
                "holdfast.transformers.Callback was added to a Trainer that was made before",
                hint="Give it to the Trainer when that is made: Trainer(..., callbacks=[…]).",
            )
        assert self._training is not None
        self._training.begin(kwargs["train_dataloader"], kwargs.get("processing_class"))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._training is not None:
            self._training.epoch_begins()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._training is not None:
            self._training.epoch_ends()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        numbers = {
            name: value
            for name, value in (logs or {}).items()
            if isinstance(value, Real) and not isinstance(value, bool)
        }
        if numbers and self._training is not None:
            self._run.log(**numbers)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._training is not None:
            self._training.has_evaluated()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._training is not None:
            for _ in self._run.guard((None,)):  # an evaluation is a place to stop
                pass

    # -- around the Trainer's methods -------------------------------------------------

    def _train(self, trainer: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(*args, **kwargs)
        if given.arguments.get("resume_from_checkpoint") is not None:
            raise UsageError(
                "train(resume_from_checkpoint=…) and holdfast.transformers.Callback are two "
                "places to go on from",
                hint="Call trainer.train() alone: the run knows where to go on.",
            )
        ranks = meet_ranks(self._run)
        check_supported(trainer, ranks.ranks.size)
        self._trainer = trainer  # one callback may serve several
        self._training = Training(trainer, self, self._run, self._name, ranks)
        try:
            while True:
                with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
                    self._folder = folder
                    if self._run.resumed is not None:
                        given.arguments["resume_from_checkpoint"] = folder
                    try:
                        return original(*given.args, **given.kwargs)
                    except Elsewhere:
                        if trainer.is_fsdp_enabled:
                            # Where it is the one in the wrapper, the wrapper is kept; Transformers
                            # 4 would else take the wrappers off its layers, and leave them so.
                            trainer.model = trainer.accelerator.unwrap_model(trainer.model)
                        given.arguments["resume_from_checkpoint"] = folder
        finally:
            self._training.close()
            self._training = None

    def _plan(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer is about to look where it goes on: in our folder."""
        values = original(*args, **kwargs)
        if self._training is None:
            return values
        loader = inspect.signature(original).bind(*args, **kwargs).arguments["dataloader"]
        plan = self._training.plan(sizes_of(values), loader, Path(self._folder))
        return with_sizes(values, plan.epochs, plan.steps)

    def _next_batches(
        self, original: Any, epoch_iterator: Any, num_batches: int, *args: Any, **kwargs: Any
    ) -> Any:
        if self._training is not None:
            # The Trainer's own iterator is never asked: it would load what was seen again.
            epoch_iterator = iter(self._training.next_batches(num_batches))
        return original(epoch_iterator, num_batches, *args, **kwargs)

    def _evaluated(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if self._training is not None:
            loss = inspect.signature(original).bind(*args, **kwargs).arguments["tr_loss"]
            self._training.evaluated(loss)
        return result

    def _load(self, original: Any, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """A sharded model is loaded once it is sharded; what is in our folder is restored later."""
        if self._training is None or resume_from_checkpoint != self._folder:
            original(resume_from_checkpoint, *args, **kwargs)

    def _load_best(self, original: Any) -> None:
        if self._training is None or not self._training.load_best():
            original()
