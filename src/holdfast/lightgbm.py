"""Holdfast for LightGBM: boosting goes on at the round where it was interrupted.

    run = holdfast.Run("runs/boost", every="5min", keep="last=2 best=1:valid_0-auc:max")
    booster = holdfast.lightgbm.train(
        params, dtrain, 500, run=run, valid_sets=[dvalid], callbacks=[early_stopping(20)]
    )

or, for `lightgbm.train` and the estimators of `lightgbm.sklearn`, a callback:

    lightgbm.LGBMClassifier(n_estimators=500).fit(X, y, callbacks=[holdfast.lightgbm.Callback(run)])

A checkpoint holds the model as LightGBM's text (no pickle), and the state of the other callbacks.
The rounds are the total: started again after 200 of 500, 300 follow.

**Bit for bit.** The text holds leaf values exactly, and LightGBM adds them up in one order, so a
new booster that begins with the predictions of the old trees has the very scores. What no file
holds are the generators that draw rows and columns. Where a training samples, each round is
therefore seeded by its number: the booster equals an uninterrupted one's, but not that of the
same parameters without Holdfast. Where nothing is sampled, nothing is changed. DART is refused: it
changes trees that it has made, and LightGBM cannot do that to trees that it has read.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.errors import HoldfastError, UsageError
from holdfast.manager import open as open_checkpoint
from holdfast.run.run import Run

try:
    import lightgbm
    from lightgbm.basic import _LIB, _ConfigAliases, _safe_call
    from lightgbm.callback import CallbackEnv, EarlyStopException
except ModuleNotFoundError as error:
    if error.name != "lightgbm":
        raise
    raise HoldfastError(
        "holdfast.lightgbm needs LightGBM", hint="pip install 'holdfast[lightgbm]'"
    ) from None

__all__ = ["Callback", "load_model", "train"]

_STOPPING = ("best_score", "best_iter", "best_score_list", "enabled", "first_metric")


def train(
    params: dict[str, Any],
    train_set: lightgbm.Dataset,
    num_boost_round: int = 100,
    *,
    run: Run,
    name: str = "booster",
    callbacks: Sequence[Callable[..., Any]] | None = None,
    **options: Any,
) -> lightgbm.Booster:
    """`lightgbm.train` that goes on where it was interrupted; the booster after all rounds.

    num_boost_round: how many there are in total, whichever process makes them.
    run: saves as its `every=` says, and logs each metric as "data-metric": "valid_0-auc".
    name: of the booster in checkpoints. Each training of a run that is not inside a loop of it
        needs its own.
    options: as of `lightgbm.train`.

    Raises UsageError for what cannot be resumed, StateError where the checkpoint is of another
    training, and SystemExit at a round's end once the process was asked to stop.
    """
    valid = options.get("valid_sets") or []
    sets = [train_set, *([valid] if isinstance(valid, lightgbm.Dataset) else valid)]
    # LightGBM frees what a Dataset was made of before it calls any callback.
    freed = [one for one in sets if one.free_raw_data]
    for one in freed:
        one.free_raw_data = False
    try:
        return lightgbm.train(
            params,
            train_set,
            num_boost_round,
            callbacks=[*(callbacks or ()), Callback(run, name=name, _free=freed)],
            **options,
        )
    finally:
        _free(freed)


def load_model(ref: str, name: str = "booster") -> lightgbm.Booster:
    """The booster of a checkpoint: `load_model("runs/boost@best")`.

    Raises StateError if the checkpoint has none of that name.
    """
    return lightgbm.Booster(model_str=_text_of(open_checkpoint(ref)[name]))


class Callback:
    """Makes a training by `lightgbm.train` or an estimator's `fit` resumable.

        lightgbm.train(params, dtrain, 500, callbacks=[holdfast.lightgbm.Callback(run)])

    A Dataset that is given to `lightgbm.train` must be made with `free_raw_data=False`: the trees
    of the checkpoint are applied to it. Its place among other callbacks does not matter. Those that
    have `state_dict` and `load_state_dict` are saved, and LightGBM's own. Make it before the first
    loop of the run; inside such a loop (over folds, say) one may serve one training after the other.
    """

    before_iteration = True
    order = -sys.maxsize  # the first

    def __init__(
        self, run: Run, *, name: str = "booster", _free: Sequence[lightgbm.Dataset] = ()
    ) -> None:
        self._run = run
        self._name = name
        self._freed = _free
        self._state = _State()
        run.track(**{name: self._state})
        self._used = False
        self._rounds: Any = None

    def __call__(self, env: CallbackEnv) -> None:
        if not isinstance(env.model, lightgbm.Booster):
            raise UsageError(
                "lightgbm.cv trains the boosters of all folds at once, which cannot be resumed",
                hint="Train fold after fold: for fold in run.range(5): holdfast.lightgbm.train(…)",
            )
        if env.iteration == env.begin_iteration:
            self._begin(env)
        else:
            self._number = next(self._rounds, None)
        if self._number is None:
            return
        for callback in self._before:
            callback(self._shifted(env))
        self._state.sampling.vary(self._number)  # nothing may reset a parameter after it

    def _begin(self, env: CallbackEnv) -> None:
        if self._used and not self._run._session.engine.position.inside:
            raise UsageError(
                f"this run had a training named {self._name!r} before this one",
                hint="Give each a callback of its own, with a name: Callback(run, name=…)",
            )
        self._used = True
        training = _Training(self, env, sys._getframe(2).f_locals)
        self._before = training.take_callbacks(self._after)
        self._total = env.end_iteration - env.begin_iteration
        self._rounds = self._run.range(self._total, name=self._name)
        self._number = next(self._rounds, None)
        self._done = self._total if self._number is None else self._number
        if self._number != 0 and self._state.restored:
            self._state.put_back(training, whole=self._number is None)
        self._state.begin(training)
        _free(self._freed)

    def _after(self, env: CallbackEnv) -> None:
        state = self._state
        if self._number is None:
            state.training.release()
            raise EarlyStopException(*state.end)
        env = self._shifted(env)
        results = env.evaluation_result_list or []
        newest = {f"{data}-{metric}": value for data, metric, value, *_ in results}
        if newest:
            self._run.log(**newest)
        last = env.iteration == env.end_iteration - 1
        try:
            for callback in state.training.after:
                state.training.call(callback, env)
        except EarlyStopException as stop:
            self._complete(stop.best_iteration, stop.best_score)
            raise
        if last:
            self._complete(-1, results)
            if self._done:  # LightGBM would make as many rounds as were done before
                raise EarlyStopException(-1, results)

    def _complete(self, best_iteration: int, best_score: Any) -> None:
        """The training ends with this round."""
        self._state.end = (best_iteration, best_score)
        self._state.sampling.end()
        self._state.training.clean()
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

    def __init__(self) -> None:
        self.restored: dict[str, Any] = {}
        self.end: tuple[int, Any] | None = None
        """The best iteration and score, once the training has ended."""
        self._begun = False

    def begin(self, training: _Training) -> None:
        self.training = training
        self.sampling = _Sampling(training)
        self.end = self.end if self.restored else None
        self._begun = True

    def state_dict(self) -> dict[str, Any]:
        if not self._begun:
            return self.restored
        training = self.training
        return {
            "model": np.frombuffer(training.text().encode(), np.uint8),
            "callbacks": {name: _state_of(one) for name, one in training.named()},
            # Of a schedule of the learning rate, say: the model does not hold them.
            "parameters": training.changes(),
            "end": None if self.end is None else [self.end[0], _plain(self.end[1])],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restored = dict(state)

    def put_back(self, training: _Training, *, whole: bool) -> None:
        """Make the booster and all around it what it was when it was saved."""
        saved = self.restored
        training.load(_text_of(saved), saved["parameters"], whole=whole)
        for name, callback in training.named():
            if (state := saved["callbacks"].get(name)) is not None:
                _put_back(callback, state)
                training.restored.append(callback)
        self.end = None
        if saved["end"] is not None:
            self.end = (saved["end"][0], _results(saved["end"][1]))


class _Training:
    """A call of `lightgbm.train`: what it has made, and what it has kept to itself."""

    def __init__(self, callback: Callback, env: CallbackEnv, scope: dict[str, Any]) -> None:
        self._lists = [scope.get(f"callbacks_{when}_iter") for when in ("before", "after")]
        if (
            not all(isinstance(one, list) for one in self._lists)
            or self._lists[0][0] is not callback
        ):
            raise UsageError(
                f"holdfast.lightgbm.Callback does not know what calls it in "
                f"LightGBM {lightgbm.__version__}",
                hint="Give it to lightgbm.train or to an estimator of lightgbm.sklearn.",
            )
        self.booster: Any = env.model
        self.parameters = env.params
        self._first = dict(env.params), dict(self.booster.params)
        self.own_objective = scope.get("fobj") is not None
        self._evaluates_training = bool(scope.get("is_valid_contain_train"))
        self._keeps_booster = bool(scope.get("keep_training_booster"))
        self._inert = 0, 0
        """The first of trees that say nothing, and how many there are."""
        self.restored: list[Any] = []
        """Callbacks that must not begin again when they are called next."""
        self.config = self.settings()
        self._refuse()
        rows = _rows_of_an_estimator(self.booster)
        self._data = [(one, _source_of(one, rows)) for one in self._sets()]
        self._read_before = self.booster.current_iteration()
        self._prepare()

    def _sets(self) -> list[lightgbm.Dataset]:
        return [self.booster.train_set, *self.booster.valid_sets]

    def take_callbacks(self, after: Callable[[CallbackEnv], None]) -> list[Any]:
        """Those that are called before a round. `after` is called instead of the others."""
        before, self.after = (list(one) for one in self._lists)
        self._lists[0][1:] = []
        self._lists[1][:] = [after]
        self._callbacks = [*before[1:], *self.after]
        return before[1:]

    def call(self, callback: Any, env: CallbackEnv) -> None:
        """Call one of those `after` a round."""
        if callback in self.restored:
            self.restored.remove(callback)
            if hasattr(callback, "cmp_op"):  # of early stopping: functions, which it makes first
                kept = {name: getattr(callback, name) for name in _STOPPING}
                callback._init(env)
                vars(callback).update(kept)
        callback(env)

    def named(self) -> Iterator[tuple[str, Any]]:
        """Callbacks that have a state, by their class and their place among those of that class."""
        counts: dict[str, int] = {}
        for callback in self._callbacks:
            own = hasattr(callback, "eval_result") or hasattr(callback, "best_score_list")
            if own or hasattr(callback, "load_state_dict"):
                name = type(callback).__qualname__
                number = counts[name] = counts.get(name, -1) + 1
                yield f"{name}-{number}", callback

    def settings(self) -> dict[str, str]:
        """All parameters of the booster that LightGBM knows, as it writes them."""
        text = self.booster.model_to_string(num_iteration=1, start_iteration=0)
        return dict(re.findall(r"^\[(\w+): (.*)\]$", text, re.MULTILINE))

    def value(self, name: str) -> Any:
        """Of a parameter, exactly: the booster's text rounds it."""
        given = self.booster.params
        names = [name, *_ConfigAliases.get(name)]
        return next((given[one] for one in names if given.get(one) is not None), self.config[name])

    def reset(self, **parameters: Any) -> None:
        """Those of LightGBM's booster; `booster.params` stays what the user knows."""
        text = " ".join(f"{name}={value}" for name, value in parameters.items())
        _safe_call(_LIB.LGBM_BoosterResetParameter(self.booster._handle, text.encode()))

    def changes(self) -> list[dict[str, Any]]:
        """What callbacks have changed: for the other callbacks, and for the booster."""
        now = (self.parameters, self.booster.params)
        return [
            {k: v for k, v in new.items() if k not in old or (old[k] is not v and old[k] != v)}
            for new, old in zip(now, self._first, strict=True)
        ]

    def text(self) -> str:
        """The model, without what `_raise_count` has added."""
        first, count = self._inert
        whole = self.booster.model_to_string(num_iteration=-1, start_iteration=0)
        if not count:
            return whole
        head, tail = (
            self.booster.model_to_string(num_iteration=number, start_iteration=start)
            for start, number in ((0, first), (first + count, -1))
        )
        if "\nTree=0\n" not in tail:
            return head
        joined = lightgbm.Booster(model_str=tail)
        _merge(joined, lightgbm.Booster(model_str=head))
        return joined.model_to_string(num_iteration=-1)

    def clean(self) -> None:
        """Nothing is left that an uninterrupted training would not have."""
        if self._inert[1]:
            self.booster.model_from_string(self.text())
            self._inert = 0, 0

    def load(self, text: str, changes: list[dict[str, Any]], *, whole: bool) -> None:
        """Put the trees of `text` into the booster; `whole` if no more will be made."""
        if whole and not self._keeps_booster:
            self.booster.model_from_string(text)
        elif "\nTree=0\n" in text:
            self._rebuild(lightgbm.Booster(model_str=text))
        self.parameters.update(changes[0])
        self.booster.params.update(changes[1])
        known = {name: value for name, value in changes[1].items() if name != "objective"}
        if known and not whole:
            self.booster.reset_parameter(known)
        if whole:  # LightGBM makes a round before it asks whether to go on
            for name, nothing in (("update", True), ("eval_train", []), ("eval_valid", [])):
                setattr(self.booster, name, lambda *_, nothing=nothing, **__: nothing)

    def release(self) -> None:
        for name in ("update", "eval_train", "eval_valid"):
            vars(self.booster).pop(name, None)

    def _rebuild(self, old: lightgbm.Booster) -> None:
        """A new booster that begins with the trees and the scores of `old`, in place of this."""
        made, forest = self.booster, self.config["boosting"] == "rf"
        predictors = [data._predictor for data, _ in self._data]
        first = [
            None if predictor is not None else data.get_init_score()
            for predictor, (data, _) in zip(predictors, self._data, strict=True)
        ]
        try:
            for (data, source), start in zip(self._data, first, strict=True):
                data._predictor = None
                if not forest or data is not made.train_set:
                    data.set_field("init_score", _scores(old, source, start, forest))
            booster: Any = lightgbm.Booster(self.parameters, made.train_set)
            booster.set_train_data_name(made._train_data_name)
            for data, name in zip(made.valid_sets, made.name_valid_sets, strict=True):
                booster.add_valid(data, name)
        finally:
            for (data, _), predictor, start in zip(self._data, predictors, first, strict=True):
                data._predictor = predictor
                data.set_field("init_score", start)
        booster.best_iteration = made.best_iteration
        made.__dict__, booster.__dict__ = booster.__dict__, made.__dict__
        self._prepare()
        if self.config["data_sample_strategy"] == "goss":
            self._raise_count(old.current_iteration(), old.current_iteration() - self._read_before)
        _merge(made, old)

    def _raise_count(self, trees: int, wanted: int) -> None:
        """GOSS draws no rows in the first 1 / learning_rate rounds that the booster counts."""
        plain = all(type(one).__module__ == "lightgbm.callback" for one in self._callbacks)
        if plain and not any(one.before_iteration for one in self._callbacks):
            wanted = min(wanted, int(1 / float(self.value("learning_rate"))) + 1)  # the rate stays
        # Rounds that GOSS would sample must not be among them: it would go on with their rows.
        light = {"learning_rate": 1e-9, "num_leaves": 2, "min_gain_to_split": 0, "lambda_l1": 0}
        heavy = {name: self.value(name) for name in light}
        self.reset(**light)
        made, tries = 0, 0
        while made < wanted:
            tries += 1
            if tries > 10 * wanted:
                raise UsageError("the rows cannot be split any more: GOSS cannot go on here")
            made += not self.booster.update(fobj=_slight_gradient)
        self._inert = trees, made
        if not self.own_objective:
            heavy["objective"] = self.config["objective"]
            self.booster._Booster__set_objective_to_none = False
            self.booster.params["objective"] = self.parameters["objective"]
        self.reset(**heavy)

    def _prepare(self) -> None:
        if self.own_objective:
            # Its first `update` would do so, and draw columns by that.
            self.booster.reset_parameter({"objective": "none"})
            self.booster._Booster__set_objective_to_none = True

    def _refuse(self) -> None:
        """Raises UsageError for what cannot be resumed."""
        config, booster = self.config, self.booster
        costs = ("cegb_penalty_split", "cegb_penalty_feature_lazy", "cegb_penalty_feature_coupled")
        refused = {
            'boosting="dart": LightGBM never drops trees that it has read from a model': (
                config["boosting"] == "dart",
                "Use another boosting, or DART of XGBoost with holdfast.xgboost.",
            ),
            'boosting="rf" that is evaluated on its own training data': (
                config["boosting"] == "rf" and self._evaluates_training,
                "Evaluate on another Dataset of the same rows: valid_sets=[Dataset(X, y)].",
            ),
            "gradients that are rounded at random": (
                config.get("use_quantized_grad") == "1"
                and config.get("stochastic_rounding") == "1",
                'params["stochastic_rounding"] = False',
            ),
            "costs of features (cegb_…): they depend on what was used before": (
                any(config.get(name, "") not in ("", "0") for name in costs),
                "Leave these parameters out.",
            ),
            "positions of ranked rows: their biases are learned, and not in the model": (
                getattr(booster.train_set, "position", None) is not None,
                "Leave `position` out.",
            ),
            "several machines that train together": (
                int(config.get("num_machines", "1")) > 1,
                "Train on one.",
            ),
            'data_sample_strategy="goss" with keep_training_booster=True': (
                config.get("data_sample_strategy") == "goss" and self._keeps_booster,
                "Leave keep_training_booster out.",
            ),
        }
        for what, (given, hint) in refused.items():
            if given:
                raise UsageError(f"a training with {what}. It cannot be resumed", hint=hint)


