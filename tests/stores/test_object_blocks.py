"""Large objects that come in blocks, on their way to a bucket."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from holdfast.core.packing import MAX_HEADER_BYTES
from holdfast.core.plan import CHUNK_BYTES
from holdfast.core.types import Buffer, GiB
from holdfast.errors import StoreFull, StoreUnavailable
from holdfast.manager.packer import PACK_BYTES
from holdfast.stores import object_blocks
from holdfast.stores.filesystem import OsFileSystem
from holdfast.stores.object_blocks import blocks

DATA = bytes(range(256)) * 64


class Bucket:
    """What was put."""

    def __init__(self) -> None:
        self.objects: list[bytes] = []

    def put(self, parts: Sequence[Buffer]) -> bool:
        self.objects.append(b"".join(bytes(part) for part in parts))
        return True


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(object_blocks, "IN_MEMORY_BYTES", 4096)
    return tmp_path


def failing(code: int) -> object:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("nbytes", [1, 4096, 4097, len(DATA)])
def test_what_came_in_any_order_is_put_whole(bucket: Bucket, folder: Path, nbytes: int) -> None:
    new = blocks(bucket.put, "s3://b/p", nbytes)
    assert bucket.objects == []
    for offset in reversed(range(0, nbytes, 4096)):
        new.write(offset, memoryview(DATA)[offset : min(offset + 4096, nbytes)])
    assert new.publish(nbytes)
    new.discard()
    new.discard()
    assert bucket.objects == [DATA[:nbytes]]
    assert list(folder.iterdir()) == []


def test_it_may_be_shorter_than_was_said(bucket: Bucket) -> None:
    new = blocks(bucket.put, "s3://b/p", len(DATA))
    new.write(0, memoryview(DATA)[:5000])
    assert new.publish(5000)
    new.discard()
    assert bucket.objects == [DATA[:5000]]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_is_known_before_the_first_block(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(OsFileSystem, "allocate", failing(code))
    with pytest.raises(StoreFull, match=f"an object of 16.4 KB .* written in {folder}: ") as full:
        blocks(bucket.put, "s3://b/p", len(DATA))
    assert full.value.hint == "Set TMPDIR to a folder with room for several files of 16.4 KB."
    blocks(bucket.put, "s3://b/p", 4096).discard()  # that one waits in memory


def test_no_room_in_the_middle_is_an_error_and_no_signal(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file system can reserve nothing."""
    monkeypatch.setattr(OsFileSystem, "allocate", failing(errno.EOPNOTSUPP))
    new = blocks(bucket.put, "s3://b/p", len(DATA))
    monkeypatch.setattr(OsFileSystem, "write", failing(errno.ENOSPC))
    with pytest.raises(StoreFull, match=f"written in {folder}"):
        new.write(0, memoryview(DATA))
    new.discard()
    assert bucket.objects == []


def test_a_folder_that_is_not_there_is_named(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "no"))
    with pytest.raises(StoreUnavailable, match=f"{folder}/no: No such file") as error:
        blocks(bucket.put, "s3://b/p", len(DATA))
    assert "TMPDIR" in error.value.hint


def test_packs_fit_in_one_request() -> None:
    """S3 takes 5 GiB in one PUT, Azure 5,000 MiB. A pack takes a chunk as long as the sum is
    below its limit, and its header comes on top."""
    assert 5000 * GiB // 1024 > PACK_BYTES + CHUNK_BYTES + MAX_HEADER_BYTES
