"""One call of `lightgbm.train`: the booster, and all around it that LightGBM keeps to itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import lightgbm
import numpy as np
from lightgbm.basic import (
    _LIB,  # pyright: ignore[reportPrivateImportUsage]
    _ConfigAliases,
    _param_dict_to_str,
    _safe_call,
)
from lightgbm.callback import CallbackEnv

from holdfast.errors import StateError, UsageError
from holdfast.lightgbm.others import has_state, is_early_stopping, make_ready
from holdfast.lightgbm.refused import refuse
from holdfast.lightgbm.rows import rows_of_an_estimator, scores_before, source_of
from holdfast.run.trainings import numbered

_PRETENDED = {"update": True, "eval_train": [], "eval_valid": []}


class Training:
    """A call of `lightgbm.train`: what it has made, and what it has kept to itself.

    caller: its variables. Callbacks are not told which others there are.

    Raises UsageError for what cannot be resumed.
    """

    def __init__(self, callback: object, env: CallbackEnv, caller: dict[str, Any]) -> None:
        self._lists: list[Any] = [
            caller.get(f"callbacks_{when}_iter") for when in ("before", "after")
        ]
        known = all(isinstance(one, list) for one in self._lists)
        if not known or self._lists[0][:1] != [callback]:
            raise UsageError(
                "holdfast.lightgbm.Callback does not know what calls it in "
                f"LightGBM {lightgbm.__version__}",
                hint="Give it to lightgbm.train or to an estimator of lightgbm.sklearn.",
            )
        self.booster: Any = env.model
        self.parameters = env.params
        self._first = dict(env.params), dict(self.booster.params)
        self._own_objective = caller.get("fobj") is not None
        self._inert = 0, 0
        """Where trees begin that say nothing, and how many there are."""
        self._aside: lightgbm.Booster | None = None
        """Has what the booster is made of, while that shows another checkpoint's."""
        self._collected: dict[str, Any] = {}
        self.restored: list[Any] = []
        """Callbacks that must not begin again when they are called next."""
        self.config = self._settings()
        if "data_sample_strategy" not in self.config:
            raise UsageError(
                f"LightGBM {lightgbm.__version__} does not say how it samples",
                hint="pip install 'lightgbm>=4.5'",
            )
        refuse(self.config, self.booster, caller)
        rows = rows_of_an_estimator(self.booster)
        sets = [self.booster.train_set, *self.booster.valid_sets]
        self._data = [(data, source_of(data, rows)) for data in sets]
        self._read = self._read_first = self.booster.current_iteration()
        self._prepare()

    # -- what is around the booster --------------------------------------------------

    def call_instead(self, after: Callable[[CallbackEnv], None]) -> None:
        """Take all other callbacks from LightGBM, and have it call `after` after a round."""
        (_, *self.before), self.after = self._lists[0], list(self._lists[1])
        self._lists[0][1:] = []
        self._lists[1][:] = [after]

    def call(self, callback: Any, env: CallbackEnv) -> None:
        """Call one of those `after` a round."""
        if callback in self.restored:
            self.restored.remove(callback)
            if is_early_stopping(callback):
                make_ready(callback, env)
        callback(env)

    def named(self) -> Iterator[tuple[str, Any]]:
        """Callbacks that have a state, by their class and their place among those of that class."""
        return numbered(one for one in (*self.before, *self.after) if has_state(one))

    def changes(self) -> list[dict[str, Any]]:
        """What callbacks have changed: for the other callbacks, and for the booster."""
        missing = object()
        return [
            {k: v for k, v in now.items() if (was := old.get(k, missing)) is not v and was != v}
            for now, old in zip((self.parameters, self.booster.params), self._first, strict=True)
        ]

    def value(self, name: str) -> Any:
        """Of a parameter, exactly: LightGBM rounds those that it writes."""
        given = self.booster.params
        names = [name, *_ConfigAliases.get(name)]
        return next((given[one] for one in names if given.get(one) is not None), self.config[name])

    def reset(self, **parameters: Any) -> None:
        """Those of LightGBM's booster; `booster.params` stays what the user knows."""
        text = _param_dict_to_str(parameters).encode()
        _safe_call(_LIB.LGBM_BoosterResetParameter(self.booster._handle, text))

    def collect(self) -> None:
        """Keep what callbacks reset until `collected`.

        With GOSS, LightGBM reads freed memory if its parameters are reset twice in a round.
        """

        def reset_parameter(parameters: dict[str, Any]) -> Any:
            self._collected.update(parameters)
            self.booster.params.update(parameters)
            return self.booster

        self.booster.reset_parameter = reset_parameter

    def collected(self, *, end: bool = False) -> dict[str, Any]:
        """What callbacks have reset since they were asked last."""
        if end:
            vars(self.booster).pop("reset_parameter", None)
        found, self._collected = self._collected, {}
        return found

    def own_rounds(self) -> int:
        """How many the booster counts as its own: those of trees that it has read are not."""
        return self.booster.current_iteration() - self._read

    def pretend(self, *, end: bool = False) -> None:
        """LightGBM makes a round before it asks whether to go on: not of a finished training."""
        for name, nothing in _PRETENDED.items():
            if end:
                vars(self.booster).pop(name)
            else:
                setattr(self.booster, name, lambda *_, nothing=nothing, **__: nothing)

    def _settings(self) -> dict[str, str]:
        """All parameters that LightGBM knows, as it writes them."""
        text = self.booster.model_to_string(num_iteration=1, start_iteration=0)
        return dict(re.findall(r"^\[(\w+): (.*)\]$", text, re.MULTILINE))

    def _prepare(self) -> None:
        if self._own_objective:
            # Its first `update` would do so, and draw columns by that.
            self.booster.reset_parameter({"objective": "none"})
            self.booster._Booster__set_objective_to_none = True

    # -- the model -------------------------------------------------------------------

    def text(self) -> str:
        """The model, without trees that say nothing."""
        first, count = self._inert
        if not count:
            return self.booster.model_to_string(num_iteration=-1, start_iteration=0)
        head = self.booster.model_to_string(num_iteration=first, start_iteration=0)
        tail = self.booster.model_to_string(num_iteration=-1, start_iteration=first + count)
        if not _has_trees(tail):
            return head
        joined = lightgbm.Booster(model_str=tail)
        _put_before(joined, lightgbm.Booster(model_str=head))
        return joined.model_to_string(num_iteration=-1)

    def clean(self) -> None:
        """Nothing is left that an uninterrupted training would not have."""
        if self._inert[1]:
            self.booster.model_from_string(self.text())
            self._inert = 0, 0

    def check_objective(self, text: str) -> None:
        """Raises StateError where the trees of `text` were made for another one: what they say
        would be taken for something else."""
        found = re.search(r"^objective=(\w+)(?:.* num_class:(\d+))?", text, re.MULTILINE)
        if found is None or self._own_objective:
            return
        (saved, classes), now = found.groups(), self.config["objective"]
        if saved != now or (classes or "1") != self.config["num_class"]:
            raise StateError(
                f"the checkpoint's trees are for {saved} ({classes or 1} classes), and the "
                f"objective is {now} ({self.config['num_class']})",
                hint="Put the parameters back, or start the run at another address.",
            )

    def load(self, text: str, changes: list[dict[str, Any]]) -> None:
        """Make the booster one that has the trees of `text`, and their scores."""
        if _has_trees(text):
            self._rebuild(lightgbm.Booster(model_str=text))
        for now, new in zip((self.parameters, self.booster.params), changes, strict=True):
            now.update(new)
        known = {name: value for name, value in changes[1].items() if name != "objective"}
        if known:
            self.booster.reset_parameter(known)

    def show(self, text: str) -> None:
        """Have the booster be that of `text`: `run.evaluate` goes through those of checkpoints,
        and gives the live one back in the end."""
        if self._aside is not None:
            _exchange(self.booster, self._aside)
            self._aside = None
        if text != self.text():
            self._aside = lightgbm.Booster(model_str=text)
            _exchange(self.booster, self._aside)

    def forget_rows(self) -> None:
        """Nothing will be loaded any more."""
        self._data = []

    def _rebuild(self, old: lightgbm.Booster) -> None:
        """Put a new booster that begins with the trees and the scores of `old` in place of this."""
        made, forest = self.booster, self.config["boosting"] == "rf"
        # Where training begins with a model, `old` has its trees too.
        predictors = [data._predictor for data, _ in self._data]
        begun = [
            data.get_init_score() if predictor is None else None
            for (data, _), predictor in zip(self._data, predictors, strict=True)
        ]
        try:
            for (data, source), begin in zip(self._data, begun, strict=True):
                data._predictor = None
                if not forest or data is not made.train_set:  # it does not look at those
                    data.set_field("init_score", scores_before(old, source, begin, forest=forest))
            booster: Any = lightgbm.Booster(self.parameters, made.train_set)
            booster.set_train_data_name(made._train_data_name)
            for data, name in zip(made.valid_sets, made.name_valid_sets, strict=True):
                booster.add_valid(data, name)
        finally:
            for (data, _), begin, predictor in zip(self._data, begun, predictors, strict=True):
                data._predictor = predictor
                data.set_field("init_score", begin)
        booster.best_iteration = made.best_iteration
        _exchange(made, booster)
        self._prepare()
        if self.config["data_sample_strategy"] == "goss":
            self._raise_count(old.current_iteration())
        _put_before(made, old)
        self._read = old.current_iteration()

    def _raise_count(self, trees: int) -> None:
        """GOSS draws no rows in the first 1 / learning_rate rounds that the booster counts."""
        wanted = trees - self._read_first
        others = (*self.before, *self.after)
        if not self.before and all(type(one).__module__ == "lightgbm.callback" for one in others):
            wanted = min(wanted, int(1 / float(self.value("learning_rate"))) + 1)  # the rate stays
        # A rate at which it draws none: it would go on with these rows, which are gone by then.
        light = {"learning_rate": 1e-9, "num_leaves": 2, "min_gain_to_split": 0, "lambda_l1": 0}
        heavy = {name: self.value(name) for name in light}
        self.reset(**light)
        made, tries = 0, 0
        while made < wanted:
            made += not self.booster.update(fobj=_slight_gradient)
            tries += 1
            if tries > 10 * wanted:
                raise UsageError("the rows cannot be split any more, so GOSS cannot go on here")
        self._inert = trees, made
        if not self._own_objective:
            heavy["objective"] = self.config["objective"]
            self.booster._Booster__set_objective_to_none = False
            self.booster.params["objective"] = self.parameters["objective"]
        self.reset(**heavy)


def _exchange(one: Any, other: Any) -> None:
    """What they are made of."""
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__


def _has_trees(text: str) -> bool:
    return "\nTree=0\n" in text


def _put_before(booster: lightgbm.Booster, first: lightgbm.Booster) -> None:
    """Put the trees of `first` before those of `booster`, as `init_model` does."""
    _safe_call(_LIB.LGBM_BoosterMerge(booster._handle, first._handle))


def _slight_gradient(scores: Any, data: lightgbm.Dataset) -> tuple[Any, Any]:
    """Makes a tree whose leaves are 0: LightGBM rounds what is less than 1e-35."""
    slope = np.linspace(-1e-28, 1e-28, np.size(scores), dtype=np.float32)
    return slope.reshape(np.shape(scores)), np.ones(np.shape(scores), np.float32)
