"""Global variables and attributes as tracked state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import holdfast
from holdfast.errors import StructureMismatch, UsageError
from holdfast.torch.untracked import find_untracked
from tests.support.jobs import Countdown, fresh_address, kill_everywhere, process

MODULE = """
X = np.random.rand(3)          # prefetched: what is trained on in the first step
best, rate = np.inf, 1.0
history = []
run = holdfast.Run(address, every=1, keep=None, quiet=True)
run.track(w=w, trace=trace, more=holdfast.Variables(globals(), "X", "best", "rate", "hidden"))
for epoch in run.range(3):
    hidden = np.zeros(2 + epoch)   # another shape in each epoch, and not there before the first
    for step in run.range(3):
        die()
        w += rate * X
        X = np.random.rand(3)
        die()
        hidden = np.append(hidden, w[0])
        trace.append([float(w.sum()), hidden.tolist()])
    if w.sum() > best:
        rate *= 0.5
    best = w.sum()
    die()
"""


def test_a_script_that_keeps_its_state_in_global_variables() -> None:
    def script(address: str, die: Countdown, trace: list[Any]) -> None:
        scope = {"address": address, "die": die, "trace": trace, "np": np, "holdfast": holdfast}
        exec(compile(MODULE, "train.py", "exec"), {**scope, "w": np.zeros(3)})

    assert kill_everywhere(script) == 3 * 7


class Trainer:
    def __init__(self) -> None:
        self.model = torch.nn.Linear(2, 1)
        self.average = [p.detach().clone() for p in self.model.parameters()]
        self.patience = 3

    def fit(self, address: str, die: Callable[[], None], trace: list[Any]) -> None:
        run = holdfast.Run(address, every=1, keep=None, quiet=True)
        run.track(model=self.model, trace=trace)
        run.track(rest=holdfast.Variables(vars(self), "average", "patience"))
        for _ in run.range(4):
            die()
            with torch.no_grad():
                for p in self.model.parameters():
                    p += torch.rand_like(p)
                pairs = zip(self.average, self.model.parameters(), strict=True)
                self.average = [0.5 * a + 0.5 * p for a, p in pairs]
            self.patience -= 1
            trace.append([self.patience, [a.tolist() for a in self.average]])
            die()


def test_attributes_of_an_object() -> None:
    def script(address: str, die: Countdown, trace: list[Any]) -> None:
        torch.manual_seed(1)
        Trainer().fit(address, die, trace)

    kill_everywhere(script)


def test_what_does_not_exist_yet_is_saved_once_it_does() -> None:
    namespace: dict[str, Any] = {"a": 1}
    kept = holdfast.Variables(namespace, "a", "b")
    with holdfast.CheckpointManager(fresh_address()) as ckpts:
        ckpts.save(1, {"kept": kept}).result()
        namespace["b"] = [torch.ones(2)]
        ckpts.save(2, {"kept": kept}).result()
        namespace.clear()
        ckpts.restore({"kept": kept}, 1)
        assert namespace == {"a": 1}
        ckpts.restore({"kept": kept}, 2)
        assert torch.equal(namespace["b"][0], torch.ones(2))
        assert repr(kept) == "Variables(a, b)"


def test_a_tensor_comes_back_without_its_graph() -> None:
    namespace: dict[str, Any] = {"hidden": torch.ones(2, requires_grad=True) * 2}
    kept = holdfast.Variables(namespace, "hidden")
    with holdfast.CheckpointManager(fresh_address()) as ckpts:
        ckpts.save(1, {"kept": kept}).result()
        namespace.clear()
        ckpts.restore({"kept": kept})
    assert namespace["hidden"].tolist() == [2.0, 2.0]
    assert namespace["hidden"].grad_fn is None


def test_it_replaces_nothing_else() -> None:
    with holdfast.CheckpointManager(fresh_address()) as ckpts:
        ckpts.save(1, {"kept": holdfast.Variables({"a": 1}, "a")}).result()
        with pytest.raises(StructureMismatch):
            ckpts.restore({"kept": np.zeros(2)})


def test_other_things_in_the_namespace_are_not_tracked_by_it() -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    extra = torch.optim.SGD(model.parameters(), lr=0.1)
    scope = {"model": model, "optimizer": optimizer, "extra": extra, "best": 1.0}
    tracked = {"model": model, "kept": holdfast.Variables(scope, "extra", "best")}
    assert find_untracked(scope, tracked) == ["optimizer"]


def test_wrong_use_is_refused() -> None:
    best = 1.0
    with pytest.raises(UsageError, match="a copy there"):
        holdfast.Variables(locals(), "best")
    with pytest.raises(UsageError, match="needs the names"):
        holdfast.Variables(globals())
    with pytest.raises(UsageError, match="the dict that holds"):
        holdfast.Variables(best, "best")  # type: ignore[arg-type]
    with process():
        exec(compile("holdfast.Variables(locals(), 'holdfast')", "cell", "exec"), globals())
