"""Nodes of plain Python values: exact, and decoded without running anyone's code."""

from __future__ import annotations

import base64
import binascii
import contextlib
import datetime as dt
import gc
import os
import pathlib
import re
import struct
import zoneinfo
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Generator
from math import isfinite
from typing import Any, cast

from holdfast.core.types import Buffer, KiB, Node
from holdfast.errors import DamagedObject, UnsupportedValue

MAX_INLINE_BYTES = 4 * KiB
"""Longer strings and bytes become leaves."""

MAX_INLINE_ITEMS = 4 * KiB
"""Longer lists of nothing but int or float become leaves: a run's loss history."""

MAX_DEPTH = 128
"""Levels of containers. JSON nests up to three times as deep, and its reader stops
at Python's recursion limit (1000 less the caller's own depth)."""

SAFE_INT = 1 << 53
"""JSON readers of other languages keep integers up to here exact."""

MAX_INT_BITS = 1 << 24  # 2 MiB: far beyond any counter, below a quadratic conversion that hurts


FACTORIES: dict[str, Any] = {
    "None": None,
    **{
        kind.__name__: kind
        for kind in (list, dict, set, frozenset, int, float, str, bool, tuple, bytes, bytearray)
    },
    **{kind.__name__: kind for kind in (deque, Counter, OrderedDict)},
}
"""What a defaultdict's factory may be: callables that do nothing but make a value."""


@contextlib.contextmanager
def collector_paused() -> Generator[None]:
    """No cyclic garbage collection inside.

    A tree of 20,000 arrays is 100,000 new objects, none of them garbage: the collector
    would walk the whole heap of the training process again and again for nothing.
    """
    if not gc.isenabled():
        yield
        return
    try:
        gc.disable()
        yield
    finally:
        gc.enable()


def key_label(key: object) -> str:
    """A key that is no string, as paths show it."""
    return str(key)[:80] if isinstance(key, int | float) else repr(key)[:80]


def kind_name(value: object) -> str:
    """The type of a live value, as messages show it."""
    return type(value).__qualname__


def malformed(path: str, reason: str) -> DamagedObject:
    """The error for a node that no `TreeEncoder` wrote."""
    return DamagedObject("the tree", reason, leaf=path)


# -- bytes and strings ----------------------------------------------------------


def b64(data: Buffer) -> str:
    return base64.b64encode(data).decode("ascii")


def unb64(text: object, path: str) -> bytes:
    if not isinstance(text, str):
        raise malformed(path, "its bytes are not a string")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise malformed(path, "its bytes are not base64") from None


def utf8(text: str) -> bytes:
    """UTF-8 that also keeps lone surrogates."""
    return text.encode("utf-8", "surrogatepass")


def from_utf8(data: bytes, path: str) -> str:
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise malformed(path, "its text is not UTF-8") from None


def encode_str(text: str) -> Node:
    """A JSON string, or a tagged node if the text has lone surrogates."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return {"!": "str", "b64": b64(utf8(text))}
    return text


# -- numbers --------------------------------------------------------------------


def encode_int(number: int) -> Node:
    if -SAFE_INT <= number <= SAFE_INT:
        return number
    # Hexadecimal: decimal conversion is quadratic, and Python limits it to 4300 digits.
    return {"!": "int", "v": hex(number)}


_HEX = re.compile(r"-?0x[0-9a-f]+")


def decode_int(node: dict[str, Node], path: str) -> int:
    text = node.get("v")
    if not isinstance(text, str) or not _HEX.fullmatch(text) or 4 * len(text) > MAX_INT_BITS:
        raise malformed(path, "its integer is malformed")
    return int(text, 16)


def encode_float(number: float) -> Node:
    """JSON keeps every finite double, by the shortest digits that name it."""
    if isfinite(number):
        return number
    return {"!": "float", "bits": struct.pack(">d", number).hex()}


def _unhex(node: dict[str, Node], key: str, nbytes: int, path: str) -> bytes:
    text = node.get(key)
    if not isinstance(text, str) or not re.fullmatch(f"[0-9a-f]{{{2 * nbytes}}}", text):
        raise malformed(path, f"its {key} are malformed")
    return bytes.fromhex(text)


def decode_float(node: dict[str, Node], path: str) -> float:
    return struct.unpack(">d", _unhex(node, "bits", 8, path))[0]


def encode_complex(number: complex) -> Node:
    return {"!": "complex", "bits": struct.pack(">2d", number.real, number.imag).hex()}


def decode_complex(node: dict[str, Node], path: str) -> complex:
    return complex(*struct.unpack(">2d", _unhex(node, "bits", 16, path)))


# -- paths ------------------------------------------------------------------------

_PURE = {"posix": pathlib.PurePosixPath, "windows": pathlib.PureWindowsPath}
PATH_TYPES: tuple[type, ...] = (
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
    pathlib.PosixPath,
    pathlib.WindowsPath,
)


def encode_path(value: pathlib.PurePath) -> Node:
    node: dict[str, Node] = {
        "!": "path",
        "kind": "windows" if isinstance(value, pathlib.PureWindowsPath) else "posix",
        "v": encode_str(str(value)),
    }
    if not isinstance(value, pathlib.Path):
        node["pure"] = True
    return node


def decode_path(node: dict[str, Node], text: object, path: str) -> pathlib.PurePath:
    """A path of another system's kind comes back as its pure variant."""
    kind = _PURE.get(node.get("kind", ""))
    if kind is None or not isinstance(text, str):
        raise malformed(path, "its path is malformed")
    here = "windows" if os.name == "nt" else "posix"
    if node.get("pure") is not True and node["kind"] == here:
        return pathlib.Path(text)
    return kind(text)


