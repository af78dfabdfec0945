"""A store in this process's memory: for tests, notebooks and dry runs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence

from holdfast.core.types import Buffer
from holdfast.errors import DamagedObject, ObjectNotFound
from holdfast.stores.base import NewObject, ObjectInfo, check_key, check_prefix


class MemoryStore:
    """Objects in a dict; gone with the process.

    `MemoryStore()` is its own; `MemoryStore.named("a/b")` is what `memory://a/b`
    opens: everyone who opens it in this process sees the same objects, and
    `memory://a` sees them under `b/`.
    """

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._prefix = ""
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @classmethod
    def named(cls, name: str) -> MemoryStore:
        """The store that this process shares under `name`."""
        first, _, rest = check_key(name).partition("/")
        with _named_lock:
            shared = _named.setdefault(first, cls(first))
        store = cls(name)
        store._prefix = f"{rest}/" if rest else ""
        store._objects = shared._objects
        store._lock = shared._lock
        return store

    def __repr__(self) -> str:
        return f"MemoryStore({self._name!r})"

    @property
    def address(self) -> str:
        return f"memory://{self._name}"

    @property
    def whole_bytes(self) -> int:
        return 0

    @property
    def parallel(self) -> int:
        return 4

    def put_new(self, key: str, parts: Sequence[Buffer]) -> bool:
        full = self._full(key)
        data = b"".join(parts)
        with self._lock:
            if full in self._objects:
                return False
            self._objects[full] = data
            return True

    def create(self, key: str, *, at_most_bytes: int) -> NewObject:
        return _Blocks(self, check_key(key))

    def append(self, key: str, data: Buffer) -> None:
        full = self._full(key)
        with self._lock:
            self._objects[full] = b"".join((self._objects.get(full, b""), data))

    def get(self, key: str, *, max_bytes: int) -> bytes:
        data = self._get(key)
        if len(data) > max_bytes:
            raise DamagedObject(key, f"it has {len(data):,} bytes; at most {max_bytes:,} can be")
        return data

    def read_into(self, key: str, offset: int, into: memoryview, *, shared: bool = False) -> None:
        data = self._get(key)
        end = offset + into.nbytes
        if offset < 0:
            raise DamagedObject(key, f"there is no byte {offset:,}")
        if end > len(data):
            raise DamagedObject(key, f"it ends at byte {len(data):,}, before byte {end:,}")
        if into.nbytes:
            into.cast("B")[:] = memoryview(data)[offset:end]

    def size(self, key: str) -> int:
        return len(self._get(key))

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        start = self._prefix + check_prefix(prefix)
        with self._lock:
            found = [(key, len(data)) for key, data in self._objects.items()]
        skip = len(self._prefix)
        return (
            ObjectInfo(key[skip:], size)
            for key, size in found
            if key.startswith(start) and key[skip:] > after
        )

    def delete(self, keys: Iterable[str]) -> None:
        full = [self._full(key) for key in keys]
        with self._lock:
            for key in full:
                self._objects.pop(key, None)

    def settle(self, key: str) -> None:
        self._get(key)

    def prepare_writing(self) -> None:
        """A dict needs no preparation."""

    def remove_debris(self, *, thorough: bool = False) -> int:
        return 0

    def close(self) -> None:
        """The objects stay: others may have the same store open."""

    def _full(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _get(self, key: str) -> bytes:
        full = self._full(key)
        with self._lock:
            data = self._objects.get(full)
        if data is None:
            raise ObjectNotFound(key, self.address)
        return data


class _Blocks:
    """An object in the making; implements base.NewObject."""

    def __init__(self, store: MemoryStore, key: str) -> None:
        self._store = store
        self._key = key
        self._data = bytearray()
        self._lock = threading.Lock()

    def write(self, offset: int, data: memoryview) -> None:
        end = offset + data.nbytes
        with self._lock:
            self._data.extend(bytes(max(0, end - len(self._data))))
            self._data[offset:end] = data

    def publish(self, nbytes: int) -> bool:
        return self._store.put_new(self._key, [memoryview(self._data)[:nbytes]])

    def discard(self) -> None:
        self._data = bytearray()


_named: dict[str, MemoryStore] = {}
_named_lock = threading.Lock()
