"""A machine that follows a pickle's operations and takes notes instead of obeying.

A pickle is a program for a small stack machine: it makes values, names functions and
classes ("globals"), and has them called. This one makes plain values itself, understands
the few calls that PyTorch and NumPy use for tensors, and writes any other down as what it
is: a name. It imports nothing, calls nothing that a pickle names, compares and hashes
nothing that a pickle built (a nested tuple's hash takes for ever), and stops at the limits
below.
"""

from __future__ import annotations

import io
import pickletools
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from holdfast.core.types import MiB
from holdfast.foreign.harmless import HARMLESS

MAX_PICKLE_BYTES = 64 * MiB
"""A pickle of 100,000 tensors has about 20 MB."""
MAX_OPERATIONS = 4_000_000  # a tensor takes about 40
MAX_OBJECTS = 1_000_000  # containers and calls; a tensor takes about 6
MAX_NAMES = 10_000


@dataclass(slots=True, eq=False)
class Name:
    """A global: a function, a class, or anything else that a module holds."""

    text: str


@dataclass(slots=True, eq=False)
class Items:
    """A list, tuple or set."""

    kind: str
    items: list[Value]


@dataclass(slots=True, eq=False)
class Pairs:
    """A dict. Its keys can be anything, twice too: they are not looked up here."""

    pairs: list[tuple[Value, Value]]


@dataclass(slots=True, eq=False)
class Made:
    """What a call would make."""

    by: Value
    args: list[Value]
    content: list[Value] = field(default_factory=list["Value"])
    """What is put into it afterwards."""
    state: list[Value] = field(default_factory=list["Value"])
    """What it is told to take as its attributes."""


@dataclass(slots=True, eq=False)
class Stored:
    """A persistent id: what is kept outside of the pickle, such as a tensor's storage."""

    id: Value


Value: TypeAlias = "bool | int | float | str | bytes | Name | Items | Pairs | Made | Stored | None"


@dataclass
class Walked:
    """What is known once the machine has stopped."""

    value: Value = None
    end: int = 0
    """Where the pickle ends: the next one may follow."""
    names: dict[str, Name] = field(default_factory=dict[str, Name])
    """Every global, in the order in which they are named."""
    deeds: list[str] = field(default_factory=list[str])
    """What it does besides, that no harmless pickle does."""
    operations: int = 0
    calls: int = 0
    """How often something is called."""
    problem: str = ""
    """Why it stopped early; "" at a regular end."""


class Malformed(ValueError):
    """No unpickler would go on here."""


class _Limit(Exception):
    """More than this machine takes."""


# A warning (of an escape that is none) is an error to programs that ask for that.
_MALFORMED = (ValueError, IndexError, KeyError, EOFError, OverflowError, struct.error, Warning)


def walk(data: bytes, start: int = 0, *, operations: int = MAX_OPERATIONS) -> Walked:
    """Follow the pickle at `start` of `data` to its end, or as far as it can be followed, for
    at most so many operations.

    Never raises: an unpickler would have obeyed everything up to the place of the damage,
    so what was found until there counts.
    """
    machine = _Machine()
    stream = io.BytesIO(data)
    stream.seek(start)
    walked = machine.walked
    try:
        # Typed loosely: `arg` is whatever the operation carries.
        steps: Any = pickletools.genops(stream)
        for operation, arg, _ in steps:
            if walked.operations >= operations:
                raise _Limit(f"more than {operations:,} operations")
            walked.operations += 1
            machine.step(operation.name, arg)
            if machine.stopped:
                break
    except _Limit as limit:
        walked.problem = f"its pickle has {limit}: the rest was not looked at"
    except _MALFORMED as error:
        text = f"{error}"[:200]
        walked.problem = f"its pickle is malformed at byte {stream.tell() - start:,} ({text})"
    if not machine.stopped and not walked.problem:
        walked.problem = "its pickle has no end"
    walked.end = stream.tell()
    return walked


