from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from holdfast.core.packing import (
    ALIGNMENT,
    MAX_HEADER_BYTES,
    PackChunk,
    header_bytes,
    header_room,
    pack_header,
    read_header,
)
from holdfast.core.plan import ITEMSIZES, itemsize
from holdfast.errors import DamagedObject, StateError


def chunk(name: str, dtype: str, *shape: int) -> PackChunk:
    return PackChunk(name, dtype, shape, prod(shape) * itemsize(dtype))


def write(path: Path, chunks: list[PackChunk], **metadata: str) -> bytes:
    header, offsets = pack_header(chunks, metadata)
    data = bytearray(header)
    for offset, item in zip(offsets, chunks, strict=True):
        assert offset == len(data)
        data += bytes(index % 251 for index in range(item.nbytes))
    path.write_bytes(data)
    return bytes(data)


def test_the_safetensors_library_opens_every_dtype(tmp_path: Path) -> None:
    chunks = [chunk(dtype, dtype, 2, 3) for dtype in ITEMSIZES]
    chunks += [chunk("scalar", "F32"), chunk("empty", "I64", 0, 3), chunk("last", "U8", 5)]
    data = write(tmp_path / "a.safetensors", chunks, run="x", note="é")
    with safe_open(tmp_path / "a.safetensors", "pt") as pack:
        assert set(pack.keys()) == {item.name for item in chunks}
        assert pack.metadata() == {"run": "x", "note": "é"}
        position = len(pack_header(chunks, {"run": "x", "note": "é"})[0])
        assert position % ALIGNMENT == 0
        for item in chunks:
            view = pack.get_slice(item.name)
            assert (view.get_dtype(), view.get_shape()) == (item.dtype, list(item.shape))
            if item.nbytes and item.shape:
                stored = pack.get_tensor(item.name).contiguous().view(torch.uint8).flatten()
                assert bytes(stored.tolist()) == data[position : position + item.nbytes]
            position += item.nbytes