class _Sampling:
    """Makes what a round draws depend on its number alone."""

    def __init__(self, training: _Training) -> None:
        self._training = training
        self._first = training.config
        self._goss = training.config.get("data_sample_strategy") == "goss"
        self._seeds = self._drawn_from(training.config)

    def vary(self, number: int) -> None:
        """Before the round `number`, after all else that resets parameters."""
        new: dict[str, Any] = {}
        for name in self._seeds:
            place = number
            if name == "bagging_seed" and not self._goss:
                place //= int(self._training.value("bagging_freq"))  # rows stay for so many rounds
                # LightGBM heeds the seed, and draws at once, only if the fraction is another.
                fraction = float(self._training.value("bagging_fraction"))
                new["bagging_fraction"] = _nearly(fraction, number % 2)
            new[name] = _seed(int(self._first[name]), place)
        self._reset(new)

    def end(self) -> None:
        """After the last round: what the model says of its parameters is what they were."""
        first: dict[str, Any] = {name: self._first[name] for name in self._seeds}
        if "bagging_seed" in first and not self._goss:
            first["bagging_fraction"] = self._training.value("bagging_fraction")
        self._reset(first)

    def _reset(self, new: dict[str, Any]) -> None:
        if "objective_seed" in new:  # made again, with its generators
            new["objective"] = self._first["objective"]
        if new:
            self._training.reset(**new)

    def _drawn_from(self, config: dict[str, str]) -> list[str]:
        """The seeds of what is drawn in each round."""

        def below_one(*names: str) -> bool:
            return any(float(config.get(name, 1)) < 1 for name in names)

        rows = below_one("bagging_fraction", "pos_bagging_fraction", "neg_bagging_fraction")
        drawn = {
            "bagging_seed": self._goss or (rows and int(config["bagging_freq"]) > 0),
            "feature_fraction_seed": below_one("feature_fraction", "feature_fraction_bynode"),
            "extra_seed": config["extra_trees"] == "1",
            "objective_seed": config["objective"] == "rank_xendcg",
        }
        return [name for name, given in drawn.items() if given]