# -- dates and times ----------------------------------------------------------------

_ZONE = re.compile(r"[A-Za-z0-9_+\-]+(/[A-Za-z0-9_+\-]+)*")


def _zone(value: dt.tzinfo | None, path: str) -> Node:
    if value is None:
        return None
    if type(value) is dt.timezone:
        # The arguments of timezone(): its name only if it was given one.
        offset, *name = cast("tuple[Any, ...]", value.__getinitargs__())  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        node: dict[str, Node] = {"!": "timezone", "offset": _delta(offset)}
        if name:
            node["name"] = encode_str(name[0])
        return node
    if type(value) is zoneinfo.ZoneInfo and value.key:
        return {"!": "zone", "key": value.key}
    raise UnsupportedValue(
        path,
        f"time zone of type {type(value).__qualname__}",
        hint="Use datetime.timezone or zoneinfo.ZoneInfo.",
    )


def _delta(value: dt.timedelta) -> list[int]:
    return [value.days, value.seconds, value.microseconds]


def encode_time(value: object, path: str) -> Node:
    """The node of any value of the `datetime` module (exact types only)."""
    match value:
        case dt.datetime():
            clock = [value.hour, value.minute, value.second, value.microsecond]
            fields = [value.year, value.month, value.day, *clock]
            return _folded("datetime", fields, value.fold, value.tzinfo, path)
        case dt.date():
            return {"!": "date", "v": [value.year, value.month, value.day]}
        case dt.time():
            fields = [value.hour, value.minute, value.second, value.microsecond]
            return _folded("time", fields, value.fold, value.tzinfo, path)
        case dt.timedelta():
            return {"!": "timedelta", "v": _delta(value)}
        case dt.tzinfo():
            return _zone(value, path)
        case _:
            raise TypeError(value)


def _folded(
    tag: str, fields: list[int], fold: int, zone: dt.tzinfo | None, path: str
) -> dict[str, Node]:
    node: dict[str, Node] = {"!": tag, "v": fields}
    if fold:
        node["fold"] = fold
    if zone is not None:
        node["zone"] = _zone(zone, path)
    return node


TIME_TYPES: tuple[type, ...] = (
    dt.datetime,
    dt.date,
    dt.time,
    dt.timedelta,
    dt.timezone,
    zoneinfo.ZoneInfo,
)


def decode_time(node: dict[str, Node], path: str) -> Any:
    """The inverse of `encode_time`."""
    try:
        return _decode_time(node, path)
    except (TypeError, ValueError, OverflowError, KeyError) as error:
        raise malformed(path, f"its {node['!']} is malformed ({error})") from None


def _decode_time(node: dict[str, Node], path: str) -> Any:
    match node["!"]:
        case "datetime":
            return cast(Any, dt.datetime)(*_numbers(node["v"], 7), **_fold_and_zone(node, path))
        case "time":
            return cast(Any, dt.time)(*_numbers(node["v"], 4), **_fold_and_zone(node, path))
        case "date":
            return dt.date(*_numbers(node["v"], 3))
        case "timedelta":
            return dt.timedelta(*_numbers(node["v"], 3))
        case "timezone":
            offset = dt.timedelta(*_numbers(node["offset"], 3))
            if "name" not in node:
                # timezone(timedelta(0)) and timezone.utc are one object, as pickle has it.
                return dt.timezone(offset)
            name = node["name"]
            if isinstance(name, dict):
                name = from_utf8(unb64(cast(Any, name).get("b64"), path), path)
            return dt.timezone(offset, name)
        case _:
            key = node["key"]
            if not isinstance(key, str) or not _ZONE.fullmatch(key):
                raise ValueError("its name is no time zone")
            return zoneinfo.ZoneInfo(key)


def _numbers(value: object, count: int) -> list[int]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    items = cast(list[Any], value)
    if len(items) != count or any(type(item) is not int for item in items):
        raise ValueError("not the right numbers")
    return items


def _fold_and_zone(node: dict[str, Node], path: str) -> dict[str, Any]:
    zone = node.get("zone")
    if zone is not None:
        if not isinstance(zone, dict):
            raise TypeError("its zone is malformed")
        tagged = cast(dict[str, Node], zone)
        if tagged.get("!") not in ("timezone", "zone"):
            raise ValueError("its zone is malformed")
        zone = decode_time(tagged, path)
    return {"fold": node.get("fold", 0), "tzinfo": zone}


DECODERS: dict[str, Callable[[dict[str, Node], str], Any]] = {
    "int": decode_int,
    "float": decode_float,
    "complex": decode_complex,
    **dict.fromkeys(("datetime", "date", "time", "timedelta", "timezone", "zone"), decode_time),
}
"""Tags whose nodes hold everything themselves."""
