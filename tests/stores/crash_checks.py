"""What a local store must survive, as checks that raise `Violation`.

Each check takes `make`, which opens the store on a file system as a new process
would, and plays one story at every call of the store. `test_crash` runs them on
`LocalStore`, `test_protocol_bugs` on stores that are wrong on purpose.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from holdfast.errors import ObjectNotFound, StoreError, StoreUnavailable
from holdfast.stores.base import Store
from holdfast.stores.faulty import Died
from holdfast.stores.filesystem import FileSystem
from holdfast.stores.local import LocalStore
from tests.support.crashfs import BLOCK_BYTES, CrashFileSystem
from tests.support.exhaustive import EXHAUSTIVE

ROOT = "/data/runs/x"
OLD_KEY, OLD = "log/000001", b"the entry before"
KEY, OTHER_KEY = "packs/a", "manifests/b"
DATA = bytes(n % 251 for n in range(2 * BLOCK_BYTES + 77))  # three blocks, the last one short
RIVAL = b"what another process wrote"
STATES = 300
"""Disks looked at per moment; a moment with fewer is looked at completely."""

Make = Callable[[FileSystem], Store]


class Violation(AssertionError):
    """The store broke its word."""


def read(store: Store, key: str) -> bytes | None:
    try:
        return store.get(key, max_bytes=1 << 20)
    except ObjectNotFound:
        return None


def disks(fs: CrashFileSystem, limit: int = STATES) -> Iterator[CrashFileSystem]:
    """The disk as it is (only the process died), then what a loss of power may leave."""
    yield fs
    yield from fs.crash_states(limit)


def must_be(fs: CrashFileSystem, key: str, allowed: set[bytes | None], when: str) -> None:
    """On every disk that can be left now, `key` reads as one of `allowed`.

    Read by a plain LocalStore: what counts is what is on the disk.
    """
    for disk in fs.crash_states(STATES):
        found = read(LocalStore(ROOT, disk), key)
        if found not in allowed:
            shown = "absent" if found is None else f"{len(found)} bytes {found[:20]!r}"
            raise Violation(f"{key} is {shown} after a loss of power {when}")


def count_calls(run: Callable[[CrashFileSystem], object], fs: CrashFileSystem) -> int:
    before = fs.calls
    run(fs)
    return fs.calls - before


@contextmanager
def looking(fs: CrashFileSystem, look: Callable[[int, str], None]):
    """Call `look` before each call on `fs`; what `look` itself calls is not looked at."""

    def before(number: int, name: str) -> None:
        fs.before = None
        calls, history = fs.calls, len(fs.history)
        look(number, name)
        fs.calls = calls
        del fs.history[history:]
        fs.before = before

    fs.before = before
    try:
        yield
    finally:
        fs.before = None


def machine(make: Make, **options: int) -> CrashFileSystem:
    """A disk that holds the durable object OLD, on which KEY will be written."""
    fs = CrashFileSystem(**options)  # type: ignore[arg-type]
    fs.make_folder("/data")
    if not make(fs).put_new(OLD_KEY, [OLD]):
        raise Violation("the first object was not created")
    return fs


# -- stories -----------------------------------------------------------------------------


def power_fails_while_writing(make: Make) -> None:
    """Absent or whole before every call of put_new; whole once it returned True."""
    for fs, key, data in [
        (CrashFileSystem(), OLD_KEY, OLD),
        (machine(make), KEY, DATA),
        (machine(make), KEY, b""),
        (machine(make, max_write_bytes=1000), KEY, DATA),
    ]:

        def look(number: int, name: str, fs=fs, key=key, data=data) -> None:
            must_be(fs, key, {None, data}, f"before call {number}, {name}")
            if key != OLD_KEY:
                must_be(fs, OLD_KEY, {OLD}, f"before call {number}, {name}")

        store = make(fs)
        with looking(fs, look):
            created = store.put_new(key, [data[:100], data[100:]])
        if not created:
            raise Violation("an absent object was not created")
        must_be(fs, key, {data}, "after True")
        # The second object goes into folders that are known by now.
        if not store.put_new(OTHER_KEY, [data]) or not store.put_new("packs/c", [data]):
            raise Violation("an absent object was not created")
        must_be(fs, "packs/c", {data}, "after a second True")
        must_be(fs, OTHER_KEY, {data}, "after a second True")


def process_dies_while_writing(make: Make) -> None:
    """Whatever a dead process left, the next one makes durable what it acknowledges."""
    for begin in (CrashFileSystem, lambda: machine(make)):
        length = count_calls(lambda fs: make(fs).put_new(KEY, [DATA]), begin())
        for stop in range(1, length + 1):
            for next_step in ("put", "put elsewhere", "settle"):
                fs = begin()
                fs.stop_at = fs.calls + stop
                with suppress(Died):
                    make(fs).put_new(KEY, [DATA])
                    if stop < length:
                        raise Violation(f"call {stop} of {length} was not made")
                fs.restart()
                when = f"after {next_step} by a process that follows one dead at call {stop}"
                store = make(fs)
                if read(store, KEY) not in (None, DATA):
                    raise Violation(f"{KEY} is in part there: {when}")
                if next_step == "settle":
                    try:
                        store.settle(KEY)
                    except ObjectNotFound:
                        continue
                elif next_step == "put elsewhere":
                    if not store.put_new(OTHER_KEY, [RIVAL]):
                        raise Violation("an absent object was not created")
                    must_be(fs, OTHER_KEY, {RIVAL}, when)
                    must_be(fs, KEY, {None, DATA}, when)
                    continue
                elif not store.put_new(KEY, [DATA]):
                    store.settle(KEY)  # as a commit does that finds its own
                must_be(fs, KEY, {DATA}, when)


def calls_fail_while_writing(make: Make) -> None:
    """A call that fails never makes True a lie, and a second try works."""
    codes = (errno.EIO, errno.ENOSPC)
    for begin in (CrashFileSystem, lambda: machine(make)):
        length = count_calls(lambda fs: make(fs).put_new(KEY, [DATA]), begin())
        for at in range(1, length + 1):
            for has_effect in (False, True):
                # One of the codes each, the other way round at the next call.
                for code in codes if EXHAUSTIVE else [codes[(at + has_effect) % 2]]:
                    fs = begin()
                    start = fs.calls
                    failing = {start + at: code}
                    fs.fail_after, fs.fail_at = (failing, {}) if has_effect else ({}, failing)
                    store = make(fs)
                    try:
                        created = store.put_new(KEY, [DATA])
                    except StoreUnavailable:
                        created = None
                    except ObjectNotFound:
                        raise Violation("put_new raised ObjectNotFound") from None
                    failed = fs.history[start + at - 1]
                    when = f"after error {code} at call {at}, {failed} (effect: {has_effect})"
                    if created is False:
                        raise Violation(f"taken for another's object {when}")
                    must_be(fs, KEY, {DATA} if created else {None, DATA}, when)
                    if created is None and not store.put_new(KEY, [DATA]):
                        store.settle(KEY)
                    must_be(fs, KEY, {DATA}, f"{when} and a second try")


def errors_leave_nothing(make: Make) -> None:
    """A write that failed leaves no temporary, no descriptor and nothing visible."""
    length = count_calls(lambda fs: make(fs).put_new(KEY, [DATA]), machine(make))
    for at in range(1, length + 1):
        fs = machine(make)
        start = fs.calls
        fs.fail_at = {start + at: errno.ENOSPC}
        with suppress(StoreError):
            make(fs).put_new(KEY, [DATA])
        failed = fs.history[start + at - 1]
        left = [path for path in fs.files() if "/tmp/" in path and not path.endswith("/")]
        if left and fs.history[start + at - 1] != "unlink":
            raise Violation(f"error at call {at} ({failed}) left {left}")
        if fs.open_descriptors:
            raise Violation(f"error at call {at} left {fs.open_descriptors} open descriptors")


def two_writers_race(make: Make) -> None:
    """Another process creates the object before any call of ours: the first one stays."""
    length = count_calls(lambda fs: make(fs).put_new(KEY, [DATA]), machine(make))
    for at in range(1, length + 1):
        fs = machine(make)
        start = fs.calls
        rival: list[bool] = []

        def look(number: int, name: str, fs=fs, at=start + at, rival=rival) -> None:
            if number == at:
                rival.append(LocalStore(ROOT, fs).put_new(KEY, [RIVAL]))

        with looking(fs, look):
            created = make(fs).put_new(KEY, [DATA])
        if [created, *rival].count(True) != 1:
            raise Violation(f"{[created, *rival].count(True)} writers created one object")
        must_be(fs, KEY, {DATA if created else RIVAL}, f"after a race at call {at}")


def settling(make: Make) -> None:
    """What is visible, whoever wrote it and however, is durable once it is settled."""
    fs = machine(make)
    # As a copy made by hand: nothing is synced.
    data = fs.open_folder("/data")
    for name in ("runs", "x", "packs"):
        with suppress(FileExistsError):
            fs.make_folder(name, data)
        data = fs.open_folder(name, data)
    fd = fs.create("a", data)
    fs.write(fd, [memoryview(DATA)], 0)
    make(fs).settle(KEY)
    must_be(fs, KEY, {DATA}, "after settle")


STORIES: list[Callable[[Make], None]] = [
    power_fails_while_writing,
    process_dies_while_writing,
    calls_fail_while_writing,
    errors_leave_nothing,
    two_writers_race,
    settling,
]
