"""Enums, dataclasses and named tuples: found without importing, made without running
their code.

A class is looked up by name among the modules that are loaded already; its
`__init__`, `__new__` and `__post_init__` never run. What cannot be found comes back
as a `Record`.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from holdfast.core.types import Node
from holdfast.errors import StateError


@dataclass
class Record:
    """A value whose class is not loaded here: its name and its fields."""

    type: str
    fields: dict[str, Any] = field(default_factory=dict[str, Any])


def type_name(kind: type) -> str:
    """`package.module.Class`, as trees store it.

    >>> type_name(Record)
    'holdfast.core.classes:Record'
    """
    return f"{kind.__module__}:{kind.__qualname__}"


def find_class(name: str) -> type | None:
    """The class that `type_name` called so, if its module is loaded. Runs nothing:
    no import, no `__getattr__`, no descriptor."""
    module_name, _, qualname = name.partition(":")
    module = sys.modules.get(module_name)
    if not isinstance(module, types.ModuleType) or not qualname:
        return None
    space: Mapping[str, object] = module.__dict__
    kind: type | None = None
    for part in qualname.split("."):
        found = space.get(part)
        if not isinstance(found, type):
            return None
        kind, space = found, found.__dict__
    # An alias could name something else than the tree says.
    return kind if kind is not None and type_name(kind) == name else None


def class_for(name: object, target: object) -> type | None:
    """The class of a saved value; that of the live `target` if it has the same name
    (a script's `__main__` may be a module's name elsewhere)."""
    if not isinstance(name, str):
        return None
    live = cast(type, type(target))
    if type_name(live) == name or live.__qualname__ == name.partition(":")[2]:
        return live
    return find_class(name)


# -- dataclasses ------------------------------------------------------------------


def is_dataclass(kind: type) -> bool:
    return dataclasses.is_dataclass(kind)


def is_plain_dataclass(kind: type) -> bool:
    """Whether an instance can be made of fields alone: its memory layout is that of
    `object`, and no `__del__` would act on what a store wrote into the fields."""
    return (
        dataclasses.is_dataclass(kind)
        and not hasattr(kind, "__del__")
        and all(base.__module__ != "builtins" or base is object for base in kind.__mro__)
    )


def is_frozen(kind: type) -> bool:
    return bool(cast(Any, kind).__dataclass_params__.frozen)


def dataclass_fields(value: object) -> dict[str, object]:
    """Every attribute that the instance holds: its fields in order, then others."""
    found: dict[str, object] = {}
    for item in dataclasses.fields(cast(Any, value)):
        try:
            found[item.name] = getattr(value, item.name)
        except AttributeError:
            pass  # a field that was never set, or deleted
    found.update(cast(dict[str, object], getattr(value, "__dict__", {})))
    return found


def blank(kind: type, path: str) -> object:
    """An instance of a plain dataclass without any attribute."""
    try:
        return cast(object, object.__new__(kind))
    except TypeError as error:  # abstract, or with a C base
        raise StateError(f"cannot restore {path!r}: {error}") from None


def set_fields(instance: object, values: Mapping[str, object], path: str) -> None:
    """Replace all attributes of a dataclass instance, also of a frozen one. Runs no
    property and no `__setattr__`."""
    slots: dict[str, Any] = {
        name: member
        for base in reversed(type(instance).__mro__)
        for name, member in base.__dict__.items()
        if isinstance(member, types.MemberDescriptorType)
    }
    space = cast("dict[str, object] | None", getattr(instance, "__dict__", None))
    others = {name: value for name, value in values.items() if name not in slots}
    if others and space is None:
        raise StateError(
            f"cannot restore {path!r}: {type(instance).__qualname__} has no {', '.join(others)}",
            hint="The class changed since the checkpoint was saved.",
        )
    for name, member in slots.items():
        if name in values:
            member.__set__(instance, values[name])
        elif hasattr(instance, name):
            member.__delete__(instance)
    if space is not None:
        space.clear()
        space.update(others)


# -- named tuples -----------------------------------------------------------------


def is_namedtuple(kind: type) -> bool:
    fields = cast(object, kind.__dict__.get("_fields", getattr(kind, "_fields", None)))
    return (
        issubclass(kind, tuple)
        and isinstance(fields, tuple)
        and all(isinstance(name, str) for name in cast("tuple[object, ...]", fields))
    )


def make_namedtuple(kind: type | None, name: str, names: list[str], values: list[Any]) -> Any:
    """The named tuple; a Record if the class is not there, or has other fields now."""
    if (
        kind is None
        or not is_namedtuple(kind)
        or list(cast(Any, kind)._fields) != names
        or hasattr(kind, "__del__")
    ):
        return Record(name, dict(zip(names, values, strict=True)))
    return cast(Any, tuple).__new__(kind, values)


# -- enums --------------------------------------------------------------------------

_PLAIN = (int, str, float, bool, type(None))


def encode_enum(value: enum.Enum) -> Node:
    node: dict[str, Node] = {"!": "enum", "type": type_name(type(value))}
    if value.name in type(value).__members__:
        node["name"] = value.name
    return node


def enum_value(value: enum.Enum) -> object | None:
    """What identifies a combination of flags, and tells people what a member was."""
    plain = value.value
    return plain if type(plain) in _PLAIN else None


def make_enum(kind: type | None, name: object, value: object, type_text: str) -> Any:
    """The member called `name`; a combination of flags by its value; else a Record.

    Nothing but the `enum` module's own code runs.
    """
    if kind is not None and issubclass(kind, enum.Enum):
        if isinstance(name, str):
            member = kind.__members__.get(name)
            if member is not None:
                return member
        elif (
            issubclass(kind, enum.Flag)
            and type(value) is int
            and cast(Any, kind)._missing_.__func__ is cast(Any, enum.Flag)._missing_.__func__
        ):
            try:
                return kind(value)
            except ValueError:
                pass  # bits that the class no longer has
    return Record(type_text, {"name": name, "value": value})
