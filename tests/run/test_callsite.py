"""Whether a loop was left: the call stack knows."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import pytest

import holdfast
from holdfast.run.callsite import Callsite
from tests.support.jobs import Killed, fresh_address, process


class Probe:
    """Iterates three times and records where it is driven from."""

    def __init__(self) -> None:
        self.site: Callsite | None = None
        self.left = 3

    def __iter__(self) -> Probe:
        return self

    def __next__(self) -> int:
        if self.site is None:
            self.site = Callsite(sys._getframe(1))
        if not self.left:
            raise StopIteration
        self.left -= 1
        return self.left

    def held(self, *, advancing: bool = False) -> bool | None:
        assert self.site is not None
        return self.site.holds(sys._getframe(1), advancing=advancing)


def test_in_the_body_and_after_break() -> None:
    probe = Probe()
    for _ in probe:
        assert probe.held() is True
        if probe.left == 1:
            break
    assert probe.held() is False


def test_in_a_function_called_from_the_body() -> None:
    probe = Probe()

    def deeper() -> bool | None:
        return probe.held()

    for _ in probe:
        assert deeper() is True
    assert deeper() is False


def test_in_a_function_that_returned() -> None:
    probe = Probe()

    def train() -> None:
        for _ in probe:
            return

    train()
    assert probe.held() is False


def test_after_an_exception() -> None:
    probe = Probe()
    try:
        for _ in probe:
            raise ValueError
    except ValueError:
        assert probe.held() is False


def test_through_enumerate_and_zip() -> None:
    probe = Probe()
    for _index, (_item, _other) in enumerate(zip(probe, "abc", strict=False)):
        assert probe.held() is True
        break
    assert probe.held() is False


def bar(items: Probe) -> Iterator[int]:
    """What tqdm does."""
    for item in items:  # noqa: UP028
        yield item


def test_through_a_generator() -> None:
    probe = Probe()
    for _ in bar(probe):
        assert probe.held() is True
        if probe.left == 1:
            break
    assert probe.held() is False


def test_in_a_generator_that_holds_the_loop() -> None:
    probe = Probe()

    def train() -> Iterator[int]:
        for item in probe:
            assert probe.held() is True
            yield item
        assert probe.held() is False

    for _ in train():
        assert probe.held() is True  # suspended in the body, and we are in ours


def test_nested_in_the_same_function() -> None:
    outer, inner, second = Probe(), Probe(), Probe()
    for _ in outer:
        for _ in inner:
            assert outer.held() is True
            assert inner.held() is True
            break
        assert inner.held() is False
        for _ in second:
            assert inner.held() is False
            assert second.held() is True
            assert outer.held() is True
        break


def test_advanced_by_next_cannot_be_known() -> None:
    probe = Probe()
    next(probe)
    assert probe.held() is None


def test_fetching_the_next_item_counts_when_asked_for() -> None:
    seen: list[tuple[bool | None, bool | None]] = []

    class Spy(Probe):
        def __next__(self) -> int:
            frame = sys._getframe(1)
            self.site = self.site or Callsite(frame)
            seen.append((self.site.holds(frame), self.site.holds(frame, advancing=True)))
            return super().__next__()

    for _ in Spy():
        pass
    assert seen == [(False, True)] * 4


def test_keeps_no_frame_alive() -> None:
    import gc
    import weakref

    class Big:
        pass

    probe = Probe()

    def train() -> weakref.ref[Big]:
        big = Big()
        for _ in probe:
            break
        return weakref.ref(big)

    reference = train()
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ("enumerate(run.range(9))", ["enumerate"]),
        ("enumerate(run.batches(items), 1)", ["enumerate"]),
        ("itertools.islice(enumerate(run.range(9)), 5)", ["islice", "enumerate"]),
        ("zip(items, run.range(len(list(enumerate(items)))))", ["zip"]),
        ("run.batches(list(enumerate(items)))", []),
        ("run.range(9)", []),
        ("((run.batch, i) for i in run.range(9))", []),
    ],
)
def test_what_counts_around_a_loop_is_told_after_a_resume(
    header: str, names: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    address = fresh_address()
    code = compile(
        f"for n in {header}:\n    done()\nfor x in enumerate([]): pass", "train.py", "exec"
    )

    def job(*, dies: bool) -> str:
        def done() -> None:
            if run.step == 3 and dies:
                raise Killed

        with process():
            run = holdfast.Run(address, every=1)
            scope = {"run": run, "items": list(range(9)), "done": done, "itertools": itertools}
            exec(code, scope)
            run.close()
        return capfd.readouterr().err

    told = f"{' and '.join(names)} around the "
    assert told not in job(dies=True)
    assert (told in job(dies=False)) == bool(names)


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ("n", ["n"]),
        ("i, (a, b)", ["i", "a", "b"]),
        ("n, last", ["n", "last"]),
    ],
)
@pytest.mark.parametrize("function", [True, False])
def test_what_the_for_assigns(header: str, names: list[str], function: bool) -> None:
    seen: list[list[str]] = []

    class Items:
        def __iter__(self) -> Items:
            return self

        def __next__(self) -> object:
            if seen:
                raise StopIteration
            seen.append(Callsite(sys._getframe(1)).targets())
            return {"n": 0, "i, (a, b)": (0, (1, 2)), "n, last": (0, 1)}[header]

    loop = f"for {header} in Items():\n    other = 1"
    code = "def f():\n  " + loop.replace("\n", "\n  ") + "\nf()" if function else loop
    exec(compile(code, "train.py", "exec"), {"Items": Items})
    assert seen == [names]
