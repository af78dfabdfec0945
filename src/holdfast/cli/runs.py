"""Finding the runs below a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from holdfast.metaflow.places import FOLDER
from holdfast.stores.object_address import SCHEMES

_DEPTH = 3
"""Folders between the one that was named and a run: `runs/2026/mnist/seed-1` is found."""
_METAFLOW_DEPTH = 5
"""Below its folder are those for flows, steps, tasks, runs and writers."""
_MOST_FOLDERS = 20_000
"""A slip like `holdfast ls /` answers all the same."""
RUN_INFO = "holdfast.json"


def find_runs(folder: str) -> list[str]:
    """Addresses of the runs in and below `folder` or a bucket's prefix, sorted; [] where there
    is none.

    Three levels deep, below a datastore of Metaflow's down to its tasks; follows no links and
    enters no run. What cannot be read in a folder is passed over; raises StoreError for a
    bucket that cannot be listed.
    """
    scheme, url, _ = folder.partition("://")
    if not url:
        return sorted(_walk(os.path.expanduser(folder), _look_at_folder, _levels(folder)))
    if scheme.lower() not in SCHEMES:
        return []
    from holdfast.stores.object import ObjectStore  # slow to import

    store = ObjectStore(folder)
    levels = _levels(folder.partition("?")[0])
    return sorted(store.below(path) for path in _walk("", store.look, levels))


def _is_run(names: set[str]) -> bool:
    """A run that lost its holdfast.json is one all the same, and `doctor` mends it."""
    return RUN_INFO in names or names >= {"log", "manifests", "packs"}


def _walk(
    top: str, look: Callable[[str], tuple[set[str], list[str]]], levels: int
) -> Iterator[str]:
    """`look` gives the names in a folder, and its folders; `levels` below it are looked at."""
    folders = [(top, levels)]
    # By index: the list grows while it is gone through.
    for seen, (folder, left) in enumerate(folders):
        if seen >= _MOST_FOLDERS:
            return
        names, below = look(folder)
        if _is_run(names):
            yield folder
        elif left:
            folders += [
                (name, _METAFLOW_DEPTH if name.rpartition("/")[2] == FOLDER else left - 1)
                for name in below
            ]


def _levels(folder: str) -> int:
    """How many levels below the folder that was named are looked at."""
    parts = folder.rstrip("/").split("/")
    if FOLDER not in parts:
        return _DEPTH
    return max(0, _METAFLOW_DEPTH - parts[::-1].index(FOLDER))


def _look_at_folder(folder: str) -> tuple[set[str], list[str]]:
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except OSError:
        return set(), []
    below = [
        os.path.join(folder, entry.name)
        for entry in entries
        if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
    ]
    return {entry.name for entry in entries}, below
