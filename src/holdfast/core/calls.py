"""What names a stored result: which function, with which arguments, made by which code."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import msgspec
from blake3 import blake3

from holdfast.core.code import Function, fingerprint, plain_function, remember_text
from holdfast.core.digest import digest, digest_of
from holdfast.core.encode import TreeEncoder
from holdfast.core.types import MiB
from holdfast.errors import StateError, UnsupportedValue, UsageError

_BLOCK_BYTES = MiB


class Call(NamedTuple):
    """One call of one function."""

    function: str
    """Module and qualified name."""
    arguments: str
    """Digest of the arguments, or of what `key=` made of them."""
    code: str
    """Digest of the code's fingerprint, or of the version that was given."""


class Rule(NamedTuple):
    """How calls of a function are named."""

    function: Function
    version: str | int | None = None
    key: Function | None = None
    depends: tuple[object, ...] = ()


def _checked(rule: Rule) -> Rule:
    plain = plain_function(rule.function)
    if not callable(plain) or not getattr(plain, "__qualname__", ""):
        raise UsageError(
            f"{rule.function!r} has no name that a stored result could be found by",
            hint="Give a function: def prepare(path): ...",
        )
    kind = ""
    if inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain):
        kind = "is asynchronous"
    elif inspect.isgeneratorfunction(plain):
        kind = "is a generator"
    if kind:
        raise UsageError(
            f"{name_of(rule.function)} {kind}: what it returns is not its result yet",
            hint="Give a function that returns the result: a list, an array, a dict.",
        )
    if not isinstance(rule.version, str | int | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"version={rule.version!r} is no text or number", hint='version="2"')
    return rule


def name_of(function: Function) -> str:
    """
    >>> name_of(functools.partial(print, sep=""))
    'builtins:print'
    """
    plain = plain_function(function)
    return f"{plain.__module__}:{plain.__qualname__}"


def short_name(function: str) -> str:
    """
    >>> short_name("prep.text:tokens"), short_name("__main__:main.<locals>.tokens")
    ('tokens', 'tokens')
    """
    return function.partition(":")[2].rpartition("<locals>.")[2]


def call_of(rule: Rule, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Call:
    """What names the result of `function(*args, **kwargs)`.

    Raises UnsupportedValue for an argument, or something in the function's closure, whose
    value cannot be digested; TypeError if the function does not take these arguments.
    """
    name = name_of(rule.function)
    if rule.key is not None:
        key = rule.key(*args, **kwargs)
        arguments = _digested(key, "what key= returns", name, _KEY_HINT)
    else:
        bound = _bound(rule.function, args, kwargs)
        told = [f"{at}={_digested(value, at, name, _ARGUMENT_HINT)}" for at, value in bound]
        arguments = digest_of([part.encode() for part in told])
    return Call(name, arguments, _code_of(rule, name))


_ARGUMENT_HINT = (
    "Say with key= what its results depend on, as plain values or arrays: "
    "key=lambda model, path: path."
)
_KEY_HINT = "key= returns plain values, arrays or tensors, also in lists and dicts."
_CLOSURE_HINT = 'Make it an argument, or say with version="1" which code this is.'


def _bound(
    function: Function, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> list[tuple[str, object]]:
    """(name, value) of each argument: the same however it was given."""
    if isinstance(function, functools.partial):
        inner = cast("functools.partial[Any]", function)
        return _bound(inner.func, (*inner.args, *args), {**inner.keywords, **kwargs})
    try:
        signature = inspect.signature(function)
    except ValueError:  # built in, without one
        return [*((str(i), v) for i, v in enumerate(args)), *sorted(kwargs.items())]
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    found: list[tuple[str, object]] = []
    owner: object = getattr(function, "__self__", None)
    if inspect.ismethod(function):
        found.append(("self", owner))
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            found += [
                (f"**{key}", each) for key, each in sorted(cast("dict[str, Any]", value).items())
            ]
        else:
            found.append((name, value))
    return found


def _code_of(rule: Rule, name: str) -> str:
    if rule.version is not None:
        return digest(f"version {rule.version}".encode())

    def digested(value: object, at: str) -> str:
        return _digested(value, at, name, _CLOSURE_HINT)

    parts = [fingerprint(rule.function, digested)]
    for number, value in enumerate(rule.depends):
        if inspect.isroutine(value) or isinstance(value, functools.partial):
            parts.append(fingerprint(cast(Function, value), digested))
        elif inspect.isclass(value):
            parts.append(f"{value.__module__}:{value.__qualname__}")
        else:
            parts.append(digested(value, f"depends[{number}]"))
    return digest_of([part.encode() for part in parts])


def _digested(value: object, at: str, function: str, hint: str) -> str:
    try:
        return value_digest(value, at)
    except UnsupportedValue as error:
        raise UnsupportedKey(function, error.path, error.kind, hint) from None


class UnsupportedKey(UnsupportedValue):
    """An argument, or a value of a closure, that no result can be found by."""

    def __init__(self, function: str, path: str, kind: str, hint: str) -> None:
        StateError.__init__(
            self,
            f"no stored result of {function} can be found by {path!r}: it is a {kind}",
            hint=hint,
        )
        self.path = path
        self.kind = kind


def value_digest(value: object, path: str) -> str:
    """A digest of what `value` is, the same in every process.

    Files count with what is in them. Raises UnsupportedValue, StateError.

    >>> value_digest({"a": [1, 2.0]}, "x") == value_digest({"a": [1, 2.0]}, "y")
    True
    >>> value_digest(1, "x") == value_digest(1.0, "x")
    False
    """
    encoder = TreeEncoder(files_in_place=_in_place)
    try:
        tree = encoder.encode(value, path)
        hasher = blake3(msgspec.json.encode(tree))
        for leaf in encoder.leaves:
            source = leaf.source
            hasher.update(f"{source.dtype}{list(source.shape)}".encode())
            block = memoryview(bytearray(min(source.nbytes, _BLOCK_BYTES)))
            for at in range(0, source.nbytes, _BLOCK_BYTES):
                part = block[: source.nbytes - at]
                source.copy_range(at, part)
                hasher.update(part)
        return hasher.hexdigest()
    finally:
        encoder.close()


def _in_place(path: str) -> bool:
    return True


def rule_for(
    function: Function,
    version: str | int | None,
    key: Callable[..., object] | None,
    depends: Iterable[object],
) -> Rule:
    """Raises UsageError for what has no result that could be stored."""
    rule = _checked(Rule(function, version, key, tuple(depends)))
    if version is None:
        remember_text(function)
    return rule
