"""What a save or restore says when it refuses something: what, where in the state, and a way out.

Through the manager, as a user meets it; what each type of value needs is in the other files here.
"""

from __future__ import annotations

import datetime
import io
import os
import tempfile
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.errors import (
    BadAddress,
    BadPolicy,
    CheckpointNotFound,
    HoldfastError,
    StateError,
    StructureMismatch,
    UnsupportedValue,
    UsageError,
)
from tests.support.jobs import fresh_address
from tests.support.refusals import Refusal


def save(value: Any, **options: Any) -> None:
    with holdfast.CheckpointManager(fresh_address(), **options) as manager:
        manager.save(1, {"x": value}).result()


def restore(saved: Any, live: Any, **options: Any) -> None:
    with holdfast.CheckpointManager(fresh_address()) as manager:
        manager.save(1, {"x": saved}).result()
        manager.restore({"x": live}, **options)


def find(ref: Any, *metrics: dict[str, float]) -> None:
    with holdfast.CheckpointManager(fresh_address(), keep=None) as manager:
        for step, values in enumerate(metrics, 1):
            manager.save(step, {}, metrics=values, block=True)
        manager.info(ref)


@pytest.fixture(autouse=True)
def folders_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def made(fill: Callable[[Path], Any]) -> Path:
    """A new folder with something in it."""
    folder = Path(tempfile.mkdtemp())
    fill(folder)
    return folder


def tag(name: str) -> None:
    with holdfast.CheckpointManager(fresh_address()) as manager:
        manager.save(1, {}, block=True)
        manager.tag(1, name)


class Gone:
    def __reduce__(self) -> tuple[Any, ...]:
        return __import__, ("gone",)


def load_a_pickle_of_code_that_is_gone() -> None:
    with holdfast.CheckpointManager(fresh_address(), allow_pickle=True) as manager:
        manager.save(1, {"x": Gone()}, block=True)
        manager.load(allow_pickle=True)["x"]


class Clock(datetime.tzinfo):
    def utcoffset(self, dt: Any) -> datetime.timedelta:
        return datetime.timedelta(0)


class OnlySaves:
    def state_dict(self) -> dict[str, Any]:
        return {}


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def deep_dtype() -> np.ndarray:
    dtype = np.dtype("f4")
    for _ in range(40):
        dtype = np.dtype([("a", dtype)])
    return np.zeros(1, dtype)


