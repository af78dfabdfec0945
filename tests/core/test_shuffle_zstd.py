"""Compressed chunks: every size and type comes back, nothing else is taken for one, and what
a frame claims costs no memory."""

from __future__ import annotations

import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core import shuffle_zstd
from holdfast.core.codecs import load_zstd
from holdfast.core.shuffle_zstd import Encoder, Undecodable, decode

zstd: Any = load_zstd()
SIZES = st.sampled_from([1, 2, 4, 8])
NUMBERS = np.arange(5000, dtype=np.float32)


def encoded(data: bytes, itemsize: int, room: int | None = None) -> bytes | None:
    into = bytearray(2 * len(data) + 100 if room is None else room)
    size = Encoder().encode(memoryview(data), itemsize, memoryview(into))
    return None if size is None else bytes(into[:size])


def decoded(stored: bytes, itemsize: int, nbytes: int) -> bytes:
    raw = bytearray(nbytes)
    decode(memoryview(stored), itemsize, memoryview(raw))
    return bytes(raw)


@st.composite
def chunks(draw: st.DrawFn) -> tuple[bytes, int]:
    """Bytes that compress well, badly, and not at all, longer than a piece now and then."""
    itemsize = draw(SIZES)
    count = draw(st.integers(1, 3000))
    top = draw(st.sampled_from([1, 2, 16, 256]))
    seed = draw(st.integers(0, 2**32))
    return np.random.default_rng(seed).integers(0, top, count * itemsize, np.uint8).tobytes(), (
        itemsize
    )


