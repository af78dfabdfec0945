"""How the bytes of chunks can be stored, and what that needs; `shuffle_zstd` does it."""

from __future__ import annotations

import sys
from importlib import import_module
from math import prod
from typing import Any

from holdfast.core.plan import itemsize
from holdfast.core.records import Chunk, Leaf
from holdfast.errors import UsageError

RAW = ""
ZSTD = "shuffle-zstd"
CODECS = frozenset({RAW, ZSTD})

# A zstd block of 128 KiB takes four bytes at least. No chunk may claim to hold more than
# that, so that a small pack cannot pose as a state of any size.
MAX_RATIO = 1 << 15

PACKAGE_HINT = "pip install 'holdfast[zstd]'"


def decoded_nbytes(leaf: Leaf, chunk: Chunk) -> int:
    """Bytes of the leaf in this chunk; `chunk.nbytes` are those that are stored."""
    return prod(chunk.shape) * itemsize(leaf.dtype) if chunk.codec else chunk.nbytes


def codec_of(compress: str | None) -> str:
    """The codec for a user's `compress=`. Raises UsageError, also if its package is missing.

    >>> codec_of(None), codec_of("zstd")
    ('', 'shuffle-zstd')
    """
    if compress is None:
        return RAW
    if compress != "zstd":
        raise UsageError(
            f"compress={compress!r} is not known", hint='compress="zstd", or leave it out.'
        )
    if not can_decode(ZSTD):
        raise UsageError(
            f'compress="zstd" needs the package {_module_name()}, which is not installed',
            hint=PACKAGE_HINT,
        )
    return ZSTD


def can_decode(codec: str) -> bool:
    """Whether what this codec needs is installed."""
    if codec == RAW:
        return True
    try:
        load_zstd()
    except ModuleNotFoundError:
        return False
    return True


def load_zstd() -> Any:
    """The module. Raises ModuleNotFoundError."""
    return import_module(_module_name())


def _module_name() -> str:
    # In Python's own library from 3.14 on, and as a package before.
    return "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