CASES: dict[str, tuple[Callable[[], Any], type[HoldfastError], str, str]] = {
    "a value of another type": (
        lambda: save({"a": [io.StringIO()]}),
        UnsupportedValue,
        "cannot save 'x/a/0': it is a value of type _io.StringIO",
        "convert it to plain values or arrays, or pass allow_pickle=True",
    ),
    "only state_dict": (
        lambda: save(OnlySaves()),
        UnsupportedValue,
        "cannot save 'x': it is a OnlySaves with state_dict() but no load_state_dict()",
        "Give it load_state_dict(state), or save value.state_dict() itself.",
    ),
    "a factory": (
        lambda: save(defaultdict(lambda: 3)),
        UnsupportedValue,
        "cannot save 'x': it is a defaultdict whose factory is <function",
        "Use one of None, list, dict, ",
    ),
    "itself": (
        lambda: save(itself()),
        StateError,
        "cannot save 'x/0': it contains itself",
        "Break the cycle: store an index or a key instead of the object.",
    ),
    "too deep": (
        lambda: save(nested(5000)),
        StateError,
        "it is nested deeper than ",
        "Store deep structures flat, for example as a list with indices.",
    ),
    "a huge number": (
        lambda: save(1 << 20_000_000),
        UnsupportedValue,
        "cannot save 'x': it is a int of 20000001 bits",
        "Save it as bytes.",
    ),
    "a time zone": (
        lambda: save(datetime.datetime(2026, 1, 1, tzinfo=Clock())),
        UnsupportedValue,
        "cannot save 'x': it is a time zone of type Clock",
        "Use datetime.timezone or zoneinfo.ZoneInfo.",
    ),
    "an array of structures with objects": (
        lambda: save(np.zeros(2, [("a", "O")])),
        UnsupportedValue,
        "cannot save 'x': it is a NumPy array of structures with Python objects",
        "Use a list, array.tolist(), or an array with a numeric dtype or strings of a fixed",
    ),
    "an array with a deep dtype": (
        lambda: save(deep_dtype()),
        UnsupportedValue,
        "cannot save 'x': it is a deeply nested dtype",
        "Flatten its fields.",
    ),
    "an array of texts of variable length": (
        lambda: save(np.array(["a"], np.dtypes.StringDType())),
        UnsupportedValue,
        "cannot save 'x': it is a NumPy array of strings of any length",
        "Use a list, array.tolist(), or an array with",
    ),
    "no pickle": (
        lambda: save(lambda: 1, allow_pickle=True),
        UnsupportedValue,
        "of type function that cannot be pickled: ",
        "Convert it to plain values.",
    ),
    "no file": (
        lambda: save(holdfast.File("/nonexistent/file")),
        StateError,
        "cannot save 'x': [Errno 2] No such file or directory: '/nonexistent/file'",
        "Check the path.",
    ),
    "no folder": (
        lambda: save(holdfast.Directory("/nonexistent")),
        StateError,
        "cannot save 'x': no folder '/nonexistent'",
        "Check the path.",
    ),
    "a link out of the folder": (
        lambda: save(holdfast.Directory(made(lambda folder: (folder / "a").symlink_to("/etc")))),
        UnsupportedValue,
        "cannot save 'x/a': it is a symbolic link to '/etc', outside its folder",
        "Directory(path, follow_links=True) stores what links point to.",
    ),
    "a link around the folder": (
        lambda: save(
            holdfast.Directory(
                made(lambda folder: (folder / "a").symlink_to(folder)), follow_links=True
            )
        ),
        StateError,
        "cannot save 'x/a': a link leads to a folder around it",
        "Remove the link.",
    ),
    "folders too deep": (
        lambda: save(holdfast.Directory(made(lambda f: Path(f, *"d" * 70).mkdir(parents=True)))),
        StateError,
        "folders are nested more than 64 levels deep",
        "Save an archive of it as one File.",
    ),
    "a name that is not UTF-8": (
        lambda: save(holdfast.Directory(made(lambda f: (f / os.fsdecode(b"\xff")).touch()))),
        StateError,
        "its name is not valid UTF-8",
        "Rename it.",
    ),
    # restoring
    "another shape": (
        lambda: restore(np.zeros(3), np.zeros((2, 2))),
        StructureMismatch,
        "different (1):\n  x: saved as float64[3], ",
        "Use strict=False to leave what differs as it is, only=[...] or skip=[...] to restore "
        'a part, or rename={"saved": "live"}.',
    ),
    "only is text": (
        lambda: restore([1], [2], only="x"),
        UsageError,
        "only='x' must be a list of names",
        "only=['x']",
    ),
    "a rename to another parent": (
        lambda: restore({"a": 1}, {"a": 2}, rename={"x/a": "y/a"}),
        UsageError,
        "rename={'x/a': 'y/a'} would move it elsewhere",
        'Rename within one level: {"model/encoder": "model/backbone"}.',
    ),
    "a name that is nowhere": (
        lambda: restore({"weights": [1]}, {"weights": [2]}, only=["x/weight"]),
        UsageError,
        "nothing in the checkpoint is called 'x/weight'",
        "Closest to 'x/weight': x/weights, x/weights/0. At the top level it has: x.",
    ),
    "a part of an array": (
        lambda: restore(list(range(5000)), [0] * 10, only=["x/3"]),
        UsageError,
        "'x' is saved as one array of numbers: its items cannot be restored one by one",
        "Name the whole list: 'x'.",
    ),
    "a gap in a deque": (
        lambda: restore(deque([[1], [2]]), deque(), only=["x/1"]),
        UsageError,
        "'x/0' cannot be left out: nothing live stays in its place",
        "Restore it too, or into an object that has something there.",
    ),
    "a pickle of code that is gone": (
        load_a_pickle_of_code_that_is_gone,
        StateError,
        "cannot unpickle 'x': No module named 'gone'",
        "It needs the modules and classes that it was saved with.",
    ),
    # references
    "no metric": (
        lambda: find("best", {}),
        CheckpointNotFound,
        "no checkpoint has a metric",
        "There are steps 1.",
    ),
    "which metric": (
        lambda: find("best", {"loss": 1, "wer": 2}),
        BadAddress,
        "'@best' does not say by which metric",
        "Logged: loss, wer.",
    ),
    "which end": (
        lambda: find("best:accuracy", {"accuracy": 1}),
        BadAddress,
        "'@best:accuracy' does not say whether higher or lower is better",
        "Write @best:accuracy:max or @best:accuracy:min.",
    ),
    "a metric that nobody logged": (
        lambda: find("best:los", {"loss": 1}),
        CheckpointNotFound,
        "no checkpoint has a finite metric 'los'",
        "There are steps 1; metrics loss.",
    ),
    "best of nothing": (
        lambda: find("best:", {}),
        BadAddress,
        "'@best:' names no metric",
        "Write @best:val_loss.",
    ),
    "best of an end that is none": (
        lambda: find("best:loss:", {"loss": 1}),
        BadAddress,
        "cannot read '@best:loss:': ",
        "Write ",
    ),
    "a step before the first": (
        lambda: find(-1, {}),
        BadAddress,
        "-1 is not a step: steps are counted from 0",
        "Write @latest, @best,",
    ),
    "no step": (
        lambda: find(7, {}, {}),
        CheckpointNotFound,
        "no checkpoint at step 7",
        "There are steps 1, 2.",
    ),
    "no tag": (
        lambda: find("paper", {}),
        CheckpointNotFound,
        "no checkpoint has the tag 'paper'",
        "There are steps 1.",
    ),
    "not a name": (
        lambda: find("a b", {}),
        BadAddress,
        "'@a b' names no checkpoint",
        "Write ",
    ),
    "not a reference": (
        lambda: find("", {}),
        BadAddress,
        "'@' names no checkpoint",
        "Write ",
    ),
    "a tag": (
        lambda: tag("a b"),
        BadAddress,
        "'a b' cannot be a tag: ",
        "Use letters, digits and . _ + - (64 at most), e.g. 'paper-v1'.",
    ),
    "an address with NUL": (
        lambda: holdfast.open("runs/\0"),
        BadAddress,
        "'runs/\\x00' has a NUL character in it",
        "Take it out.",
    ),
    "an address of nothing": (
        lambda: holdfast.open("@latest"),
        BadAddress,
        "'@latest' names no run",
        "Write runs/mnist or runs/mnist@latest.",
    ),
    # policies
    "every is automatic, and the failure rate no time": (
        lambda: holdfast.Run(fresh_address(), every="auto", mtbf="often"),
        BadPolicy,
        "cannot read mtbf='often'",
        'mtbf="6h"',
    ),
    "a failure rate that nothing looks at": (
        lambda: holdfast.Run(fresh_address(), every="10min", mtbf="6h"),
        UsageError,
        "mtbf='6h' is about every='auto', not about every='10min'",
        'Write every="auto", or leave mtbf out.',
    ),
    "an overhead that leaves no time to train": (
        lambda: holdfast.Run(fresh_address(), every="auto", overhead=1),
        BadPolicy,
        "overhead=1 is not between 0.0001 % and 50 %",
        'overhead="1%" or overhead=0.01',
    ),
    "keep is a number": (
        lambda: save(1, keep=3),
        BadPolicy,
        "keep=3 is a int, not text",
        "keep: last=N best=K:metric[:max|:min] every=N",
    ),
}


@pytest.mark.parametrize("refusal", CASES.values(), ids=CASES)
def test_what_a_refusal_says(refusal: tuple[Any, ...]) -> None:
    Refusal(*refusal).check()


def test_another_global_generator_of_numpy_is_put_back_as_the_hint_says() -> None:
    address = fresh_address()
    numpy_random: Any = np.random  # its stubs lack two functions
    ours = numpy_random.get_bit_generator()
    try:
        numpy_random.set_bit_generator(np.random.PCG64(1))
        with holdfast.CheckpointManager(address) as manager:
            manager.save(1, {"x": [1]}, block=True)
            expected = np.random.rand()
            numpy_random.set_bit_generator(ours)
            with pytest.raises(StateError) as caught:
                manager.restore({"x": [0]})
            assert caught.value.message == (
                "NumPy's global generator was a PCG64 when this was saved"
            )
            assert "Call numpy.random.set_bit_generator" in caught.value.hint
            numpy_random.set_bit_generator(np.random.PCG64(2))
            manager.restore({"x": [0]})
        assert np.random.rand() == expected
    finally:
        numpy_random.set_bit_generator(ours)