@settings(deadline=None)
@given(chunk=chunks(), piece=st.sampled_from([1, 100, 256 * 1024]))
def test_every_chunk_comes_back(chunk: tuple[bytes, int], piece: int) -> None:
    data, itemsize = chunk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle_zstd, "_PIECE_BYTES", max(piece, len(data) // 200))
        stored = encoded(data, itemsize)
        assert stored is not None
        assert decoded(stored, itemsize, len(data)) == data


@settings(deadline=None)
@given(chunk=chunks())
def test_the_layout_is_that_of_the_format_page(chunk: tuple[bytes, int]) -> None:
    """One frame, which says its size, of the first bytes of all items, then the second ones."""
    data, itemsize = chunk
    shuffled = np.frombuffer(data, np.uint8).reshape(-1, itemsize).T.tobytes()
    stored = encoded(data, itemsize)
    assert stored is not None
    assert zstd.get_frame_info(stored).decompressed_size == len(data)
    assert zstd.decompress(stored) == shuffled
    assert decoded(zstd.compress(shuffled), itemsize, len(data)) == data


@settings(deadline=None)
@given(chunk=chunks(), less=st.integers(1, 100))
def test_too_little_room_is_no_reason_for_a_broken_frame(
    chunk: tuple[bytes, int], less: int
) -> None:
    data, itemsize = chunk
    whole = encoded(data, itemsize)
    assert whole is not None
    assert encoded(data, itemsize, len(whole)) == whole
    assert encoded(data, itemsize, max(0, len(whole) - less)) is None


def test_an_encoder_goes_on_after_a_chunk_that_did_not_fit() -> None:
    encoder = Encoder()
    noise = np.random.default_rng(1).bytes(700_000)
    into = memoryview(bytearray(len(noise)))
    for _ in range(3):
        assert encoder.encode(memoryview(noise), 4, into[: len(noise) // 2]) is None
        size = encoder.encode(NUMBERS.data.cast("B"), 4, into)
        assert size is not None
        assert decoded(bytes(into[:size]), 4, NUMBERS.nbytes) == NUMBERS.tobytes()


def test_a_shuffle_is_what_makes_floats_smaller() -> None:
    weights = np.random.default_rng(1).normal(0, 0.02, 500_000).astype(np.float32)
    shuffled, plain = encoded(weights.tobytes(), 4), encoded(weights.tobytes(), 1)
    assert shuffled is not None
    assert plain is not None
    assert len(shuffled) < 0.86 * weights.nbytes
    assert len(plain) > 0.90 * weights.nbytes


def test_compressing_does_not_hold_the_interpreter_up() -> None:
    """Another thread goes on only if the lock is let go of: nothing takes it away here."""
    data = np.random.default_rng(1).integers(0, 100, 1_000_000, np.uint8)
    into = memoryview(bytearray(data.nbytes))
    turns = 0
    started, done = threading.Event(), threading.Event()

    def count() -> None:
        nonlocal turns
        started.set()
        while not done.is_set():
            turns += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    sys.setswitchinterval(1000)
    try:
        thread.start()
        started.wait()
        before = turns
        for _ in range(300):  # the machine may be busy with something else
            Encoder().encode(data.data, 1, into)  # of one byte: NumPy copies nothing
            if turns > before + 3:
                break
        assert turns > before + 3
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()


# -- what is no chunk -----------------------------------------------------------------------


def frame(data: bytes, **parameters: int) -> bytes:
    options = {zstd.CompressionParameter[name]: value for name, value in parameters.items()}
    return zstd.compress(data, options=options)


DATA = NUMBERS.tobytes()
WRONG: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "cut off"),
    "no frame": (lambda: b"\0" * 100, "format|Unknown"),
    "one byte less": (lambda: frame(DATA)[:-1], "cut off"),
    "without its checksum": (lambda: frame(DATA, checksum_flag=1)[:-4], "cut off"),
    "a wrong checksum": (lambda: frame(DATA, checksum_flag=1)[:-4] + b"abcd", "checksum"),
    "a byte more": (lambda: frame(DATA) + b"x", "follows"),
    "a frame more": (lambda: frame(DATA) + frame(b"x"), "follows"),
    "an empty frame more": (lambda: frame(DATA) + frame(b""), "follows"),
    "much more": (lambda: frame(DATA) + b"x" * 1_000_000, "follows"),
    "longer": (lambda: frame(DATA + b"x"), "more than 20,000 bytes"),
    "longer, without its size": (
        lambda: frame(DATA + b"x", content_size_flag=0),
        "more than 20,000 bytes",
    ),
    "shorter": (lambda: frame(DATA[:-1]), "holds 19,999 bytes, not 20,000"),
    "empty": (lambda: frame(b""), "holds 0 bytes"),
    "a skippable frame": (lambda: b"\x50\x2a\x4d\x18\4\0\0\0abcd" + frame(DATA), "0 bytes"),
    "a window of 128 MiB": (
        lambda: frame(DATA * 8000, window_log=27)[:1000],
        "memory",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_chunk_is_refused(kind: str) -> None:
    make, message = WRONG[kind]
    with pytest.raises(Undecodable, match=message):
        decoded(make(), 4, len(DATA))


@pytest.mark.parametrize("sized", [0, 1])
def test_a_bomb_takes_no_memory(sized: int) -> None:
    bomb = frame(bytes(256 << 20), content_size_flag=sized)
    assert len(bomb) < 20_000
    raw = memoryview(bytearray(1 << 20))
    decode(memoryview(frame(bytes(1 << 20))), 4, raw)
    tracemalloc.start()
    try:
        with pytest.raises(Undecodable, match="more than 1,048,576 bytes"):
            decode(memoryview(bomb), 4, raw)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("more", [b"x", frame(b"")])
def test_what_follows_a_frame_that_ends_with_a_piece(
    more: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = frame(DATA)
    monkeypatch.setattr(shuffle_zstd, "_PIECE_BYTES", len(whole))
    assert decoded(whole, 1, len(DATA)) == DATA
    with pytest.raises(Undecodable, match="follows"):
        decoded(whole + more, 1, len(DATA))


def test_cut_at_any_byte() -> None:
    whole = frame(DATA)
    for end in range(len(whole)):
        with pytest.raises(Undecodable):
            decoded(whole[:end], 4, len(DATA))


def test_a_flipped_bit_never_comes_back_as_the_chunk() -> None:
    """Or it is one that says nothing about the bytes; the digest tells."""
    stored = encoded(DATA, 4)
    assert stored is not None
    harmless = 0
    for bit in range(8 * len(stored)):
        flipped = bytearray(stored)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            harmless += decoded(bytes(flipped), 4, len(DATA)) == DATA
        except Undecodable:
            pass
    assert harmless < 40, "reserved and unused bits"
