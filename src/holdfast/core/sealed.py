"""Sealed JSON: a value with the digest of its own bytes.

    {"digest":"<64 hex>","value":<JSON>}

with exactly these bytes before the value, so that any language can cut the
value out and hash it without a canonical JSON form. A value's id is that digest.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from holdfast.core.digest import DIGEST_HEX_LENGTH, digest
from holdfast.core.records import FORMAT
from holdfast.errors import DamagedObject, FormatTooNew

_OPEN = b'{"digest":"'
_MIDDLE = b'","value":'
_CLOSE = b"}"
_VALUE_AT = len(_OPEN) + DIGEST_HEX_LENGTH + len(_MIDDLE)

_T = TypeVar("_T", bound=msgspec.Struct)


class _Format(msgspec.Struct):
    format: int


_FORMATS = msgspec.json.Decoder(_Format)  # made here: see the end of `core.records`


def seal(value: msgspec.Struct) -> tuple[str, bytes]:
    """(id, bytes to store) of `value`.

    >>> from holdfast.core.records import RunInfo
    >>> id, data = seal(RunInfo(run="r", created_s=0.0))
    >>> unseal(data, RunInfo, "holdfast.json") == (id, RunInfo(run="r", created_s=0.0))
    True
    """
    body = msgspec.json.encode(value)
    id = digest(body)
    return id, b"".join((_OPEN, id.encode(), _MIDDLE, body, _CLOSE))


def unseal(data: bytes, kind: type[_T], key: str) -> tuple[str, _T]:
    """(id, value) of sealed bytes read from `key`.

    Raises DamagedObject if the digest or the structure is wrong, FormatTooNew if
    a later version wrote it.
    """
    id = unseal_id(data, key)
    body = memoryview(data)[_VALUE_AT:-1]
    try:
        written = _FORMATS.decode(body).format
        if written > FORMAT:
            raise FormatTooNew(
                f"{key} has format {written}; this Holdfast reads up to {FORMAT}",
                hint="Upgrade: pip install -U holdfast",
            )
        return id, msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise DamagedObject(key, f"it is malformed ({error})") from None


def unseal_id(data: bytes, key: str) -> str:
    """The id of sealed bytes read from `key`, whatever their value. Raises DamagedObject if
    the digest is wrong."""
    if (
        len(data) <= _VALUE_AT
        or not data.startswith(_OPEN)
        or data[_VALUE_AT - len(_MIDDLE) : _VALUE_AT] != _MIDDLE
        or not data.endswith(_CLOSE)
    ):
        raise DamagedObject(key, "it is not a sealed Holdfast object")
    body = memoryview(data)[_VALUE_AT:-1]
    id = digest(body)
    if data[len(_OPEN) : len(_OPEN) + DIGEST_HEX_LENGTH] != id.encode():
        raise DamagedObject(key, "its digest does not match its content")
    return id
