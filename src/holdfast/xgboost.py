"""Holdfast for XGBoost: boosting goes on at the round where it was interrupted.

    run = holdfast.Run("runs/boost", every="5min", keep="last=2 best=1:valid-auc:max")
    booster = holdfast.xgboost.train(
        params, dtrain, 500, run=run, evals=[(dvalid, "valid")], early_stopping_rounds=20
    )

or, for `xgboost.train` and the estimators of `xgboost.sklearn`, a callback:

    model = xgboost.XGBClassifier(n_estimators=500, callbacks=[holdfast.xgboost.Callback(run)])

A checkpoint holds the model as UBJSON (no pickle), the history of the metrics, and the state of
the other callbacks. The rounds are the total: started again after 200 of 500, 300 follow.

**Bit for bit.** XGBoost draws rows and columns from a generator that no file holds, and its
updaters draw from it when they are made. Where a training samples (`subsample`, `colsample_by…`,
`rate_drop` of DART), each round is therefore seeded by its number (`seed_per_iteration`) and has
updaters of its own: the booster equals an uninterrupted one's, but not that of the same
parameters without Holdfast. Where nothing is sampled, nothing is changed.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from holdfast.errors import HoldfastError, StateError, UsageError
from holdfast.run.rehearsal import Beside
from holdfast.run.run import Run
from holdfast.run.trainings import (
    check_is_alone,
    check_kind,
    check_name_is_new,
    check_run,
    numbered,
    saved_training,
    tell_rehearsal,
)

try:
    import xgboost
    from xgboost.callback import CallbackContainer, EarlyStopping, TrainingCallback
except ModuleNotFoundError as error:
    if error.name != "xgboost":
        raise
    raise HoldfastError(
        "holdfast.xgboost needs XGBoost", hint="pip install 'holdfast[xgboost]'"
    ) from None

__all__ = ["Callback", "load_model", "train"]

# What changes in it from round to round.
_STOPPING = ("stopping_history", "best_scores", "current_rounds", "starting_round")
_SAMPLING = ("subsample", "colsample_bytree", "colsample_bylevel", "colsample_bynode")


def train(
    params: dict[str, Any],
    dtrain: xgboost.DMatrix,
    num_boost_round: int = 10,
    *,
    run: Run,
    name: str = "booster",
    callbacks: Sequence[TrainingCallback] | None = None,
    **options: Any,
) -> xgboost.Booster:
    """`xgboost.train` that goes on where it was interrupted; the booster after all rounds.

    num_boost_round: how many there are in total, whichever process makes them.
    run: saves as its `every=` says, and logs each metric as "data-metric": "valid-auc".
    name: of the booster in checkpoints. Each training of a run that is not inside a loop of it
        needs its own.
    options: as of `xgboost.train`.

    Raises UsageError for what cannot be resumed, StateError where the checkpoint is of another
    training, and SystemExit at a round's end once the process was asked to stop.
    """
    return xgboost.train(
        params,
        dtrain,
        num_boost_round,
        callbacks=[*(callbacks or ()), Callback(run, name=name)],
        **options,
    )


def load_model(ref: str, name: str = "booster") -> xgboost.Booster:
    """The booster of a checkpoint: `load_model("runs/boost@best")`. One that `holdfast import` has
    made of a file is called "model".

    Raises StateError if the checkpoint has none of that name.
    """
    state = saved_training(ref, name, "XGBoost", bytes)
    if isinstance(state, bytes):
        return xgboost.Booster(model_file=bytearray(state))
    return xgboost.Booster(model_file=_joined(state["model"]))


class Callback(TrainingCallback):
    """Makes a training by `xgboost.train` or an estimator's `fit` resumable.

        xgboost.train(params, dtrain, 500, callbacks=[holdfast.xgboost.Callback(run)])

    Its place among other callbacks does not matter: it is called first. Those that have
    `state_dict` and `load_state_dict` are saved, and XGBoost's own. Make it before the first loop
    of the run; inside such a loop (over folds, say) one may serve one training after the other.
    """

    def __init__(self, run: Run, *, name: str = "booster") -> None:
        super().__init__()
        check_run(run)
        self._run = run
        self._name = name
        self._state = _State()
        run.track(**{name: self._state})

    def before_training(self, model: Any) -> Any:
        if not isinstance(model, xgboost.Booster):
            raise UsageError(
                "xgboost.cv trains a booster of each fold in turn, which cannot be resumed",
                hint="Train fold after fold: for fold in run.range(5): holdfast.xgboost.train(…)",
            )
        if xgboost.collective.get_world_size() > 1:
            raise UsageError("several XGBoost workers that train together cannot be resumed yet")
        check_name_is_new(self._run, self._name)
        container, training = _surroundings(self)
        check_is_alone(self, container.callbacks)
        if dict(training["params"]).get("process_type") == "update":
            raise UsageError(
                'process_type="update" cannot be resumed: no file holds the trees that are not '
                "updated yet",
                hint="Do it without Holdfast: it takes less than to make these trees.",
            )
        # Who asks them before training goes on with what it had: a set, until XGBoost 3.
        container.callbacks = [self, *(one for one in container.callbacks if one is not self)]
        others = container.callbacks[1:]
        tell_rehearsal(self._run, lambda: Beside(others, []))
        self._total = int(training["num_boost_round"])
        self._rounds = self._run.range(self._total, name=self._name)
        self._number = next(self._rounds, None)
        self._begins = True
        if self._number != 0 and self._state.restored:
            # Not in place: parameters that XGBoost has looked at are lost by that.
            data = [training["dtrain"], *(one for one, _ in training["evals"])]
            wanted, saved = _kind(model), _kind(xgboost.Booster(model_file=self._state.model))
            if wanted != saved:
                changed = [
                    f"{name} was {saved[name]}, is {wanted[name]}"
                    for name in saved
                    if saved[name] != wanted[name]
                ]
                raise StateError(
                    f"the checkpoint is of another kind of booster: {'; '.join(changed)}",
                    hint="Put the parameters back, or start the run at another address.",
                )
            model = xgboost.Booster(training["params"], data, self._state.model)
        self._state.begin(model, container, self._total)
        if self._number != 0:
            self._go_on(self._total if self._number is None else self._number)
        return model

    def before_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        if self._begins:
            self._begins = False
            if self._number != 0:
                self._state.put_back_callbacks()
        else:
            self._number = next(self._rounds, None)
        if self._number is None or self._state.stopped:
            return True
        self._state.sampling.vary(self._number)
        return False

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        newest = {
            f"{data}-{metric}": values[-1]
            for data, metrics in evals_log.items()
            for metric, values in metrics.items()
        }
        if newest:
            self._run.log(**newest)
        return False

    def after_training(self, model: Any) -> Any:
        if self._number is not None:
            if self._number + 1 < self._total:
                self._state.stopped = True  # early, and for good
            self._rounds.end()
            next(self._rounds, None)
        vars(model).pop("update", None)
        return model

    def _go_on(self, done: int) -> None:
        """Behind `done` rounds that another process has made."""
        self._state.put_back()
        booster = self._state.booster
        update = booster.update

        def shifted(dtrain: Any, iteration: int, fobj: Any = None) -> None:
            update(dtrain, iteration=done + iteration, fobj=fobj)

        booster.update = shifted  # type: ignore[method-assign]
        container = self._state.container
        container.callbacks = [self, *(_Shifted(one, done) for one in container.callbacks[1:])]


class _State:
    """What a checkpoint holds of a training."""

    # With a `__dict__` each save would search XGBoost's objects for random generators.
    __slots__ = (
        *("restored", "stopped", "booster", "container", "sampling"),
        *("_begun", "_total", "_callbacks", "_parameters", "_aside"),
    )

    def __init__(self) -> None:
        self.restored: dict[str, Any] = {}
        self.stopped = False
        """Another callback has ended it."""
        self._begun = False
        self._aside: xgboost.Booster | None = None
        """Has what the live booster is made of, while that shows another checkpoint's."""

    @property
    def waits(self) -> bool:
        """Whether no training has begun that this is of: nothing shows what is restored."""
        return not self._begun

    @property
    def model(self) -> bytearray:
        """The booster that was restored, as UBJSON."""
        return _joined(self.restored["model"])

    def begin(self, booster: xgboost.Booster, container: CallbackContainer, total: int) -> None:
        self.booster = booster
        self.container = container
        self._total = total
        self.sampling = _Sampling(booster)
        self.stopped = False
        self._begun = True
        self._callbacks = list(container.callbacks)
        self._parameters = _parameters(booster)

    def state_dict(self) -> dict[str, Any]:
        if not self._begun:
            return self.restored
        now = _parameters(self.booster)
        return {
            "kind": "xgboost",
            "model": _cut(self.booster.save_raw("ubj")),
            "history": {
                data: {metric: list(values) for metric, values in metrics.items()}
                for data, metrics in self.container.history.items()
            },
            "callbacks": {name: _state_of(callback) for name, callback in _named(self._callbacks)},
            # Of a schedule of the learning rate, say: the model does not hold them.
            "parameters": {
                name: value for name, value in now.items() if value != self._parameters.get(name)
            },
            "stopped": self._total if self.stopped else 0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_kind(state, "XGBoost")
        self.restored = dict(state)
        if self._begun:
            self._show()

    def _show(self) -> None:
        """Have the live booster be the one that was restored: `run.evaluate` goes through those of
        its checkpoints, and gives the live one back in the end."""
        if self._aside is not None:
            _exchange(self.booster, self._aside)
            self._aside = None
        if "model" not in self.restored:
            raise StateError(
                "the checkpoint is of a moment at which no booster was trained yet",
                hint="Choose others: run.evaluate(fn, checkpoints=…).",
            )
        if self.model == self.booster.save_raw("ubj"):
            return
        if any(getattr(callback, "save_best", False) for callback in self._callbacks):
            raise UsageError(
                "EarlyStopping(save_best=True) returns a booster that is not the training's, so no "
                "checkpoint can be put into it",
                hint="Load them: run.manager.evaluate(lambda c: "
                "score(holdfast.xgboost.load_model(c.info.ref)), metric=…)",
            )
        self._aside = xgboost.Booster(model_file=self.model)
        _exchange(self.booster, self._aside)

    def put_back(self) -> None:
        """Make all around the booster what it was when it was saved."""
        saved = self.restored
        if saved.get("parameters"):
            self.booster.set_param(saved["parameters"])
        for data, metrics in saved.get("history", {}).items():
            history = self.container.history.setdefault(data, OrderedDict())
            history.update((metric, list(values)) for metric, values in metrics.items())
        self.stopped = saved.get("stopped", 0) >= self._total  # else more rounds are asked for

    def put_back_callbacks(self) -> None:
        """As late as possible: when training begins they set themselves up."""
        saved = self.restored.get("callbacks", {})
        for name, callback in _named(self._callbacks):
            if name in saved:
                _put_back(callback, saved[name])


class _Sampling:
    """Makes what a round draws depend on its number alone."""

    def __init__(self, booster: xgboost.Booster) -> None:
        self._booster = booster
        self._updaters: list[str] | None = None
        """Their names in two ways, in turn; [] if nothing is drawn."""

    def vary(self, number: int) -> None:
        """Before the round `number`."""
        if self._updaters is None:
            self._updaters = self._ways()
        if self._updaters:
            self._booster.set_param("updater", self._updaters[number % 2])

    def _ways(self) -> list[str]:
        config = json.loads(self._booster.save_config())
        booster = config["learner"]["gradient_booster"]
        trees = booster.get("gbtree", booster)
        parameters = trees.get("tree_train_param", {})
        samples = any(float(parameters.get(name, 1)) < 1 for name in _SAMPLING)
        drops = float(booster.get("dart_train_param", {}).get("rate_drop", 0)) > 0
        ranks = config["learner"]["objective"]["name"].startswith("rank:")
        if not (samples or drops or ranks):
            return []
        self._booster.set_param("seed_per_iteration", "true")
        names = [updater["name"] for updater in trees["updater"]]
        # A change of the names makes new updaters, and "sync" does nothing on one machine.
        ways = [",".join(names), ",".join([*names, "sync"])]
        with warnings.catch_warnings():  # it warns once of whoever does this
            warnings.filterwarnings("ignore", ".*manually specified the `updater`.*")
            self._booster.set_param("updater", ways[0])
            self._booster.save_config()
        return ways


class _Shifted(TrainingCallback):
    """Tells another callback the number of a round in the whole training."""

    def __init__(self, callback: TrainingCallback, by: int) -> None:
        super().__init__()
        self._callback = callback
        self._by = by

    def after_training(self, model: Any) -> Any:
        return self._callback.after_training(model)

    def before_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        return self._callback.before_iteration(model, epoch + self._by, evals_log)

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        return self._callback.after_iteration(model, epoch + self._by, evals_log)


def _surroundings(callback: Callback) -> tuple[CallbackContainer, dict[str, Any]]:
    """What calls the callbacks, and the variables of `xgboost.train`: callbacks are told neither.

    Raises UsageError outside of `xgboost.train` and what calls it.
    """
    container: CallbackContainer | None = None
    frame = sys._getframe(2)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, CallbackContainer) and callback in found.callbacks:
            container = found
        if container is not None and "num_boost_round" in frame.f_locals:
            return container, frame.f_locals
        frame = frame.f_back
    raise UsageError(
        f"holdfast.xgboost.Callback does not know what calls it in XGBoost {xgboost.__version__}",
        hint="Give it to xgboost.train or to an estimator of xgboost.sklearn.",
    )


