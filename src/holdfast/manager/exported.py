"""What an export wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FORMATS = ("safetensors", "pt", "dcp", "hf", "peft")


@dataclass(frozen=True)
class Exported:
    """What `export_as` wrote."""

    format: str
    """One of `FORMATS`."""
    target: Path
    """The file or folder that was named."""
    files: Sequence[Path]
    tensors: Sequence[str]
    """The names of the tensors in it."""
    left_out: Sequence[str] = ()
    """What the format has no form for, one line each: where it is in the state, and what."""

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.files)
