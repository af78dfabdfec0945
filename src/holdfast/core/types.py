"""Names for the plain types that every layer passes around."""

from __future__ import annotations

from typing import Any, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Bytes in memory. `collections.abc.Buffer` needs Python 3.12."""

Node: TypeAlias = Any
"""A JSON value: None, bool, int, float, str, list or dict. In a manifest's tree a
JSON object always has a tag under `"!"` (see `core.tree`)."""

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