_TREES = b"L" + len(b"trees").to_bytes(8, "big") + b"trees[#L"
_COUNT_BYTES = 8
"""In front of the trees in XGBoost's UBJSON: their name and number; a length has 8 bytes."""


def _cut(model: bytearray) -> dict[str, Any]:
    """The model in two parts: one that grows at its end only, of which each save stores what is
    new, and a small one in front of it."""
    data = np.frombuffer(model, np.uint8)
    found = model.rfind(_TREES)
    if found < 0:
        return {"head": data}
    at = found + len(_TREES) + _COUNT_BYTES
    return {"head": data[:at], "trees": data[at:]}


def _joined(parts: Mapping[str, Any]) -> bytearray:
    return bytearray(b"".join(parts[name].tobytes() for name in ("head", "trees") if name in parts))


def _kind(booster: xgboost.Booster) -> dict[str, str]:
    """What XGBoost would not notice if it were another one's: it trains on, from nothing, or with
    trees that say something else."""
    learner = json.loads(booster.save_config())["learner"]
    return {
        "booster": learner["gradient_booster"]["name"],
        "objective": learner["objective"]["name"],
        "num_class": learner["learner_model_param"]["num_class"],
    }


def _exchange(one: xgboost.Booster, other: xgboost.Booster) -> None:
    """What they are made of. Loaded in place, a booster would lose its parameters."""
    one.handle, other.handle = other.handle, one.handle


def _parameters(booster: xgboost.Booster) -> dict[str, str]:
    """Those of its trees, as XGBoost writes them."""
    trained = json.loads(booster.save_config())["learner"]["gradient_booster"]
    return dict(trained.get("gbtree", trained).get("tree_train_param", {}))


def _named(callbacks: Iterable[TrainingCallback]) -> Iterator[tuple[str, TrainingCallback]]:
    """Those that have a state, by their class and their place among those of that class."""
    return numbered(
        callback
        for callback in callbacks
        if isinstance(callback, EarlyStopping) or hasattr(callback, "load_state_dict")
    )


def _state_of(callback: Any) -> Any:
    if hasattr(callback, "state_dict"):
        return callback.state_dict()
    return {name: copy.deepcopy(getattr(callback, name)) for name in _STOPPING}


def _put_back(callback: Any, state: Any) -> None:
    if hasattr(callback, "load_state_dict"):
        callback.load_state_dict(state)
    else:
        vars(callback).update(state)
