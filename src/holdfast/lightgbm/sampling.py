"""What a round draws, made to depend on its number alone."""

from __future__ import annotations

import hashlib
from typing import Any

from holdfast.errors import UsageError
from holdfast.lightgbm.training import Training


class Sampling:
    """Seeds each round where a training samples; else it changes nothing."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._first = training.config
        self._goss = training.config["data_sample_strategy"] == "goss"
        self._drew = False
        self._seeds = self._drawn_from(training.config)
        if self._seeds:
            training.collect()

    def vary(self, number: int) -> None:
        """Before the round `number`, after all callbacks."""
        if not self._seeds:
            return
        new = self._training.collected()
        for name in self._seeds:
            place = number
            if name == "bagging_seed" and not self._goss:
                place //= int(self._training.value("bagging_freq"))  # rows stay for so many rounds
                # LightGBM heeds the seed, and draws at once, only if the fraction is another.
                fraction = float(self._training.value("bagging_fraction"))
                new["bagging_fraction"] = _nearly(fraction, number % 2)
            new[name] = _seed(int(self._first[name]), place)
        if self._goss:
            self._check_rate()
        self._reset(new)

    def end(self) -> None:
        """After the last round: what the model says of its parameters is what they were."""
        if not self._seeds:
            return
        new = self._training.collected(end=True)
        new.update({name: self._first[name] for name in self._seeds})
        if "bagging_seed" in new and not self._goss:
            new["bagging_fraction"] = self._training.value("bagging_fraction")
        self._reset(new)

    def _reset(self, new: dict[str, Any]) -> None:
        if "objective_seed" in new:  # made again, with its generators
            new["objective"] = self._first["objective"]
        self._training.reset(**new)

    def _check_rate(self) -> None:
        draws = self._training.own_rounds() >= int(1 / float(self._training.value("learning_rate")))
        if self._drew and not draws:
            raise UsageError(
                "the learning rate has fallen below 1 / rounds: GOSS would draw no rows again, and "
                "LightGBM go on with rows that it has freed",
                hint="Let it fall more slowly, or leave GOSS.",
            )
        self._drew = draws

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
