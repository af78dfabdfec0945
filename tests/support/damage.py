"""Bytes of a run in a folder that turn out to be others."""

from __future__ import annotations

from pathlib import Path

import holdfast


def damage_newest(folder: Path) -> None:
    """Flip a bit in the newest pack of the newest checkpoint."""
    with holdfast.CheckpointManager(folder) as manager:
        newest = manager.manifest()
    pack = folder / "packs" / f"{newest.packs[-1].name}.safetensors"
    data = bytearray(pack.read_bytes())
    data[-20] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
