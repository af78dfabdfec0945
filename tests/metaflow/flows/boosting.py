"""Trains with XGBoost, whose callback saves. The first attempt hangs in round 8, until it is out of
time; what the next one ends with must be what one that was never interrupted does."""

from __future__ import annotations

import os
import time

import numpy
import xgboost  # here: a step that imports it is in a hurry
from metaflow import FlowSpec, Parameter, card, checkpoint, conda, current, retry, step, timeout
from telling import tell


class Saving(xgboost.callback.TrainingCallback):
    def after_iteration(self, model, epoch, evals_log):
        rounds = model.num_boosted_rounds()
        if rounds % 3 == 0:
            model.save_model(os.path.join(current.checkpoint.directory, "model.ubj"))
            loss = evals_log["train"]["logloss"][-1]
            current.checkpoint.save(metadata={"rounds": rounds, "loss": loss})
        if rounds == 8 and current.retry_count == 0:
            time.sleep(60)
        return False


class Boosting(FlowSpec):
    rounds = Parameter("rounds", type=int)

    @conda(packages={"numpy": "2.0.0"})
    @step
    def start(self):
        rng = numpy.random.default_rng(0)
        self.x = rng.normal(size=(300, 5))
        self.y = self.x @ rng.normal(size=5) > 0
        self.next(self.fit)

    @timeout(seconds=5)
    @conda(packages={"xgboost": "3.0.0"})
    @card
    @retry(times=2, minutes_between_retries=0)
    @checkpoint(keep="last=1 best=1:loss")
    @step
    def fit(self):
        file, done = os.path.join(current.checkpoint.directory, "model.ubj"), 0
        if current.checkpoint.is_loaded:
            done = current.checkpoint.info.metadata["rounds"]
        tell(attempt=current.retry_count, loaded=done)
        model = self.train(self.rounds - done, file if done else None, [Saving()])
        assert model.num_boosted_rounds() == self.rounds
        never_interrupted = self.train(self.rounds, None, [])
        tell(
            same=model.get_dump() == never_interrupted.get_dump(),
            metadata=[each["metadata"]["rounds"] for each in current.checkpoint.list()],
        )
        self.next(self.end)

    def train(self, rounds, model, callbacks):
        data = xgboost.DMatrix(self.x, self.y)
        settings = {"objective": "binary:logistic", "eval_metric": "logloss", "nthread": 1}
        return xgboost.train(
            settings,
            data,
            rounds,
            evals=[(data, "train")],
            xgb_model=model,
            callbacks=callbacks,
            verbose_eval=False,
        )

    @step
    def end(self):
        pass


if __name__ == "__main__":
    Boosting()