def _seed(first: int, number: int) -> int:
    """Another one for each number: LightGBM takes up no seed that it has already."""
    digest = hashlib.blake2b(f"{first} {number}".encode(), digest_size=4).digest()
    seed = (int.from_bytes(digest, "little") >> 3) * 2 + number % 2
    return seed if seed != first else seed ^ 2


def _nearly(fraction: float, which: int) -> float:
    """Two others that draw the same rows, in effect: generators give multiples of 2 ** -15."""
    return fraction * (1 + (which + 1) * (1e-9 if fraction < 1 else -1e-9))


def _slight_gradient(scores: Any, data: lightgbm.Dataset) -> tuple[Any, Any]:
    """Makes a tree whose leaves are 0: LightGBM rounds what is less than 1e-35."""
    slope = np.linspace(-1e-28, 1e-28, np.size(scores), dtype=np.float32)
    return slope.reshape(np.shape(scores)), np.ones(np.shape(scores), np.float32)


def _merge(booster: lightgbm.Booster, first: lightgbm.Booster) -> None:
    """Put the trees of `first` before those of `booster`, as `init_model` does."""
    _safe_call(_LIB.LGBM_BoosterMerge(booster._handle, first._handle))


def _rows_of_an_estimator(booster: lightgbm.Booster) -> dict[int, Any]:
    """What the Datasets of an estimator's `fit` were made of: LightGBM frees it at once."""
    frame = sys._getframe(2)
    while frame is not None:
        scope = frame.f_locals
        if scope.get("train_set") is booster.train_set and "_X" in scope:
            sets = scope.get("valid_sets") or []
            rows = {
                id(one): X for one, (X, *_) in zip(sets, scope.get("eval_set") or (), strict=False)
            }
            return {**rows, id(booster.train_set): scope["_X"]}
        frame = frame.f_back
    return {}


