"""How a chunk's bytes are compressed: shuffled by the bytes of its items, then zstd.

Numbers that are near each other share the bytes of sign and exponent, and hardly any below.
So the first bytes of all items come first, then the second ones, and so on: weights and
moments of 32 bits shrink by a sixth then, where zstd alone finds a twelfth. Both directions
go in small pieces through memory of the caller, without the interpreter's lock: what a frame
claims is never allocated. docs/design/saving.md has the numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from holdfast.core.codecs import load_zstd
from holdfast.core.types import KiB

# More does not make floats smaller, and costs half as much again or more.
_LEVEL = 1
# A frame that wants a larger window is refused; those of `_LEVEL` want 512 KiB.
_WINDOW_LOG_MAX = 23
_PIECE_BYTES = 256 * KiB


class Undecodable(Exception):
    """Stored bytes are no frame that holds what the manifest says."""


class Encoder:
    """Compresses chunks, one after another. Use by one thread at a time.

    Raises ModuleNotFoundError where zstd is not installed.
    """

    def __init__(self) -> None:
        self._zstd = load_zstd()
        self._compressor: Any = None

    def encode(self, raw: memoryview, itemsize: int, into: memoryview) -> int | None:
        """Fill the start of `into` with the chunk `raw`; how many bytes that took, or None
        if it has not enough room."""
        compressor = self._compressor or self._zstd.ZstdCompressor(level=_LEVEL)
        self._compressor = None  # not to be used again if this frame is given up
        compressor.set_pledged_input_size(raw.nbytes)  # written in front of the frame
        planes = np.frombuffer(raw, np.uint8).reshape(-1, itemsize)
        at = 0
        for plane in range(itemsize):
            for row in range(0, len(planes), _PIECE_BYTES):
                piece = np.ascontiguousarray(planes[row : row + _PIECE_BYTES, plane])
                at = _append(compressor.compress(piece.data), into, at)
                if at < 0:
                    return None
        at = _append(compressor.flush(), into, at)
        if at < 0:
            return None
        self._compressor = compressor
        return at


def decode(stored: memoryview, itemsize: int, raw: memoryview) -> None:
    """Fill `raw` with the chunk that `stored` holds, all of both.

    Raises Undecodable, with `raw` filled in part. Its bytes are to be compared with their
    digest before they are used.
    """
    zstd = load_zstd()
    decompressor = zstd.ZstdDecompressor(
        options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX}
    )
    planes = np.frombuffer(raw, np.uint8).reshape(-1, itemsize)
    rows = len(planes)
    at = done = 0
    try:
        while not decompressor.eof:
            piece = memoryview(b"")
            if decompressor.needs_input:
                piece = stored[at : at + _PIECE_BYTES]
                at += piece.nbytes
                if not piece:
                    raise Undecodable("the frame is cut off")
            plane, row = divmod(done, rows)
            room = min(_PIECE_BYTES, rows - row) if done < raw.nbytes else 1
            found: bytes = decompressor.decompress(piece, max_length=room)
            if done + len(found) > raw.nbytes:
                raise Undecodable(f"the frame holds more than {raw.nbytes:,} bytes")
            if found:
                planes[row : row + len(found), plane] = np.frombuffer(found, np.uint8)
            done += len(found)
    except zstd.ZstdError as error:
        raise Undecodable(str(error)) from None
    if done < raw.nbytes:
        raise Undecodable(f"the frame holds {done:,} bytes, not {raw.nbytes:,}")
    if at < stored.nbytes or decompressor.unused_data:
        raise Undecodable("something follows the frame")


def _append(data: bytes, into: memoryview, at: int) -> int:
    """Where the next data goes; -1 if there is no room for this."""
    end = at + len(data)
    if end > into.nbytes:
        return -1
    into[at:end] = data
    return end