def test_a_pack_without_chunks_opens(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", [])
    with safe_open(tmp_path / "a.safetensors", "pt") as pack:
        assert list(pack.keys()) == []


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(
    lambda name: name != "__metadata__"
)


@given(
    st.dictionaries(
        NAMES,
        st.tuples(st.sampled_from(list(ITEMSIZES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    st.dictionaries(NAMES, NAMES, max_size=2),
)
def test_what_is_written_is_read(entries: dict[str, Any], metadata: dict[str, str]) -> None:
    chunks = [chunk(name, dtype, *shape) for name, (dtype, shape) in entries.items()]
    header, offsets = pack_header(chunks, metadata)
    size = len(header) + sum(item.nbytes for item in chunks)
    found = read_header(header, size, "pack")
    assert found.metadata == metadata
    assert found.data_offset == len(header)
    for item, offset in zip(chunks, offsets, strict=True):
        entry = found.entries[item.name]
        assert (entry.dtype, entry.shape, entry.nbytes) == (item.dtype, item.shape, item.nbytes)
        assert entry.offset == offset


def test_packing_refuses_wrong_sizes_and_equal_names() -> None:
    with pytest.raises(StateError, match="two chunks"):
        pack_header([chunk("a", "U8", 1), chunk("a", "U8", 1)], {})
    with pytest.raises(StateError, match="two chunks"):
        pack_header([chunk("__metadata__", "U8", 1)], {})
    with pytest.raises(StateError, match="3 bytes are not"):
        pack_header([PackChunk("a", "F32", (1,), 3)], {})


def hostile(body: bytes, data_bytes: int = 0) -> tuple[bytes, int]:
    return struct.pack("<Q", len(body)) + body, 8 + len(body) + data_bytes


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


A = entry("U8", [4], 0, 4)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "malformed"),
        (b"[]", "malformed"),
        (b"nul", "malformed"),
        (b'{"a": 3}', "malformed"),
        (b'{"\xff": 3}', "malformed"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "malformed"),
        (b'{"__metadata__": {"a": 1}}', "malformed"),
        (json.dumps({"a": {**A, "extra": 1}}).encode(), "malformed"),
        (json.dumps({"a": {**A, "shape": [4.0]}}).encode(), "malformed"),
        (json.dumps({"a": {**A, "data_offsets": [0, 4, 4]}}).encode(), "malformed"),
        (json.dumps({"a": {**A, "data_offsets": [0, 1 << 65]}}).encode(), "malformed|outside"),
        (b'{"a": %s, "a": %s}' % ((json.dumps(A).encode(),) * 2), "twice"),
        (b'{"a": %s, "\\u0061": %s}' % ((json.dumps(A).encode(),) * 2), "twice"),
        (json.dumps({"a": {**A, "dtype": "F99"}}).encode(), "unknown dtype"),
        (json.dumps({"a": entry("U8", [-4], 0, 4)}).encode(), "shape cannot be"),
        (json.dumps({"a": entry("U8", [-2, -2], 0, 4)}).encode(), "shape cannot be"),
        (json.dumps({"a": entry("U8", [0, 1 << 62], 0, 0)}).encode(), "does not fit"),
        (json.dumps({"a": entry("U8", [1 << 32, 1 << 32], 0, 0)}).encode(), "does not fit"),
        (json.dumps({"a": entry("U8", [1] * 65, 0, 1)}).encode(), "shape cannot be"),
        (json.dumps({"a": entry("U8", [5], 0, 4)}).encode(), "does not fit"),
        (json.dumps({"a": entry("U8", [5], 4, 9)}).encode(), "outside the file"),
        (json.dumps({"a": entry("U8", [5], -1, 4)}).encode(), "outside the file"),
        (json.dumps({"a": entry("U8", [0], 5, 4)}).encode(), "outside the file"),
        (json.dumps({"a": A, "b": entry("U8", [2], 3, 5)}).encode(), "overlap"),
        (json.dumps({"a": A, "b": entry("U8", [1], 2, 3)}).encode(), "overlap"),
    ],
)
def test_hostile_headers_are_refused(body: bytes, reason: str) -> None:
    data, size = hostile(body, 8)
    with pytest.raises(DamagedObject, match=reason):
        read_header(data, size, "foreign.safetensors")


def test_impossible_lengths_are_refused_before_reading() -> None:
    with pytest.raises(DamagedObject, match="too short"):
        header_bytes(b"1234567", 7, "x")
    with pytest.raises(DamagedObject, match="claims"):
        header_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1), 1 << 62, "x")
    with pytest.raises(DamagedObject, match="longer than the file"):
        header_bytes(struct.pack("<Q", 100), 50, "x")
    with pytest.raises(DamagedObject, match="cut off"):
        read_header(struct.pack("<Q", 100), 500, "x")


@given(st.binary(max_size=60))
def test_noise_is_refused_and_never_crashes(body: bytes) -> None:
    data, size = hostile(body, 100)
    try:
        read_header(data, size, "x")
    except DamagedObject:
        pass


@given(
    name=st.text("ab]/é", min_size=1, max_size=12),
    dtype=st.sampled_from(sorted(ITEMSIZES)),
    shape=st.lists(st.integers(1, 2000), max_size=3) | st.lists(st.integers(1, 3), max_size=40),
    encoded=st.booleans(),
)
def test_there_is_room_for_a_chunk_that_may_be_encoded(
    name: str, dtype: str, shape: list[int], encoded: bool
) -> None:
    """A thousand times the same, so that a byte too little for each is seen."""
    item = chunk(name, dtype, *shape)
    least = item.encoded("shuffle-zstd", item.nbytes) if encoded else item
    room = header_room([item.widest("shuffle-zstd")] * 1000, {})
    assert room >= header_room([least] * 1000, {})


def test_an_encoded_chunk_is_bytes_with_a_name_that_says_so(tmp_path: Path) -> None:
    item = chunk("w", "F32", 2, 3).encoded("shuffle-zstd", 17)
    write(tmp_path / "a.safetensors", [item])
    with safe_open(tmp_path / "a.safetensors", "pt") as pack:
        assert list(pack.keys()) == ["w[shuffle-zstd]"]
        assert pack.get_tensor("w[shuffle-zstd]").shape == (17,)