def _source_of(data: lightgbm.Dataset, rows: dict[int, Any]) -> Any:
    """What trees can be applied to in place of `data`; raises UsageError if there is nothing."""
    indices = None
    if (found := rows.get(id(data), data.data)) is None and data.used_indices is not None:
        found, indices = getattr(data.reference, "data", None), data.used_indices
    if found is None:
        raise UsageError(
            "LightGBM has freed what a Dataset was made of, which the trees of a checkpoint must be "
            "applied to",
            hint="lightgbm.Dataset(…, free_raw_data=False), or holdfast.lightgbm.train(…) "
            "with a new Dataset.",
        )
    if isinstance(found, str | Path | list | lightgbm.Sequence):
        raise UsageError(
            f"a Dataset made of a {type(found).__name__} cannot be resumed yet",
            hint="Make it of one array, matrix or table.",
        )
    return found, indices


def _scores(trees: lightgbm.Booster, source: Any, start: Any, forest: bool) -> Any:
    """The scores that rows had when these trees were made, to the last bit; class after class."""
    rows, indices = source

    def predicted(first: int, count: int) -> Any:
        scores = trees.predict(rows, start_iteration=first, num_iteration=count, raw_score=True)
        scores = np.asarray(scores, np.float64)
        return (scores if indices is None else scores[indices]).ravel(order="F")

    if start is None and not forest:
        return predicted(0, -1)
    # LightGBM adds tree after tree to what there was first, and keeps the average of a forest.
    scores = 0.0 if start is None else np.asarray(start, np.float64).ravel(order="F").copy()
    for number in range(trees.current_iteration()):
        if forest:
            scores = (scores * number + predicted(number, 1)) * (1.0 / (number + 1))
        else:
            scores = scores + predicted(number, 1)
    return scores


