"""Files that appear at their place whole: written beside it, synced, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from holdfast.core.address import printable
from holdfast.core.process import current, is_alive
from holdfast.errors import UsageError
from holdfast.stores.unfinished import owner_of, temporary_name

_PREFIX = ".holdfast-export-"
_T = TypeVar("_T")


def check_target(target: Path, *, replace: bool) -> None:
    """Raise UsageError unless `target` is new, an empty folder, or may be written into."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise UsageError(f"{_words(target)} is not a folder", hint="Name a new folder.")
    if not replace and any(target.iterdir()):
        raise UsageError(
            f"{_words(target)} is not empty",
            hint="Name a new folder, or replace what has the same name "
            "(replace=True; --force on the command line).",
        )


def write_whole(target: Path, fill: Callable[[Path], _T]) -> _T:
    """Let `fill` write a folder, then make it `target`; what `fill` returned.

    A new or empty `target` appears in one rename. Into one that has files already, or
    that cannot be renamed over (a mount point, the current folder), the new ones are moved
    one by one, each of them whole. Nothing is left behind when `fill` raises. `fill` syncs
    its files.
    """
    target = Path(os.path.realpath(target))
    inside = target.is_dir() and not _can_be_renamed_over(target)
    with _scratch(target if inside else target.parent) as scratch:
        source = scratch / "new"
        source.mkdir()
        result = fill(source)
        _sync_folder(source)
        if inside:
            _move_files(source, target)
        else:
            if target.is_dir():
                shutil.copymode(target, source)  # somebody may have closed it to others
            os.rename(source, target)
            _sync_folder(target.parent)
    return result


def write_file(target: Path, fill: Callable[[Path], None], *, replace: bool) -> None:
    """Let `fill` write and sync a file, which then appears as `target`, whole.

    Raises UsageError if something is there, unless it is a file and `replace` is true.
    Nothing is left behind when `fill` raises.
    """
    if os.path.lexists(target) and not target.is_file():
        raise UsageError(f"{_words(target)} is not a file", hint="Name a new file.")
    if os.path.lexists(target) and not replace:
        raise UsageError(
            f"{_words(target)} exists",
            hint="Name a new file, or replace it (replace=True; --force on the command line).",
        )
    target = Path(os.path.realpath(target))
    with _scratch(target.parent) as scratch:
        fill(scratch / "new")
        if replace:
            os.replace(scratch / "new", target)
        else:
            try:
                os.link(scratch / "new", target)  # never replaces what came meanwhile
            except FileExistsError as error:
                raise UsageError(f"{_words(target)} exists", hint="Name a new file.") from error
            except OSError:  # no hard links here
                os.rename(scratch / "new", target)
        _sync_folder(target.parent)


def _words(path: Path) -> str:
    return printable(str(path))  # an error may have several lines; a name must not add one


def _can_be_renamed_over(folder: Path) -> bool:
    return (
        not any(folder.iterdir())
        and not os.path.ismount(folder)
        # A shell that stands in it would be left in a folder without a name.
        and not os.path.samefile(folder, os.curdir)
        and os.access(folder.parent, os.W_OK | os.X_OK)
    )


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A new folder in `folder`; removed again, as are parents that were made for it."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    scratch = own_folder(folder, _PREFIX)
    try:
        yield scratch
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # somebody else has put something there
                parent.rmdir()
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def own_folder(parent: Path, prefix: str, *, mode: int = 0o777) -> Path:
    """A new folder in `parent` whose name says that it is this process's. Those of `prefix` that
    processes left which died on this machine are removed."""
    me = current()
    for entry in parent.glob(f"{prefix}*"):
        owner = owner_of(entry.name.removeprefix(prefix), me)
        if owner is not None and is_alive(owner) is False:
            shutil.rmtree(entry, ignore_errors=True)
    folder = parent / f"{prefix}{temporary_name(me)}"
    folder.mkdir(mode)
    return folder


def _move_files(source: Path, target: Path) -> None:
    """Move the files below `source` to the same places below `target`.

    Replaces files, never a folder, and follows no link out of `target`. Raises
    UsageError, before anything was moved, if something is in the way.
    """
    files = sorted(path for path in source.rglob("*") if path.is_symlink() or path.is_file())
    places = [target / path.relative_to(source) for path in files]
    for place in places:
        folders = [p for p in place.parents if target in p.parents]
        blocked = [p for p in folders if p.is_symlink() or (p.exists() and not p.is_dir())]
        if place.is_dir() and not place.is_symlink():
            blocked.append(place)
        if blocked:
            raise UsageError(
                f"{_words(blocked[0])} is in the way", hint="Move it, or name another folder."
            )
    for path, place in zip(files, places, strict=True):
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    for folder in {parent for place in places for parent in place.parents}:
        if folder == target or target in folder.parents:
            _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
