"""Folders for what is loaded: new ones, and those that may have files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from holdfast.errors import UsageError
from holdfast.manager.scratch import own_folder


def new_folder(prefix: str, root: str | None) -> str:
    """A new folder in `root`, which is made if it is not there, or in the system's place."""
    # Absolute: the step may change its working directory.
    place = Path(root or tempfile.gettempdir()).absolute()
    place.mkdir(parents=True, exist_ok=True)
    # Attempts that were killed could not remove theirs, which may be as large as this.
    return str(own_folder(place, prefix, mode=0o700))


@contextmanager
def filled(into: Path) -> Iterator[Path]:
    """A path for a new folder; what it holds at the end moves into the folder `into`.

    Files of the same name are replaced, others stay, folders that both have become one. Until
    the end nothing is changed, and nothing at all if the body raises. Raises UsageError, with
    nothing changed, if a file would take the place of a folder.
    """
    # In `into`, for then it is on the same file system: it is moved, not copied.
    with tempfile.TemporaryDirectory(prefix=".holdfast-", dir=into) as beside:
        new = Path(beside, "new")
        yield new
        for clash in _clashes(new, into):
            raise UsageError(
                f"cannot load a file to {str(clash)!r}: a folder is there",
                hint="Remove it, or load into an empty folder.",
            )
        _move(new, into)


def _clashes(source: Path, target: Path) -> Iterator[Path]:
    for entry in source.iterdir():
        there = target / entry.name
        if not _is_folder(there):
            continue
        if _is_folder(entry):
            yield from _clashes(entry, there)
        else:
            yield there


def _move(source: Path, target: Path) -> None:
    for entry in list(source.iterdir()):
        there = target / entry.name
        if _is_folder(entry) and _is_folder(there):
            _move(entry, there)
            continue
        if _is_folder(entry):
            there.unlink(missing_ok=True)
        os.replace(entry, there)


def _is_folder(path: Path) -> bool:
    # A link to one is a file here: nothing is written through it.
    return path.is_dir() and not path.is_symlink()