_CONSTANTS: dict[str, Value] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("BYTEARRAY8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    )
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    def __init__(self) -> None:
        self.walked = Walked()
        self.stopped = False
        self._stack: list[Value] = []
        self._below: list[list[Value]] = []
        self._memo: dict[int, Value] = {}
        self._objects = 0
        self._verbs: dict[str, Callable[[Any], None]] = {
            "MARK": self._mark,
            "STOP": self._stop,
            "POP": self._pop_any,
            "POP_MARK": lambda _: self._forget(self._since_mark()),
            "DUP": lambda _: self._push(self._top()),
            "EMPTY_LIST": lambda _: self._make(Items("list", [])),
            "EMPTY_TUPLE": lambda _: self._make(Items("tuple", [])),
            "EMPTY_SET": lambda _: self._make(Items("set", [])),
            "EMPTY_DICT": lambda _: self._make(Pairs([])),
            "LIST": lambda _: self._make(Items("list", self._since_mark())),
            "TUPLE": lambda _: self._make(Items("tuple", self._since_mark())),
            "FROZENSET": lambda _: self._make(Items("frozenset", self._since_mark())),
            "DICT": lambda _: self._make(Pairs(_paired(self._since_mark()))),
            "APPEND": lambda _: self._extend([self._pop()]),
            "APPENDS": lambda _: self._extend(self._since_mark()),
            "ADDITEMS": lambda _: self._extend(self._since_mark()),
            "SETITEM": self._set_item,
            "SETITEMS": lambda _: self._update(_paired(self._since_mark())),
            "PUT": self._put,
            "BINPUT": self._put,
            "LONG_BINPUT": self._put,
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            "GET": lambda index: self._push(self._memo[index]),
            "BINGET": lambda index: self._push(self._memo[index]),
            "LONG_BINGET": lambda index: self._push(self._memo[index]),
            "GLOBAL": lambda text: self._push(self._name(*text.split(" ", 1))),
            "STACK_GLOBAL": self._stack_global,
            "EXT1": self._extension,
            "EXT2": self._extension,
            "EXT4": self._extension,
            "REDUCE": self._reduce,
            "NEWOBJ": self._reduce,
            "NEWOBJ_EX": self._new_object_with_keywords,
            "INST": self._instance,
            "OBJ": self._object,
            "BUILD": self._build,
            "PERSID": lambda id: self._make(Stored(id)),
            "BINPERSID": lambda _: self._make(Stored(self._pop())),
            "NEXT_BUFFER": lambda _: self._make(Stored("a buffer outside of the file")),
            "READONLY_BUFFER": lambda _: None,
            "PROTO": lambda _: None,
            "FRAME": lambda _: None,
        }

    def step(self, operation: str, arg: Any) -> None:
        if operation in _LITERALS:
            self._push(bytes(arg) if isinstance(arg, bytearray) else arg)
        elif operation in _CONSTANTS:
            self._push(_CONSTANTS[operation])
        elif operation in _TUPLES:
            count = _TUPLES[operation]
            if len(self._stack) < count:
                raise Malformed("a tuple of more than there is")
            items = self._stack[-count:]
            del self._stack[-count:]
            self._make(Items("tuple", items))
        elif (verb := self._verbs.get(operation)) is not None:
            verb(arg)
        else:
            raise Malformed(f"the operation {operation} is not known")

    # -- the stack -----------------------------------------------------------------

    def _push(self, value: Value) -> None:
        self._stack.append(value)

    def _make(self, value: Value) -> None:
        self._count()
        self._stack.append(value)

    def _count(self) -> None:
        self._objects += 1
        if self._objects > MAX_OBJECTS:
            raise _Limit(f"more than {MAX_OBJECTS:,} objects")

    def _pop(self) -> Value:
        if not self._stack:
            raise Malformed("the stack is empty")
        return self._stack.pop()

    def _top(self) -> Value:
        if not self._stack:
            raise Malformed("the stack is empty")
        return self._stack[-1]

    def _mark(self, _: object) -> None:
        self._count()
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Value]:
        if not self._below:
            raise Malformed("there is no mark")
        items, self._stack = self._stack, self._below.pop()
        return items

    def _forget(self, values: list[Value]) -> None:
        """They are gone."""

    def _pop_any(self, _: object) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def _stop(self, _: object) -> None:
        self.walked.value = self._pop()
        self.stopped = True

    def _put(self, index: int) -> None:
        if index < 0:
            raise Malformed("a negative place in the memo")
        self._memo[index] = self._top()

    # -- containers ----------------------------------------------------------------

    def _extend(self, items: list[Value]) -> None:
        target = self._top()
        if isinstance(target, Items):
            target.items.extend(items)
        elif isinstance(target, Made):
            target.content.append(Items("list", items))
        else:
            self._tamper(target)

    def _set_item(self, _: object) -> None:
        value, key = self._pop(), self._pop()
        self._update([(key, value)])

    def _update(self, pairs: list[tuple[Value, Value]]) -> None:
        target = self._top()
        if isinstance(target, Pairs):
            target.pairs.extend(pairs)
        elif isinstance(target, Made):
            self._count()
            target.content.append(Pairs(pairs))
        else:
            self._tamper(target)

    # -- names and calls -----------------------------------------------------------

    def _name(self, module: str, name: str = "") -> Name:
        text = _todays_name(module, name)
        known = self.walked.names.get(text)
        if known is None:
            if len(self.walked.names) >= MAX_NAMES:
                raise _Limit(f"more than {MAX_NAMES:,} names of functions and classes")
            known = self.walked.names[text] = Name(text)
        return known

    def _stack_global(self, _: object) -> None:
        name, module = self._pop(), self._pop()
        if isinstance(name, str) and isinstance(module, str):
            self._push(self._name(module, name))
        else:
            self._push(self._name("<a module that is computed while loading>", "<name>"))

    def _extension(self, code: int) -> None:
        self._push(self._name("copyreg", f"<extension {code}>"))

    def _reduce(self, _: object) -> None:
        args, function = self._pop(), self._pop()
        self._call(function, args.items if isinstance(args, Items) else [args])

    def _new_object_with_keywords(self, _: object) -> None:
        keywords, args, cls = self._pop(), self._pop(), self._pop()
        self._call(cls, [*(args.items if isinstance(args, Items) else [args]), keywords])

    def _instance(self, text: str) -> None:
        args = self._since_mark()
        self._call(self._name(*text.split(" ", 1)), args)

    def _object(self, _: object) -> None:
        args = self._since_mark()
        if not args:
            raise Malformed("an object without a class")
        self._call(args[0], args[1:])

    def _call(self, function: Value, args: list[Value]) -> None:
        if not isinstance(function, Name):
            self._deed("calls something that it has made")
        self.walked.calls += 1
        self._make(Made(function, args))

    def _build(self, _: object) -> None:
        state = self._pop()
        target = self._top()
        if isinstance(target, Made):
            target.state.append(state)
        elif isinstance(target, Name):
            self._tamper(target)
        # Else a state for a plain container: an OrderedDict's attributes, say.

    def _tamper(self, target: Value) -> None:
        if not isinstance(target, Name):
            raise Malformed("something is put into what holds nothing")
        self._deed(f"changes {target.text}")

    def _deed(self, text: str) -> None:
        if text not in self.walked.deeds and len(self.walked.deeds) < MAX_NAMES:
            self.walked.deeds.append(text)


def _todays_name(module: str, name: str) -> str:
    """What an unpickler takes a name for: those of Python 2 have moved since."""
    before = f"{module}.{name}"
    module = IMPORT_MAPPING.get(module, module)
    now = ".".join(NAME_MAPPING.get((before.removesuffix(f".{name}"), name), (module, name)))
    # Not at every protocol: only where the old name could be nothing else is it harmless.
    moved_safely = before.startswith(("__builtin__.", "copy_reg."))
    return before if now in HARMLESS and not moved_safely else now


def _paired(items: list[Value]) -> list[tuple[Value, Value]]:
    if len(items) % 2:
        raise Malformed("a key without a value")
    return list(zip(items[::2], items[1::2], strict=True))
