"""What names a stored result."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.core.calls import Call, call_of, rule_for
from holdfast.errors import UnsupportedValue, UsageError


def add(a: Any, b: Any = 2, *more: Any, **options: Any) -> Any:
    return a + b


class Scale:
    def __init__(self, by: int) -> None:
        self.by = by

    def state_dict(self) -> dict[str, int]:
        return {"by": self.by}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.by = state["by"]

    def apply(self, x: int) -> int:
        return self.by * x


def called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
    return call_of(rule_for(function, None, None, ()), args, kwargs)


def test_arguments_count_by_what_they_are_and_not_by_how_they_were_given() -> None:
    assert called(add, 1) == called(add, a=1) == called(add, 1, 2) == called(add, b=2, a=1)
    assert called(functools.partial(add, 1), 3) == called(add, 1, 3)
    assert called(add, 1, x=1, y=2) == called(add, 1, y=2, x=1)
    different: list[Any] = [1, 1.0, True, "1", b"1", None, (1,), [1], {1}, {"a": 1}, Path("1")]
    different += [np.float32(1), np.ones(1), np.ones(1, np.float32), np.ones((1, 1))]
    assert len({called(add, value).arguments for value in different}) == len(different)


def test_arrays_count_by_their_items() -> None:
    array = np.arange(1_000_000)
    changed = array.copy()
    changed[777_777] += 1
    assert called(add, array) == called(add, array.copy()) != called(add, changed)


def test_a_bound_method_counts_its_object() -> None:
    assert called(Scale(2).apply, 3) == called(Scale(2).apply, 3) != called(Scale(5).apply, 3)


def test_files_count_by_what_is_in_them(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("one")
    first = called(add, holdfast.File(file))
    assert called(add, holdfast.File(file)) == first
    file.write_text("two")
    assert called(add, holdfast.File(file)) != first


def test_what_cannot_be_told_apart_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(UnsupportedValue, match=r"by 'b': it is a .*object") as error:
        called(add, 1, object())
    assert "key=" in error.value.hint
    rule = rule_for(add, None, lambda a, b: a, ())
    assert call_of(rule, (1, object()), {}) == call_of(rule, (1, object()), {})
    assert call_of(rule, (2, object()), {}) != call_of(rule, (1, object()), {})


async def later() -> None: ...


def items() -> Any:
    yield 1


@pytest.mark.parametrize("function", [later, items, 3, Scale(1)])
def test_what_has_no_result_is_refused(function: Any) -> None:
    with pytest.raises(UsageError):
        rule_for(function, None, None, ())


def load(path: Path, text: str) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("prep", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PLAIN = """\
def prepare(x):
    def inner(y):
        return y + 1
    return inner(x) * 2
"""


def code(module: Any, **options: Any) -> str:
    rule = rule_for(module.prepare, options.get("version"), None, options.get("depends", ()))
    return call_of(rule, (1,), {}).code


def test_the_same_code_elsewhere_and_otherwise_laid_out_is_the_same(tmp_path: Path) -> None:
    same = '''\
# A comment, and two lines more.

import functools

@functools.lru_cache
def prepare( x ):
    """What it does."""
    def inner(y): return y+1  # why
    return (inner(x) * 2)
'''
    first = load(tmp_path / "a/prep.py", PLAIN)
    assert code(load(tmp_path / "b/prep.py", PLAIN)) == code(first)
    assert code(load(tmp_path / "c/prep.py", same)) == code(first)


@pytest.mark.parametrize(
    "change", [("+ 1", "+ 2"), ("inner(x) * 2", "inner(x) - 2"), ("(x)", "(x, z=1)")]
)
def test_changed_code_is_other_code(tmp_path: Path, change: tuple[str, str]) -> None:
    changed = PLAIN.replace(*change, 1)
    assert code(load(tmp_path / "b/prep.py", changed)) != code(load(tmp_path / "a/prep.py", PLAIN))


def test_a_version_stands_for_the_code(tmp_path: Path) -> None:
    first, other = load(tmp_path / "a.py", PLAIN), load(tmp_path / "b.py", PLAIN.replace("1", "3"))
    assert code(first, version="1") == code(other, version="1") != code(other, version="2")


def test_code_that_cannot_be_read_counts_by_its_bytecode(tmp_path: Path) -> None:
    def made(text: str) -> Any:
        module: Any = type(sys)("prep")
        exec(text, module.__dict__)
        return module

    assert code(made(PLAIN)) == code(made(PLAIN)) != code(made(PLAIN.replace("+ 1", "+ 2")))


def test_a_file_that_was_edited_since_it_was_imported_is_not_believed(tmp_path: Path) -> None:
    module = load(tmp_path / "prep.py", PLAIN)
    (tmp_path / "prep.py").write_text(PLAIN.replace("+ 1", "+ 2"))  # the old code still runs
    assert code(module) != code(load(tmp_path / "new/prep.py", PLAIN.replace("+ 1", "+ 2")))


def test_values_and_functions_of_the_closure_count() -> None:
    def made(by: Any, helper: Callable[[int], int]) -> Callable[[int], int]:
        def prepare(x: int) -> int:
            return helper(x) * by

        return prepare

    def one(x: int) -> int:
        return x + 1

    def two(x: int) -> int:
        return x + 2

    first = called(made(1, one), 1)
    assert called(made(1, one), 1) == first
    assert called(made(2, one), 1) != first
    assert called(made(1, two), 1) != first
    with pytest.raises(UnsupportedValue, match="'by'") as error:
        called(made(object(), one), 1)
    assert "version=" in error.value.hint


def test_a_function_that_calls_itself_by_its_closure() -> None:
    def made(last: int) -> Callable[[int], int]:
        def count(n: int) -> int:
            return n if n >= last else count(n + 1)

        return count

    assert called(made(3), 1) == called(made(3), 1) != called(made(4), 1)


def test_what_it_depends_on_is_what_was_named(tmp_path: Path) -> None:
    module = load(tmp_path / "a.py", PLAIN)
    other = load(tmp_path / "b.py", PLAIN.replace("+ 1", "+ 2"))
    assert code(module, depends=(module.prepare, 3)) == code(module, depends=(module.prepare, 3))
    assert code(module, depends=(module.prepare,)) != code(module, depends=(other.prepare,))
    assert code(module, depends=(3,)) != code(module, depends=(4,)) != code(module)