def _free(sets: Sequence[lightgbm.Dataset]) -> None:
    """Do what LightGBM does with a Dataset that is not to keep what it was made of."""
    for one in sets:
        one.free_raw_data = True
        if one._handle is not None:
            one.data = None


def _text_of(state: dict[str, Any]) -> str:
    return state["model"].tobytes().decode()


def _plain(results: Any) -> list[list[Any]]:
    return [
        [data, metric, float(value), bool(more), *map(float, rest)]
        for data, metric, value, more, *rest in results
    ]


def _results(plain: Any) -> list[Any]:
    """Of evaluations, as this LightGBM has them."""
    kind = getattr(lightgbm.basic, "EvalResult", None)
    return [tuple(one) if kind is None else kind(*one) for one in plain]


def _state_of(callback: Any) -> Any:
    if hasattr(callback, "state_dict"):
        return callback.state_dict()
    if hasattr(callback, "eval_result"):
        return {
            data: {metric: list(values) for metric, values in metrics.items()}
            for data, metrics in callback.eval_result.items()
        }
    state = {name: getattr(callback, name) for name in _STOPPING}
    return {
        **state,
        "best_score": [float(one) for one in state["best_score"]],
        "best_iter": list(state["best_iter"]),
        "best_score_list": [_plain(one) for one in state["best_score_list"]],
    }


def _put_back(callback: Any, state: Any) -> None:
    if hasattr(callback, "load_state_dict"):
        callback.load_state_dict(state)
    elif hasattr(callback, "eval_result"):
        callback.eval_result.clear()
        for data, metrics in state.items():
            callback.eval_result[data] = OrderedDict((k, list(v)) for k, v in metrics.items())
    else:
        lists = [_results(one) for one in state["best_score_list"]]
        vars(callback).update(state, best_score_list=lists)
