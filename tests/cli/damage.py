"""Damage to a run."""

from __future__ import annotations

from pathlib import Path

from holdfast.manager.listing import Listing


def newest_pack(run: Path) -> Path:
    """The pack that was written for the newest checkpoint. Not by its time: on some file
    systems two files in a row have the same."""
    with Listing(run) as listing:
        manifest = listing.manifest()
    [name] = [pack.name for pack in manifest.packs if pack.born == manifest.ordinal]
    return run / "packs" / f"{name}.safetensors"


def flip(path: Path, offset: int) -> None:
    """Change one bit of a stored file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
