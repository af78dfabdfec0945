"""Checkpoints of one run: save, restore, retention, verification, export."""

from __future__ import annotations

from holdfast.manager.catalog import open_checkpoint as open
from holdfast.manager.info import CheckpointInfo as CheckpointInfo
from holdfast.manager.info import Restored as Restored
from holdfast.manager.info import Verification as Verification
from holdfast.manager.loaded import LoadedCheckpoint as LoadedCheckpoint
from holdfast.manager.manager import CheckpointManager as CheckpointManager
from holdfast.manager.pending import Pending as Pending

__all__ = [
    "CheckpointInfo",
    "CheckpointManager",
    "LoadedCheckpoint",
    "Pending",
    "Restored",
    "Verification",
    "open",
]
