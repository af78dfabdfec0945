"""Variables that change and are in no checkpoint are named once, and nothing else is."""

from __future__ import annotations

import gc
import runpy
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.run.installed import is_installed
from tests.support.jobs import fresh_address
from tests.support.unsaved import told

Capture = pytest.CaptureFixture[str]

NAMED = {
    "an average in a class": (
        """
        class Average:
            def __init__(self):
                self.weights = {"w": np.zeros(3)}

        ema, weights = Average(), np.zeros(3)
        run = Run().track(weights=weights)
        for _ in run.range(6):
            weights += 1
            ema.weights["w"] = 0.9 * ema.weights["w"] + weights
        """,
        ["ema.weights (dict)"],
    ),
    "a class that can be tracked": (
        """
        class Average:
            def __init__(self):
                self.weights = {"w": np.zeros(3)}
            def state_dict(self):
                raise RuntimeError("must not be called")
            load_state_dict = state_dict

        ema, run = Average(), Run()
        for _ in run.range(6):
            ema.weights["w"] += 1
        """,
        ["ema (Average)"],
    ),
    "a dict beside what is tracked": (
        """
        state = {"weights": np.zeros(3), "ema": {"w": np.zeros(3)}}
        run = Run().track(weights=state["weights"])
        for _ in run.range(6):
            state["weights"] += 1
            state["ema"]["w"] += 1
        """,
        ["state['ema'] (dict)"],
    ),
    "containers of the standard library": (
        """
        from collections import defaultdict, deque

        sums, window = defaultdict(lambda: np.zeros(3)), deque([np.zeros(3)], maxlen=2)
        sums["a"], run = np.zeros(3), Run()
        for step in run.range(6):
            sums["a"] += 1
            window[0] += 1
        """,
        ["sums (defaultdict)", "window (deque)"],
    ),
    "a tracked name that is bound again": (
        """
        ema = {"w": np.zeros(3)}
        run = Run().track(ema=ema)
        for step in run.range(6):
            ema = {name: value + step for name, value in ema.items()}
        """,
        ["ema (dict)"],
    ),
    "a tracked array that is bound again, in a function": (
        """
        def main(run):
            weights = np.zeros(3)
            run.track(weights=weights)
            for step in run.range(6):
                weights = weights + step

        main(Run())
        """,
        ["weights (float64[3])"],
    ),
    "prefetched batches": (
        """
        def draw():
            return np.random.rand(2, 3), np.random.rand(2)

        X, Y = draw()
        run = Run()
        for _ in run.range(6):
            run.log(loss=float(X.sum() + Y.sum()))
            X, Y = draw()
        """,
        ["X (float64[2, 3])", "Y (float64[2])"],
    ),
    "prefetched in the prologue": (
        """
        def main(run):
            for epoch in run.epochs(2):
                X = np.random.rand(3)
                for _ in run.range(4):
                    run.log(loss=float(X.sum()))
                    X = np.random.rand(3)

        main(Run())
        """,
        ["X (float64[3])"],
    ),
    "a hidden state in a function": (
        """
        def train(run, loader):
            hidden = (np.zeros((1, 4)), np.zeros((1, 4)))
            for x in run.batches(loader):
                h, c = hidden
                hidden = (h + x, c - x)

        run = Run(every="epoch")
        loader = [1.0, 2.0, 3.0]
        for epoch in run.epochs(2):
            train(run, loader)
        """,
        ["hidden (tuple)"],
    ),
    "a hidden state that begins as None": (
        """
        hidden, run = None, Run()
        for step in run.range(6):
            hidden = np.full(3, step) if hidden is None else hidden + step
        """,
        ["hidden (int64[3])"],
    ),
    "generators of three kinds of places": (
        """
        import random

        class Noise:
            def __init__(self):
                self.rng = np.random.RandomState(0)

        def noise():
            return rng.normal()

        def main(run):
            own, inside = random.Random(1), Noise()
            for _ in run.range(6):
                run.log(x=noise() + own.random() + inside.rng.rand())

        rng = np.random.default_rng(0)
        main(Run())
        """,
        [
            "rng (random generator of numpy)",
            "own (random generator of python)",
            "inside.rng (random generator of numpy)",
        ],
    ),
    "an attribute of self": (
        """
        class Trainer:
            def __init__(self, run):
                self.run, self.weights, self.ema = run, np.zeros(3), {"w": np.zeros(3)}
                run.track(weights=self.weights)
            def fit(self):
                for epoch in self.run.epochs(2):
                    self.epoch()
            def epoch(self):
                for x in self.run.range(4):
                    self.weights += x
                    self.ema["w"] = self.ema["w"] + x

        Trainer(Run()).fit()
        """,
        ["self.ema (dict)"],
    ),
    "one thing under the names of two functions": (
        """
        def train(run, weights):
            for x in run.range(4):
                weights += x

        def main(run, teacher):
            for epoch in run.epochs(2):
                train(run, teacher)

        main(Run(), np.zeros(3))
        """,
        ["teacher (float64[3])"],
    ),
    "slots": (
        """
        class State:
            __slots__ = ("ema", "unset")

        state, run = State(), Run()
        state.ema = np.zeros(3)
        for _ in run.range(6):
            state.ema += 1
        """,
        ["state.ema (float64[3])"],
    ),
    "a large array": (
        """
        buffer, run = np.zeros((1000, 1000)), Run()
        for step in run.range(6):
            buffer[step] = step + 1
        """,
        ["buffer (float64[1000, 1000])"],
    ),
    "more than five": (
        """
        a, b, c, d, e, f, g = (np.zeros(2) for _ in range(7))
        run = Run()
        for _ in run.range(6):
            for one in (a, b, c, d, e, f, g):
                one += 1
        """,
        [*(f"{name} (float64[2])" for name in "abcde"), "2 more"],
    ),
}


