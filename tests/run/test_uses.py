"""What a loop's body does first with its variables."""

from __future__ import annotations

import dis
from collections.abc import Callable
from typing import Any

from holdfast.run.uses import first_uses


def uses(function: Callable[..., Any], which: int = 0, now: int = 0) -> dict[str, str]:
    """In the body of the `which`th `for`; `now` counts them, too."""
    code = function.__code__
    fors = [one.offset for one in dis.get_instructions(code) if one.opname == "FOR_ITER"]
    return dict(first_uses(code, fors[which], fors[now]))


def test_the_first_use_counts() -> None:
    def body(run: Any, a: Any, b: Any, c: Any, d: Any) -> None:
        for x in run:
            y = a + x
            a = y
            b += 1
            c, d = d, c
            e: Any = x
            del e

    found = uses(body)
    assert {name: found[name] for name in "xyabcde"} == {
        "x": "assigned",
        "y": "assigned",
        "a": "read",
        "b": "read",
        "c": "read",
        "d": "read",
        "e": "assigned",
    }
    assert "run" not in found


def test_an_assignment_in_a_branch_counts() -> None:
    def body(run: Any) -> None:
        best = None
        for x in run:
            if x:
                best = x
            print(best)

    assert uses(body)["best"] == "assigned"


def test_the_body_of_the_outer_loop_goes_on_where_the_inner_one_is() -> None:
    def body(run: Any) -> None:
        prologue = inner = tail = carried = None
        for epoch in run:
            prologue = epoch
            for x in run:
                carried = (carried, prologue)
                inner = x
            tail = inner
            print(tail)
            print(carried)

    found = uses(body, now=1)
    assert found["carried"] == found["prologue"] == "read"
    assert found["inner"] == found["tail"] == "assigned"
    assert uses(body)["prologue"] == "assigned"  # as seen from the start of the outer body


def test_functions_count_as_called_where_they_are_made() -> None:
    def body(run: Any, a: Any, w: Any) -> None:
        loss, b = 0, 1
        for x in run:
            a = {key: a[key] + x for key in w}

            def closure() -> Any:
                nonlocal loss, b
                loss = 1
                b += 1
                return lambda own: (own, loss, b)

            closure()

    found = uses(body)
    assert found["a"] == "read"
    assert found["loss"] == "assigned"
    assert found["b"] == "read"
    assert "own" not in found


def test_globals() -> None:
    code = compile("for x in run:\n a = [b for _ in x]\n c = a\n d += 1", "<string>", "exec")
    start = next(one.offset for one in dis.get_instructions(code) if one.opname == "FOR_ITER")
    found = dict(first_uses(code, start, start))
    assert {name: found[name] for name in "abcdx"} == {
        "a": "assigned",
        "b": "read",
        "c": "assigned",
        "d": "read",
        "x": "assigned",
    }


def test_filling_a_buffer_is_an_assignment() -> None:
    def body(run: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> None:
        for x in run:
            a[:] = x
            b[...] = x
            c.copy_(x)
            d.copy_(d * 0.9 + x)
            e[:] = e + x
            f[:2] = x

    found = uses(body)
    assert {name: found[name] for name in "abcdef"} == {
        "a": "assigned",
        "b": "assigned",
        "c": "assigned",
        "d": "read",
        "e": "read",
        "f": "read",
    }


def test_where_there_is_no_loop() -> None:
    def body(run: Any) -> None:
        for x in run:
            print(x)

    assert dict(first_uses(body.__code__, 0, 0)) == {}
