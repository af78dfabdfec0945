"""What the line about variables that change leaves out."""

from __future__ import annotations

import pytest

from tests.support.unsaved import told

Capture = pytest.CaptureFixture[str]

SILENT = {
    "what is tracked, and views of it": """
        weights = np.zeros((3, 4))
        view, part, same = weights[1:], [weights[0]], {"w": weights}
        run = Run().track(weights=weights)
        for _ in run.range(6):
            weights += 1
        """,
    "a tracked view of it": """
        weights = np.zeros((3, 4))
        run = Run().track(weights=weights[1:])
        for _ in run.range(6):
            weights += 1
        """,
    "what tracked objects hold": """
        class Model:
            def __init__(self):
                self.weights = [np.zeros(3)]
            def state_dict(self):
                return {"weights": self.weights}
            def load_state_dict(self, state):
                pass

        model = Model()
        weights, run = model.weights[0], Run().track(model=model)
        for _ in run.range(6):
            weights += 1
        """,
    "the box": """
        run = Run()
        state = run.box(hidden=None)
        hidden = None
        for step in run.range(6):
            hidden = np.full(3, step) if hidden is None else hidden + step
            state.hidden = hidden
        """,
    "what comes late": """
        ema, run = np.zeros(3), Run(late=["ema"])
        for _ in run.range(6):
            ema += 1
        """,
    "a loader and what it holds": """
        class Loader:
            def __init__(self, rng, order):
                self.rng, self.order = rng, order
            def __iter__(self):
                self.rng.shuffle(self.order)
                yield from self.order

        rng, order = np.random.default_rng(0), np.arange(5)
        loader, run = Loader(rng, order), Run()
        for _ in run.epochs(2):
            for x in run.batches(loader):
                pass
        """,
    "a loader's closure": """
        rng, run = np.random.default_rng(0), Run()

        def make(rng):
            class Loader:
                def __iter__(self):
                    return iter([rng.normal() for _ in range(5)])
            return Loader()

        loader = make(rng)
        for _ in run.epochs(2):
            for x in run.batches(loader):
                pass
        """,
    "what each body assigns first": """
        x, y, loss, buffer, other = (np.zeros(3) for _ in range(5))
        run = Run()
        for _ in run.epochs(2):
            for x in run.batches([np.full(3, i) for i in range(1, 6)]):
                y = x + 1
                buffer[:] = y
                other[...] = y * 2
                loss = buffer + y + other
        """,
    "what the rest of the outer body assigns first": """
        correct, scale, run = np.zeros(3), np.zeros(3), Run(every="epoch")
        for epoch in run.epochs(3):
            scale = np.random.rand(3)
            for x in run.range(4):
                pass
            correct = np.random.rand(3)
            correct += scale
        """,
    "what a function assigns": """
        last = np.zeros(3)

        def step():
            global last
            last = np.random.rand(3)

        run = Run()
        for _ in run.range(6):
            step()
        """,
    "variables of an evaluation": """
        class Confusion:
            def __init__(self):
                self.counts = np.zeros((2, 2))

        confusion, run = Confusion(), Run(every="epoch")
        for _ in run.epochs(2):
            for x in run.range(4):
                pass
            confusion.counts += 1
        """,
    "numbers, texts, logs": """
        class Meter:
            total, values = 0.0, []

        meter, history, best, mean, run = Meter(), [], 0.0, np.zeros(1), Run()
        losses = [np.zeros(2)]
        for step in run.range(6):
            best, mean = best + step, mean + step
            meter.total += step
            history.append(str(step))
            losses.append(np.full(2, step))
        """,
    "what does not change": """
        dataset, rng, run = np.arange(1000), np.random.default_rng(0), Run()
        for step in run.range(6):
            x = dataset[step]
        """,
    "the streams that are always saved": """
        import random

        python, numpy = random.random.__self__, np.random.random.__self__
        new, run = np.random.Generator(np.random.get_bit_generator()), Run()
        for step in run.range(6):
            python.random(), numpy.rand(), new.random()
        """,
    "a loop that does not count": """
        ema, run = np.zeros(3), Run()
        for _ in run.range(3, count=False):
            ema += 1
        for _ in run.range(6):
            pass
        """,
    "what lies in containers that are tracked": """
        from collections import defaultdict, deque
        from functools import partial

        class Trainer:
            def __init__(self):
                self.moments = defaultdict(dict, {1: {"mean": np.zeros(3)}})
                self.window = deque([np.zeros(3)])
                self.move = partial(np.add, np.zeros(3))
            def state_dict(self):
                return {}
            def load_state_dict(self, state):
                pass

        trainer = Trainer()
        mean, last, base = trainer.moments[1]["mean"], trainer.window[0], trainer.move.args[0]
        row, run = mean[1:], Run().track(trainer=trainer)
        for _ in run.range(6):
            mean += 1
            last += 1
            base += 1
        """,
    "objects that nobody can look into": """
        from collections import defaultdict
        from unittest.mock import MagicMock

        class Proxy:
            def __init__(self):
                self.array = np.zeros(3)
            def __getattribute__(self, name):
                if name == "__class__":
                    return dict
                raise RuntimeError(name)

        class Guarded(defaultdict):
            def __getattribute__(self, name):
                raise RuntimeError(name)

        class Cautious:
            array = property(lambda self: 1 / 0)
            __dict__ = property(lambda self: 1 / 0)
            def __getattr__(self, name):
                raise RuntimeError(name)
            __hash__ = object.__hash__
            def __eq__(self, other):
                raise RuntimeError
            def __len__(self):
                raise RuntimeError
            def __repr__(self):
                raise RuntimeError

        class Keys(dict):
            def items(self):
                raise RuntimeError
            __iter__ = __len__ = items

        proxy, mock, cautious, keys = object.__new__(Proxy), MagicMock(), Cautious(), Keys()
        run, guarded = Run(), Guarded()
        guarded["array"] = np.zeros(3)
        keys[cautious] = Proxy
        for step in run.range(6):
            mock.x = np.full(3, step)
            guarded["array"] = np.full(3, step)
        """,
    "random generators with methods of the program's": """
        import random

        class Mine(random.Random):
            def getstate(self):
                raise RuntimeError

        mine, run = Mine(), Run()
        for step in run.range(6):
            mine.random()
        """,
}  # fmt: skip


@pytest.mark.parametrize("script", SILENT.values(), ids=SILENT)
def test_what_is_not_named(script: str, capfd: Capture) -> None:
    assert told(script, capfd) == []
