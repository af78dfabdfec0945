"""Digests. BLAKE3 proves bytes; xxh3 only says "unchanged in this process"."""

from __future__ import annotations

from collections.abc import Sequence

from blake3 import blake3
from xxhash import xxh3_128, xxh3_128_digest

from holdfast.core.types import Buffer

DIGEST_HEX_LENGTH = 64


def digest(data: Buffer) -> str:
    """The BLAKE3 digest (256 bit, lower-case hex) of `data`. Releases the GIL.

    >>> digest(b"")[:16]
    'af1349b9f5f9a1a6'
    """
    return blake3(data).hexdigest()


def digest_of(pieces: Sequence[Buffer]) -> str:
    """As `digest`, of all `pieces` one after the other."""
    if len(pieces) == 1:
        return digest(pieces[0])
    hasher = blake3()
    for piece in pieces:
        hasher.update(piece)
    return hasher.hexdigest()


def fingerprint(data: Buffer) -> bytes:
    """A fast 128-bit fingerprint; never stored, never proof against an adversary."""
    return xxh3_128_digest(data)


def fingerprint_of(pieces: Sequence[Buffer]) -> bytes:
    """As `fingerprint`, of all `pieces` one after the other."""
    if len(pieces) == 1:
        return fingerprint(pieces[0])
    hasher = xxh3_128()
    for piece in pieces:
        hasher.update(piece)
    return hasher.digest()
