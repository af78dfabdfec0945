"""What LightGBM calls before each round, and what a checkpoint holds of a training."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import lightgbm
import numpy as np
from lightgbm.callback import CallbackEnv, EarlyStopException

from holdfast.errors import StateError, UsageError
from holdfast.lightgbm.others import plain, put_back, results_of, state_of
from holdfast.lightgbm.rows import free
from holdfast.lightgbm.sampling import Sampling
from holdfast.lightgbm.training import Training
from holdfast.run.rehearsal import Beside
from holdfast.run.run import Run
from holdfast.run.trainings import (
    check_is_alone,
    check_kind,
    check_name_is_new,
    check_run,
    tell_rehearsal,
)


class Callback:
    """Makes a training by `lightgbm.train` or an estimator's `fit` resumable.

        data = lightgbm.Dataset(X, y, free_raw_data=False)
        lightgbm.train(params, data, 500, callbacks=[holdfast.lightgbm.Callback(run)])

    The trees of a checkpoint are applied to the rows, which is why `lightgbm.train` must not free
    them; with an estimator there is nothing to say. Its place among other callbacks does not
    matter. Those that have `state_dict` and `load_state_dict` are saved, and LightGBM's own. Make
    it before the first loop of the run; inside such a loop (over folds, say) one may serve one
    training after the other.
    """

    before_iteration = True
    order = -sys.maxsize  # the first of all

    def __init__(
        self, run: Run, *, name: str = "booster", _to_free: Sequence[lightgbm.Dataset] = ()
    ) -> None:
        check_run(run)
        self._run = run
        self._name = name
        self._to_free = _to_free
        self._state = _State()
        run.track(**{name: self._state})

    def __call__(self, env: CallbackEnv) -> None:
        if not isinstance(env.model, lightgbm.Booster):
            raise UsageError(
                "lightgbm.cv trains the boosters of all folds at once, which cannot be resumed",
                hint="Train fold after fold: for fold in run.range(5): holdfast.lightgbm.train(…)",
            )
        if env.iteration == env.begin_iteration:
            self._begin(env, sys._getframe(1).f_locals)
        else:
            self._number = next(self._rounds, None)
        if self._number is None:
            return
        for callback in self._training.before:
            callback(self._shifted(env))
        self._state.sampling.vary(self._number)  # nothing may reset a parameter after it

    def _begin(self, env: CallbackEnv, caller: dict[str, Any]) -> None:
        check_name_is_new(self._run, self._name)
        self._training = training = Training(self, env, caller)
        training.call_instead(self._after)
        check_is_alone(self, training.before)
        tell_rehearsal(self._run, lambda: Beside([*training.before, *training.after], []))
        self._total = env.end_iteration - env.begin_iteration
        self._rounds = self._run.range(self._total, name=self._name)
        self._number = next(self._rounds, None)
        self._done = self._total if self._number is None else self._number
        state = self._state
        state.begin(training, goes_on=self._number != 0)
        if state.stopped and self._number is not None:  # early, but now there are more rounds
            self._rounds.end()
            self._number = next(self._rounds, None)
        if self._number is None:
            training.pretend()
        training.forget_rows()
        free(self._to_free)

    def _after(self, env: CallbackEnv) -> None:
        """After a round; calls all others that are called then."""
        if self._number is None:
            self._training.pretend(end=True)
            raise EarlyStopException(*self._state.result)
        env = self._shifted(env)
        results = env.evaluation_result_list or []
        newest = {f"{data}-{metric}": value for data, metric, value, *_ in results}
        if newest:
            self._run.log(**newest)
        last = env.iteration == env.end_iteration - 1
        try:
            for callback in self._training.after:
                self._training.call(callback, env)
        except EarlyStopException as stop:
            self._complete(stop.best_iteration, stop.best_score, early=not last)
            raise
        if last:
            self._complete(-1, results, early=False)
            if self._done:  # LightGBM would make as many rounds again as were done before
                raise EarlyStopException(*self._state.result)

    def _complete(self, best_iteration: int, best_score: Any, *, early: bool) -> None:
        """The training ends with this round."""
        self._state.result = (best_iteration, best_score)
        self._state.stopped = early
        self._state.sampling.end()
        self._training.clean()
        self._rounds.end()
        next(self._rounds, None)

    def _shifted(self, env: CallbackEnv) -> CallbackEnv:
        """With the number of the round in the whole training."""
        return CallbackEnv(
            env.model,
            env.params,
            env.iteration + self._done,
            env.begin_iteration,
            env.end_iteration,
            env.evaluation_result_list,
        )


class _State:
    """What a checkpoint holds of a training."""

    # With a `__dict__` each save would search LightGBM's objects for random generators.
    __slots__ = ("_training", "restored", "result", "sampling", "stopped")

    def __init__(self) -> None:
        self.restored: dict[str, Any] = {}
        self.result: tuple[int, Any] = (-1, [])
        """The best iteration (or -1) and the scores that the training has ended with."""
        self.stopped = False
        """Another callback has ended it early."""
        self._training: Training | None = None

    @property
    def waits(self) -> bool:
        """Whether no training has begun that this is of: nothing shows what is restored."""
        return self._training is None

    def begin(self, training: Training, *, goes_on: bool) -> None:
        self.stopped = False
        if goes_on and self.restored:
            self._put_back(training, self.restored)
        self.sampling = Sampling(training)
        self._training = training

    def state_dict(self) -> dict[str, Any]:
        if (training := self._training) is None:
            return self.restored
        return {
            "kind": "lightgbm",
            "model": np.frombuffer(training.text().encode(), np.uint8),
            "callbacks": {name: state_of(one) for name, one in training.named()},
            # Of a schedule of the learning rate, say: the model does not hold them.
            "parameters": training.changes(),
            "result": [self.result[0], plain(self.result[1])],
            "stopped": self.stopped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_kind(state, "LightGBM")
        self.restored = dict(state)
        if self._training is not None:
            if "model" not in state:
                raise StateError(
                    "the checkpoint is of a moment at which no booster was trained yet",
                    hint="Choose others: run.evaluate(fn, checkpoints=…).",
                )
            self._training.show(text_of(state))

    def _put_back(self, training: Training, saved: dict[str, Any]) -> None:
        """Make the booster and all around it what it was when it was saved."""
        text = text_of(saved)
        training.check_objective(text)
        training.load(text, saved["parameters"])
        for name, callback in training.named():
            if (state := saved["callbacks"].get(name)) is not None:
                put_back(callback, state)
                training.restored.append(callback)
        self.result = (saved["result"][0], results_of(saved["result"][1]))
        self.stopped = saved["stopped"]


def text_of(state: Mapping[str, Any]) -> str:
    """LightGBM's model."""
    return state["model"].tobytes().decode()
