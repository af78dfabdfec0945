"""What every store and every wrapper around one must do. Inherit and give a `store`.

class TestMyStore(StoreContract):
    @pytest.fixture
    def store(self): return MyStore()
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from holdfast.errors import DamagedObject, ObjectNotFound
from holdfast.stores.base import BLOCK_ALIGNMENT, BadKey, Store

THREADS = 8
ANY = 1 << 30

UNSAFE = [
    "",
    "/",
    "/etc/passwd",
    "..",
    "../x",
    "a/../b",
    "a/..",
    "./a",
    "a//b",
    "a/",
    ".hidden",
    "a/.hidden",
    "a\\b",
    "a\0b",
    "a\nb",
    "a b",
    "a:b",
    "ü",
    "-option",
    "a/*",
    "x" * 256,
    "/".join(["x" * 200] * 6),
]

segments = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True)
keys = st.lists(segments, min_size=1, max_size=4).map("/".join)

# The store of a test is used for all examples (each under keys of its own), and one test
# runs in many classes: both are meant.
shared = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    max_examples=25,
    deadline=None,
)

_numbers = itertools.count()


def fresh() -> str:
    """A folder that no other example uses."""
    return f"example{next(_numbers)}"


def listed(store: Store, prefix: str = "") -> dict[str, int]:
    found = list(store.list(prefix))
    assert len({info.key for info in found}) == len(found), "a key is listed twice"
    return {info.key: info.size_bytes for info in found}


class StoreContract:
    @pytest.fixture
    def store(self) -> Iterator[Store]:
        raise NotImplementedError("a subclass gives the store")

    def reopen(self, store: Store) -> Store:
        """What another process would open; the same store where there is no such thing."""
        return store

    def test_it_is_a_store(self, store: Store) -> None:
        assert isinstance(store, Store)
        assert store.address

    # -- put_new -----------------------------------------------------------------------

    def test_parts_are_joined(self, store: Store) -> None:
        parts = [b"ab", bytearray(b"cd"), memoryview(b"ef"), b"", memoryview(b"ghij").cast("I")]
        assert store.put_new("packs/a", parts) is True
        assert store.get("packs/a", max_bytes=ANY) == b"abcdefghij"
        assert self.reopen(store).get("packs/a", max_bytes=ANY) == b"abcdefghij"

    def test_shaped_buffers_are_their_bytes(self, store: Store) -> None:
        matrix = memoryview(bytes(range(12))).cast("B", (3, 4))
        assert store.put_new("a", [matrix, matrix])
        assert store.get("a", max_bytes=ANY) == bytes(range(12)) * 2

    @pytest.mark.parametrize("parts", [[], [b""], [b"", bytearray()]])
    def test_empty_objects_exist(self, store: Store, parts: list[bytes]) -> None:
        assert store.put_new("log/1", parts)
        assert store.get("log/1", max_bytes=0) == b""
        assert store.size("log/1") == 0
        assert listed(store) == {"log/1": 0}
        assert not store.put_new("log/1", [b"x"])

    def test_the_first_stays(self, store: Store) -> None:
        assert store.put_new("log/1", [b"first"])
        assert store.put_new("log/1", [b"second, longer"]) is False
        assert store.put_new("log/1", [b"first"]) is False
        assert store.get("log/1", max_bytes=ANY) == b"first"

    def test_one_object_put_twice_is_created_once(self, store: Store) -> None:
        data = b"the very same bytes object"
        assert store.put_new("a", [data]) is True
        assert store.put_new("a", [data]) is False

    def test_it_does_not_keep_the_parts(self, store: Store) -> None:
        part = bytearray(b"before")
        assert store.put_new("a", [part])
        part[:] = b"after!"
        part.extend(b"a view that is still held would make this a BufferError")
        assert store.get("a", max_bytes=ANY) == b"before"

    def test_big_objects(self, store: Store) -> None:
        block = bytes(range(251)) * 4178  # no multiple of anything
        parts = [block] * 9 + [b"end"]
        assert store.put_new("packs/big", parts)
        assert store.get("packs/big", max_bytes=ANY) == b"".join(parts)
        into = bytearray(1000)
        store.read_into("packs/big", len(block) * 5 - 500, memoryview(into))
        assert into == (block * 2)[len(block) - 500 : len(block) + 500]

    def test_many_small_parts(self, store: Store) -> None:
        parts = [str(n).encode() for n in range(3000)]
        assert store.put_new("packs/small", parts)
        assert store.get("packs/small", max_bytes=ANY) == b"".join(parts)

    def test_of_many_writers_one_wins(self, store: Store) -> None:
        for attempt in range(5):
            gate = threading.Barrier(THREADS)

            def write(n: int, key: str = f"log/{attempt}", gate=gate) -> bool:
                gate.wait()
                return store.put_new(key, [b"writer %d " % n, b"x" * 5000])

            with ThreadPoolExecutor(THREADS) as pool:
                results = list(pool.map(write, range(THREADS)))
            assert sorted(results) == [False] * (THREADS - 1) + [True]
            winner = results.index(True)
            content = store.get(f"log/{attempt}", max_bytes=ANY)
            assert content == b"writer %d " % winner + b"x" * 5000

    def test_many_writers_of_many_keys(self, store: Store) -> None:
        def write(n: int) -> bool:
            return store.put_new(f"new/folders/{n % 7}/{n}", [b"%d" % n])

        with ThreadPoolExecutor(THREADS) as pool:
            assert all(pool.map(write, range(100)))
        assert listed(store, "new/") == {
            f"new/folders/{n % 7}/{n}": len(str(n)) for n in range(100)
        }

    # -- create ------------------------------------------------------------------------

    def test_an_object_in_blocks_appears_when_it_is_published(self, store: Store) -> None:
        data = bytes(range(256)) * 64 + b"and a tail"  # four blocks and a bit
        made = store.create("packs/a", at_most_bytes=1 << 20)
        starts = [*range(0, len(data), BLOCK_ALIGNMENT)]
        for at in reversed(starts):
            made.write(at, memoryview(data)[at : at + BLOCK_ALIGNMENT])
        with pytest.raises(ObjectNotFound):
            store.size("packs/a")
        assert listed(store) == {}
        assert made.publish(len(data)) is True
        made.discard()
        made.discard()
        assert store.get("packs/a", max_bytes=ANY) == data
        assert listed(store) == {"packs/a": len(data)}
        assert self.reopen(store).get("packs/a", max_bytes=ANY) == data

    def test_many_threads_write_the_blocks_of_one_object(self, store: Store) -> None:
        size = 64 * 1024
        data = bytearray(size * 20 + 5)
        for at in range(0, len(data), size):
            data[at : at + size] = bytes([at // size]) * min(size, len(data) - at)
        made = store.create("a", at_most_bytes=len(data))
        with ThreadPoolExecutor(THREADS) as pool:
            list(
                pool.map(
                    lambda at: made.write(at, memoryview(data)[at : at + size]),
                    range(0, len(data), size),
                )
            )
        assert made.publish(len(data))
        made.discard()
        assert store.get("a", max_bytes=ANY) == data

    def test_what_is_written_behind_the_end_is_cut_off(self, store: Store) -> None:
        made = store.create("a", at_most_bytes=1 << 16)
        made.write(0, memoryview(b"x" * BLOCK_ALIGNMENT))
        assert made.publish(10)
        made.discard()
        assert store.get("a", max_bytes=ANY) == b"x" * 10

    def test_a_published_object_replaces_nothing(self, store: Store) -> None:
        store.put_new("a", [b"first"])
        made = store.create("a", at_most_bytes=10)
        made.write(0, memoryview(b"second"))
        assert made.publish(6) is False
        made.discard()
        assert store.get("a", max_bytes=ANY) == b"first"

    def test_of_many_objects_in_blocks_one_wins(self, store: Store) -> None:
        def write(n: int) -> bool:
            made = store.create("a", at_most_bytes=9)
            try:
                made.write(0, memoryview(b"writer %d " % n))
                return made.publish(9)
            finally:
                made.discard()

        with ThreadPoolExecutor(THREADS) as pool:
            wins = list(pool.map(write, range(THREADS)))
        assert wins.count(True) == 1
        assert store.get("a", max_bytes=ANY) == b"writer %d " % wins.index(True)

    def test_a_discarded_object_leaves_nothing(self, store: Store) -> None:
        made = store.create("a", at_most_bytes=10)
        made.write(0, memoryview(b"12345"))
        made.discard()
        assert listed(store) == {}
        assert store.put_new("a", [b"x"])
        assert store.remove_debris() == 0

    def test_it_does_not_keep_a_block(self, store: Store) -> None:
        block = bytearray(b"before")
        made = store.create("a", at_most_bytes=6)
        made.write(0, memoryview(block))
        block[:] = b"after."
        assert made.publish(6)
        made.discard()
        assert store.get("a", max_bytes=ANY) == b"before"

    # -- append ------------------------------------------------------------------------

    def test_append(self, store: Store) -> None:
        for n in range(3):
            store.append("events/1", b"line %d\n" % n)
        store.append("events/1", b"")
        assert store.get("events/1", max_bytes=ANY) == b"line 0\nline 1\nline 2\n"
        assert listed(store, "events/") == {"events/1": 21}
        store.settle("events/1")
        again = self.reopen(store)
        again.append("events/1", memoryview(b"more"))
        assert again.get("events/1", max_bytes=ANY).endswith(b"line 2\nmore")

    # -- reading -----------------------------------------------------------------------

    def test_max_bytes(self, store: Store) -> None:
        store.put_new("a", [b"12345"])
        assert store.get("a", max_bytes=5) == b"12345"
        with pytest.raises(DamagedObject, match="a"):
            store.get("a", max_bytes=4)

    def test_absent(self, store: Store) -> None:
        for _ in range(2):  # an empty store, then one that has its folder
            with pytest.raises(ObjectNotFound):
                store.get("log/1", max_bytes=ANY)
            with pytest.raises(ObjectNotFound):
                store.size("log/1")
            with pytest.raises(ObjectNotFound):
                store.read_into("log/1", 0, memoryview(bytearray(1)))
            with pytest.raises(ObjectNotFound):
                store.settle("log/1")
            assert listed(store, "absent/") == {}
            store.put_new("log/other", [b"x"])
            with pytest.raises(ObjectNotFound):
                store.get("log", max_bytes=ANY)

    def test_below_an_object_there_is_nothing(self, store: Store) -> None:
        store.put_new("a", [b"x"])
        with pytest.raises(ObjectNotFound):
            store.get("a/b", max_bytes=ANY)
        assert listed(store, "a/") == {}
        store.delete(["a/b"])
        assert listed(store) == {"a": 1}

    @shared
    @given(data=st.binary(max_size=300), offset=st.integers(0, 320), length=st.integers(0, 320))
    @example(data=b"1", offset=1, length=1)  # of a server that answers with something
    @example(data=b"", offset=0, length=1)
    def test_ranges(self, store: Store, data: bytes, offset: int, length: int) -> None:
        key = f"{fresh()}/a"
        store.put_new(key, [data])
        into = bytearray(b"\xee" * (length + 2))
        view = memoryview(into)[1 : 1 + length]
        if offset + length <= len(data):
            store.read_into(key, offset, view)
            assert into == b"\xee" + data[offset : offset + length] + b"\xee"
        else:
            with pytest.raises(DamagedObject):
                store.read_into(key, offset, view)

    @pytest.mark.parametrize("offset", [-1, -(1 << 70), 6, 1 << 70])
    def test_offsets_that_cannot_be(self, store: Store, offset: int) -> None:
        store.put_new("a", [b"12345"])
        with pytest.raises(DamagedObject):
            store.read_into("a", offset, memoryview(bytearray(1)))
        with pytest.raises(DamagedObject):
            store.read_into("a", offset, memoryview(bytearray()))

    def test_reading_into_wider_items(self, store: Store) -> None:
        store.put_new("a", [bytes(range(16))])
        into = memoryview(bytearray(8)).cast("I")
        store.read_into("a", 4, into)
        assert into.tobytes() == bytes(range(4, 12))

    def test_size(self, store: Store) -> None:
        store.put_new("a", [b"123", b"45"])
        assert store.size("a") == 5

    # -- listing -----------------------------------------------------------------------

    def test_list(self, store: Store) -> None:
        objects = {"a": 1, "b/a": 2, "b/c/d": 3, "b/c/e": 4, "bb/a": 5, "b.c": 6}
        for key, size in objects.items():
            store.put_new(key, [b"x" * size])
        for prefix in ["", "b/", "b/c/", "bb/", "c/", "b/c/d/"]:
            expected = {key: size for key, size in objects.items() if key.startswith(prefix)}
            assert listed(store, prefix) == expected
        assert listed(self.reopen(store)) == objects

    def test_listing_what_sorts_behind_a_key(self, store: Store) -> None:
        for key in ["log/1", "log/10", "log/2", "log/9", "logs/5", "a"]:
            store.put_new(key, [b"x"])

        def behind(prefix: str, after: str) -> list[str]:
            return sorted(info.key for info in store.list(prefix, after=after))

        assert behind("log/", "log/10") == ["log/2", "log/9"]
        assert behind("log/", "log/15") == ["log/2", "log/9"]
        assert behind("log/", "log/9") == []
        assert behind("", "log/2") == ["log/9", "logs/5"]
        assert behind("log/", "a") == ["log/1", "log/10", "log/2", "log/9"]

    @pytest.mark.parametrize("prefix", ["a", "/", "../", "a//", "a/../", "./", ".hidden/"])
    def test_bad_prefixes(self, store: Store, prefix: str) -> None:
        with pytest.raises(BadKey):
            store.list(prefix)

    def test_deleting_while_listing(self, store: Store) -> None:
        for n in range(20):
            store.put_new(f"packs/{n}", [b"x"])
        seen = []
        for info in store.list("packs/"):
            seen.append(info.key)
            store.delete([info.key])
        assert sorted(seen) == sorted(f"packs/{n}" for n in range(20))
        assert listed(store) == {}

    # -- the rest ------------------------------------------------------------------------

    def test_delete(self, store: Store) -> None:
        for key in ["a", "b/a", "b/b", "c"]:
            store.put_new(key, [b"x"])
        store.delete(key for key in ["a", "absent", "absent/too", "b/a"])
        assert set(listed(store)) == {"b/b", "c"}
        store.delete([])
        store.delete(["b"])  # not an object
        assert set(listed(store)) == {"b/b", "c"}
        assert store.put_new("a", [b"again"]) is True
        assert store.get("a", max_bytes=ANY) == b"again"

    def test_an_unsafe_key_stops_delete_before_it_removes(self, store: Store) -> None:
        store.put_new("a", [b"x"])
        with pytest.raises(BadKey):
            store.delete(["a", "../b"])
        assert listed(store) == {"a": 1}

    def test_settle(self, store: Store) -> None:
        store.put_new("log/1", [b"x"])
        store.settle("log/1")
        self.reopen(store).settle("log/1")
        assert store.get("log/1", max_bytes=ANY) == b"x"

    def test_preparing_leaves_nothing(self, store: Store) -> None:
        store.prepare_writing()
        assert listed(store) == {}
        store.put_new("a", [b"x"])
        store.prepare_writing()
        self.reopen(store).prepare_writing()
        assert listed(store) == {"a": 1}

    def test_no_debris(self, store: Store) -> None:
        assert store.remove_debris() == 0
        store.put_new("a", [b"x"])
        assert store.remove_debris() == 0
        assert listed(store) == {"a": 1}

    @pytest.mark.parametrize("key", UNSAFE)
    def test_unsafe_keys(self, store: Store, key: str) -> None:
        calls: list[Callable[[], object]] = [
            lambda: store.put_new(key, [b"x"]),
            lambda: store.create(key, at_most_bytes=1),
            lambda: store.append(key, b"x"),
            lambda: store.get(key, max_bytes=ANY),
            lambda: store.read_into(key, 0, memoryview(bytearray(1))),
            lambda: store.size(key),
            lambda: store.delete([key]),
            lambda: store.settle(key),
        ]
        for call in calls:
            with pytest.raises(BadKey):
                call()
        assert listed(store) == {}

    @shared
    @given(
        script=st.lists(
            st.tuples(
                st.sampled_from(["put", "put", "put", "get", "delete", "size", "list", "settle"]),
                st.sampled_from(["a", "b", "c/a", "c/b", "c/d/e"]),
                st.binary(max_size=40),
            ),
            max_size=30,
        )
    )
    def test_it_behaves_like_a_dict(self, store: Store, script: list[tuple[str, str, bytes]]):
        folder = fresh()
        model: dict[str, bytes] = {}
        for operation, name, data in script:
            key = f"{folder}/{name}"
            match operation:
                case "put":
                    assert store.put_new(key, [data]) == (key not in model)
                    model.setdefault(key, data)
                case "delete":
                    store.delete([key])
                    model.pop(key, None)
                case "list":
                    expected = {key: len(data) for key, data in model.items()}
                    assert listed(store, f"{folder}/") == expected
                case _ if key not in model:
                    with pytest.raises(ObjectNotFound):
                        store.get(key, max_bytes=ANY)
                case "get":
                    assert store.get(key, max_bytes=ANY) == model[key]
                case "size":
                    assert store.size(key) == len(model[key])
                case _:
                    store.settle(key)
        store.delete(model)

    @shared
    @given(names=st.lists(keys, max_size=6, unique=True))
    def test_any_safe_key(self, store: Store, names: list[str]) -> None:
        folders = {name[:at] for name in names for at, c in enumerate(name) if c == "/"}
        if len({name.lower() for name in [*names, *folders]}) < len({*names, *folders}) or (
            folders & {*names}
        ):
            return  # one would be the folder of another
        folder = fresh()
        for name in names:
            assert store.put_new(f"{folder}/{name}", [name.encode()])
        assert listed(store, f"{folder}/") == {f"{folder}/{name}": len(name) for name in names}
        for name in names:
            assert store.get(f"{folder}/{name}", max_bytes=ANY) == name.encode()