@pytest.mark.parametrize(("script", "names"), NAMED.values(), ids=NAMED)
def test_what_is_named(script: str, names: list[str], capfd: Capture) -> None:
    assert sorted(told(script, capfd)) == sorted(names)


def test_each_process_says_it_once(capfd: Capture) -> None:
    address = fresh_address()
    script = """
        ema, weights, scratch = np.zeros(3), np.zeros(3), np.zeros(3)
        run = Run().track(weights=weights)
        for epoch in run.epochs(3):
            for _ in run.range(4):
                ema += 1
                if dies and run.step == 5:
                    break
            if dies and run.step == 5:
                break
            scratch = np.random.rand(3)
        run.close()
    """

    def make(**settings: Any) -> holdfast.Run:
        return holdfast.Run(address, **{**settings, "every": 1})

    assert told(script, capfd, Run=make, dies=True) == ["ema (float64[3])"]
    # It goes on inside an epoch, past the code in front of the inner loop.
    assert told(script, capfd, Run=make, dies=False) == ["ema (float64[3])"]
    assert told(script, capfd, Run=make, dies=False) == []  # there is nothing to train


class Heavy:
    def __init__(self) -> None:
        self.array = np.zeros(3)


def test_nothing_is_kept_alive() -> None:
    run = holdfast.Run(fresh_address(), every=3)
    reference: Any = None
    for step in run.range(6):
        if reference is not None and step in (2, 4):  # after the first look; after the save
            assert reference() is None
        if step in (1, 3):
            heavy = Heavy()
            reference = weakref.ref(heavy)
            del heavy
            gc.collect()


def test_a_variable_that_is_there_at_a_look_does_not_live_longer() -> None:
    run = holdfast.Run(fresh_address(), every=3)
    heavy = Heavy()
    reference = weakref.ref(heavy)
    for step in run.range(6):
        if step == 0:
            del heavy  # there at the first look
            assert reference() is None
            heavy = Heavy()
            reference = weakref.ref(heavy)
        elif step == 3:
            del heavy  # there at the save
            assert reference() is None
    run.close()


def test_a_dict_that_the_program_got_from_locals_stays_as_it_is() -> None:
    run = holdfast.Run(fresh_address(), every=3)
    mine = locals()
    for _ in run.range(6):
        pass
    assert mine["run"] is run


SCRIPTS = Path(__file__).parents[1] / "rehearse/scripts"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("average", "ema.weights (dict)"),
        ("generator", "rng (random generator of numpy)"),
        ("equal", ""),
        ("local", ""),
    ],
)
def test_what_a_rehearsal_would_name_is_said_without_one(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="script")
    err = capfd.readouterr().err
    assert err.count("in no checkpoint") == bool(said)
    assert said in err


def test_whose_modules_are_packages() -> None:
    assert is_installed("pytest")
    assert is_installed("collections")
    assert is_installed("builtins")
    assert not is_installed(__name__)


def test_what_variables_keep_is_saved_and_the_rest_of_their_namespace_is_not(
    capfd: Capture,
) -> None:
    script = """
        X, rng = np.random.rand(3), np.random.default_rng(0)
        run = Run().track(more=Variables(globals(), "X"))
        for _ in run.range(6):
            X = X + rng.random(3)
        """
    assert told(script, capfd, Variables=holdfast.Variables) == ["rng (random generator of numpy)"]
