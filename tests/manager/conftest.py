"""Fixtures of the tests of the manager."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from holdfast.manager import packer, snapshot, staging
from tests.support.compression import BLOCK


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 8 KiB and packs of two of them; no thread of a save is left behind."""
    monkeypatch.setattr(staging, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(packer, "OWN_PACK_BYTES", 2 * BLOCK)
    monkeypatch.setattr(snapshot, "SMALL_BYTES", BLOCK // 2)
    yield
    assert not [t for t in threading.enumerate() if t.name == "holdfast-write"], "a thread is left"
