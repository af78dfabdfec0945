"""Fingerprints of functions: whether the code that made a result is still the same.

Of the text, not of the bytecode, where the text is to be had: the same code in another folder,
with other comments, under another Python has the same fingerprint. What the function calls is
not looked into.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import sys
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, ModuleType
from typing import Any, cast

from holdfast.core.digest import digest, digest_of

Function = Callable[..., Any]
Digested = Callable[[object, str], str]
"""(value, what it is called) -> a digest of what the value is."""


def plain_function(function: Function) -> Function:
    """What is below partials, decorators that say what they wrap, and bound methods."""
    while True:
        if isinstance(function, functools.partial):
            function = cast("functools.partial[Any]", function).func
        elif hasattr(function, "__wrapped__"):
            function = inspect.unwrap(function)
        elif inspect.ismethod(function):
            function = function.__func__
        else:
            return function


def fingerprint(function: Function, digested: Digested) -> str:
    """A digest of the function's own code and of the values that its closure holds.

    Decorators, docstrings, comments, annotations' layout and places do not count. A function in
    the closure counts with its code, a module by its name, any other value as `digested` says,
    which may raise.
    """
    return _fingerprint(function, digested, frozenset())


def _fingerprint(function: Function, digested: Digested, inside: frozenset[int]) -> str:
    function = plain_function(function)
    code: object = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):  # built in, or a class: there is nothing to read
        return digest(f"{function.__module__}:{function.__qualname__}".encode())
    parts = [_text_of(code) or _bytecode(code)]
    for name, value in sorted(_closure(function, code).items()):
        if isinstance(value, ModuleType):
            told = digest(value.__name__.encode())
        elif inspect.isroutine(value) or inspect.isclass(value):
            # One that calls itself by a name of its closure is in it.
            there = inside | {id(code)}
            of = plain_function(cast(Function, value))
            known = id(getattr(of, "__code__", None)) in there
            told = "itself" if known else _fingerprint(of, digested, there)
        else:
            told = digested(value, name)
        parts.append(f"{name}={told}")
    return digest_of([part.encode("utf-8", "surrogatepass") for part in parts])


def _closure(function: Function, code: CodeType) -> Mapping[str, object]:
    cells: Any = getattr(function, "__closure__", None) or ()
    found: dict[str, object] = {}
    for name, cell in zip(code.co_freevars, cells, strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # it has no value yet
            found[name] = None
    return found


def remember_text(function: Function) -> None:
    """Read the function's text now: its file may be edited while the program runs."""
    code: object = getattr(plain_function(function), "__code__", None)
    if isinstance(code, CodeType):
        _text_of(code)


@functools.lru_cache(maxsize=1024)
def _text_of(code: CodeType) -> str:
    """The function's text in a normal form; "" where it is not known for certain."""
    try:
        text = "".join(linecache.getlines(code.co_filename))
        # A file can have changed since it was imported: its text is believed only where
        # it compiles to the very code that runs.
        if not text or all(code != found for found in _codes_in(text, code.co_filename)):
            return ""
        tree = ast.parse(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _first_line(node) == (
            code.co_firstlineno
        ):
            if node.name != code.co_name:
                continue
            node.decorator_list = []
            _drop_docstrings(node)
            return ast.unparse(node)
    return ""  # a lambda: its line may hold several


def _first_line(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return min([node.lineno, *(each.lineno for each in node.decorator_list)])


def _codes_in(text: str, name: str) -> Iterator[CodeType]:
    waiting = [compile(text, name, "exec", dont_inherit=True)]
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [const for const in code.co_consts if isinstance(const, CodeType)]


def _drop_docstrings(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body[:1] = [] if len(node.body) > 1 else [ast.Pass()]


def _bytecode(code: CodeType) -> str:
    """What the interpreter runs: the same under the same minor version only."""
    constants = [_bytecode(c) if isinstance(c, CodeType) else _constant(c) for c in code.co_consts]
    return repr(
        (
            sys.version_info[:2],
            digest(code.co_code),
            code.co_names,
            code.co_varnames,
            code.co_freevars,
            constants,
        )
    )


def _constant(value: object) -> str:
    if isinstance(value, frozenset):  # its order differs between processes
        return f"frozenset({sorted(map(_constant, cast(frozenset[object], value)))})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_constant, cast(tuple[object, ...], value)))})"
    return repr(value)
