"""Finding the runs below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

_DEPTH = 3
"""Folders between the one that was named and a run: `runs/2026/mnist/seed-1` is found."""
_MOST_FOLDERS = 20_000
"""A slip like `holdfast ls /` answers all the same."""
RUN_INFO = "holdfast.json"


def find_runs(folder: str) -> list[str]:
    """Addresses of the runs in and below `folder`, sorted; [] where there is none.

    Looks at folders only, three levels deep, follows no links and enters no run. What
    cannot be read is passed over.
    """
    if "://" in folder:
        return []
    return sorted(_walk(folder))


def _is_run(names: set[str]) -> bool:
    """A run that lost its holdfast.json is one all the same, and `doctor` mends it."""
    return RUN_INFO in names or names >= {"log", "manifests", "packs"}


def _walk(top: str) -> Iterator[str]:
    folders = [(os.path.expanduser(top), 0)]
    # By index: the list grows while it is gone through.
    for seen, (folder, depth) in enumerate(folders):
        if seen >= _MOST_FOLDERS:
            return
        try:
            with os.scandir(folder) as found:
                entries = list(found)
        except OSError:
            continue
        if _is_run({entry.name for entry in entries}):
            yield folder
        elif depth < _DEPTH:
            folders += [
                (os.path.join(folder, entry.name), depth + 1)
                for entry in entries
                if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
            ]
