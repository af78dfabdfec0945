"""Runs a training script and kills its own process with SIGKILL at a chosen point.

    python child.py [--die POINT:N] [--count FILE] SCRIPT ARGS...

Points in the save and restore: capture, read (in place), barrier, pack, fsync, manifest, log,
retention, restore.
Points in the script: whatever it passes to `place(...)`. N counts from 1. The process
dies inside the call, as it would from outside: no handler, no `finally`, no flush.
`--count` writes how often each point was passed, for the driver to choose from.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import runpy
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAIN = os.getpid()  # loader workers are forked from it and pass no points


class Points:
    """Counts the points that were passed and dies at the chosen one."""

    def __init__(self, die: tuple[str, int] | None) -> None:
        self.die = die
        self.passed: Counter[str] = Counter()
        self._lock = threading.Lock()

    def at(self, point: str) -> None:
        if os.getpid() != MAIN:
            return
        with self._lock:
            self.passed[point] += 1
            if self.die == (point, self.passed[point]):
                os.kill(MAIN, signal.SIGKILL)
                threading.Event().wait()  # it is delivered at once; nothing runs on


points = Points(None)


def place(name: str) -> None:
    """Called by scripts at a place in their loop."""
    points.at(name)


def before(owner: Any, name: str, point: Callable[..., str | None]) -> None:
    """Pass a point before each call of `owner.name`."""
    whole = getattr(owner, name)

    def wrapped(*args: Any, **named: Any) -> Any:
        found = point(*args)
        if found:
            points.at(found)
        return whole(*args, **named)

    setattr(owner, name, wrapped)


def plant() -> None:
    from holdfast.manager import overlap, packer, snapshot, staging
    from holdfast.manager.overlap import Overlap
    from holdfast.manager.reader import ChunkReader
    from holdfast.stores.filesystem import OsFileSystem
    from holdfast.stores.filling import Blocks
    from holdfast.stores.local import LocalStore

    writing = threading.local()

    @contextmanager
    def doing(what: str | None) -> Iterator[None]:
        writing.what = what
        try:
            yield
        finally:
            writing.what = None

    def what() -> str | None:
        return getattr(writing, "what", None)

    put_new, delete = LocalStore.put_new, LocalStore.delete
    kinds = {"packs": "pack", "manifests": "manifest", "log": "log"}

    def put(self: LocalStore, key: str, parts: Any) -> bool:
        with doing(kinds.get(key.split("/")[0])):
            return put_new(self, key, parts)

    def remove(self: LocalStore, keys: Any) -> None:
        with doing("retention"):
            delete(self, keys)

    LocalStore.put_new, LocalStore.delete = put, remove  # type: ignore[method-assign]
    # Models in tests are small: they, too, are to be read in place, piece by piece, and their
    # packs to be written block by block.
    snapshot.SMALL_BYTES = packer.SMALL_BYTES = 256
    overlap._READ_BYTES = 512
    staging.BLOCK_BYTES = 16 * 1024
    before(Overlap, "_read_in_place", lambda *args: "read")
    before(Overlap, "_copy_rest", lambda *args: "barrier")
    write, publish = Blocks.write, Blocks.publish

    def write_block(self: Blocks, offset: int, data: memoryview) -> None:
        with doing("pack"):
            write(self, offset, data)

    def publish_blocks(self: Blocks, nbytes: int) -> bool:
        with doing("pack"):
            return publish(self, nbytes)

    Blocks.write, Blocks.publish = write_block, publish_blocks  # type: ignore[method-assign]
    for call in ("create", "write", "link", "unlink", "rename_new", "close"):
        before(OsFileSystem, call, lambda *args: what())
    before(OsFileSystem, "sync", lambda *args: "fsync" if what() else None)
    before(ChunkReader, "_read", lambda *args: "restore")

    plant_in_buckets(kinds)

    held = snapshot._held

    def holding(*args: Any) -> Iterator[Any]:
        for leaf in held(*args):
            points.at("capture")
            yield leaf

    snapshot._held = holding


def plant_in_buckets(kinds: dict[str, str]) -> None:
    """Before each request that writes, and when the server has acted and nobody knows yet."""
    from holdfast.stores.object import ObjectStore

    put, delete = ObjectStore._put, ObjectStore.delete

    def put_object(self: ObjectStore, key: str, *args: Any, **named: Any) -> Any:
        point = kinds.get(key.split("/")[0], "other")
        points.at(point)
        reply = put(self, key, *args, **named)
        points.at(point)
        return reply

    def remove(self: ObjectStore, keys: Any) -> None:
        points.at("retention")
        delete(self, keys)
        points.at("retention")

    ObjectStore._put, ObjectStore.delete = put_object, remove  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--die")
    parser.add_argument("--count")
    parser.add_argument("script")
    parser.add_argument("args", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    # Scripts import this module by its name: they must find this very one.
    sys.modules["tests.kill.child"] = sys.modules["__main__"]
    if options.die:
        point, _, number = options.die.rpartition(":")
        points.die = (point, int(number))
    if options.count:

        def write() -> None:
            if os.getpid() == MAIN:
                Path(options.count).write_text(json.dumps(points.passed))

        atexit.register(write)
    plant()
    sys.argv = [options.script, *options.args]
    runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main()
