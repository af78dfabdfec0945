"""A bucket as a store: S3, Google Cloud Storage, Azure Blob Storage, and what speaks like
them, through obstore.

An object is put whole, in one request that succeeds only where there is nothing: nobody
ever sees a half, nothing half is left behind, and the same request makes log entries safe.
Why so, and what was measured: docs/design/object-stores.md.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from holdfast.core.copying import copy_bytes
from holdfast.core.types import Buffer, MiB
from holdfast.errors import (
    DamagedObject,
    HoldfastError,
    ObjectNotFound,
    StoredWrong,
    StoreUnavailable,
    StoreUnfit,
)
from holdfast.stores.base import NewObject, ObjectInfo, check_key, check_prefix
from holdfast.stores.object_address import parse_object_address
from holdfast.stores.object_blocks import blocks
from holdfast.stores.object_clients import LARGE_BYTES, Clients, check_not_forked, connect
from holdfast.stores.object_errors import Meaning, meaning_of, refusal, status_of, words_of
from holdfast.stores.retrying import Passing, Retry

# One request moves 0.1 GB/s or so, whatever the machine: many together are fast. Packs are as
# large as two or three parts of a multipart upload, and each costs one request.
WHOLE_BYTES = 32 * MiB
PARALLEL = 8
# Entries of a log may be as large, and are a few kB; manifests may be larger.
_LARGE_GET_BYTES = 256 * MiB
# No object is larger anywhere (S3: 50 TB), and clients count in 64 bits.
_LARGEST_BYTES = 1 << 62
# How often what was appended is sent, all of it each time: it is read by people.
_APPENDS_S = 300.0
# A checkpoint is committed before what it retires is deleted, and reported after that; what
# stays is found by gc.
_DELETE_S = 10.0
# A scratch object is of use during four requests, each tried for two minutes at most.
_PROBE = "probe-"
_PROBE_S = 3600.0

_T = TypeVar("_T")


class ObjectStore:
    """Objects below a prefix of a bucket. From any thread, and in no forked child of a
    process that used one.

    Requests that failed are repeated as `retry` says; then StoreUnavailable is raised.
    """

    def __init__(
        self,
        address: str,
        *,
        retry: Retry | None = None,
        clients: Clients | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Asks no server. Raises BadAddress. `clients`: for tests."""
        self._parsed = parse_object_address(address)
        self._retry = retry or Retry()
        self._brief = replace(self._retry, deadline_s=min(_DELETE_S, self._retry.deadline_s))
        self._clients = clients
        self._clock = clock
        self._lock = threading.Lock()
        self._md5 = True
        """Entity tags are MD5 digests, for all we know."""
        self._appended: dict[str, _Appended] = {}

    def __repr__(self) -> str:
        return f"ObjectStore({self.address!r})"

    @property
    def address(self) -> str:
        return self._parsed.text

    @property
    def whole_bytes(self) -> int:
        return WHOLE_BYTES

    @property
    def parallel(self) -> int:
        return PARALLEL

    # -- writing -----------------------------------------------------------------------

    def put_new(self, key: str, parts: Sequence[Buffer]) -> bool:
        check_key(key)
        views = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]
        nbytes = sum(view.nbytes for view in views)

        sent_before = False

        def put() -> bool:
            nonlocal sent_before
            first, sent_before = not sent_before, True
            md5 = self._md5
            reply = self._put(key, views, nbytes, "create", md5=md5)
            if reply is not None:
                self._verify(key, views, nbytes, reply, md5=md5)
                return True
            if first:
                return False
            if self._holds(key, views, nbytes):
                return True  # an earlier try has landed; what we write has our name in it
            if self.size(key) != nbytes:
                return False
            raise StoreUnavailable(
                f"{key!r} in {self.address} was sent several times, and is there with other bytes",
                hint="It was not used. The next save writes it anew.",
            )

        return self._ask(put, f"write {key!r}")

    def _put(
        self, key: str, views: Sequence[memoryview], nbytes: int, mode: str, *, md5: bool
    ) -> dict[str, Any] | None:
        """The server's reply; None if something is there. `md5`: its entity tag will say
        whether all arrived."""
        clients = self._connect()
        # The signature's digest costs as much as all else, and says what the tag says.
        client = clients.upload(nbytes, not md5)
        data = views if nbytes else b""
        try:
            return dict(clients.api.put(client, key, data, mode=mode, use_multipart=False))
        except clients.errors as error:
            if mode == "create" and meaning_of(error) is Meaning.EXISTS:
                return None
            raise self._translated(error, f"write {key!r}", writing=True) from None

    def _verify(
        self,
        key: str,
        views: Sequence[memoryview],
        nbytes: int,
        reply: dict[str, Any],
        *,
        md5: bool,
    ) -> None:
        """Compare what the server says that it stored with what was sent. Raises StoredWrong."""
        if md5 and _md5_in(reply) == _md5_of(views):
            return
        # Commits hang on small objects, and to read one costs no more than to ask for its size.
        if md5 or nbytes < LARGE_BYTES:
            same = self._holds(key, views, nbytes)
        else:
            same = self.size(key) == nbytes
        if not same:
            raise StoredWrong(
                f"{key!r} in {self.address} is not what was sent",
                hint="It was not used, and is left to gc. The next save writes it anew.",
            )
        # Then tags are no MD5 here: in Azure, and of what is encrypted with a user's key.
        self._md5 = False

    def _holds(self, key: str, views: Sequence[memoryview], nbytes: int) -> bool:
        if nbytes < LARGE_BYTES:
            try:
                return self.get(key, max_bytes=nbytes) == b"".join(views)
            except DamagedObject:
                return False  # it is larger
        if self.size(key) != nbytes:
            return False
        at = 0
        for view in views:
            found = memoryview(bytearray(view.nbytes))
            self.read_into(key, at, found)
            if found != view:
                return False
            at += view.nbytes
        return True

    def create(self, key: str, *, at_most_bytes: int) -> NewObject:
        check_key(key)
        return blocks(lambda parts: self.put_new(key, parts), self.address, at_most_bytes)

    def append(self, key: str, data: Buffer) -> None:
        """Kept here, and sent now and then: each time all of it, since objects do not grow."""
        check_key(key)
        with self._lock:
            appended = self._appended.get(key)
        if appended is None:
            try:
                before = self.get(key, max_bytes=1 << 40)
            except ObjectNotFound:
                before = b""
            now = self._retry.clock()
            with self._lock:
                appended = self._appended.setdefault(key, _Appended(bytearray(before), now))
        with appended.lock:
            appended.data += memoryview(data).cast("B")
            appended.dirty = True
            due = self._retry.clock() - appended.sent >= _APPENDS_S
        if due:
            self._send(key)

    def _send(self, key: str) -> None:
        """Bring what was appended to the server."""
        with self._lock:
            appended = self._appended.get(key)
        if appended is None:
            return
        with appended.lock:
            if appended.dirty:
                data = memoryview(bytes(appended.data))
                appended.sent = self._retry.clock()  # tried; not again with the next line
                self._ask(
                    lambda: self._put(key, [data], data.nbytes, "overwrite", md5=False),
                    f"write {key!r}",
                )
                appended.dirty = False

    def settle(self, key: str) -> None:
        """What is visible is durable."""
        self.size(key)

    def delete(self, keys: Iterable[str]) -> None:
        wanted = [check_key(key) for key in keys]
        with self._lock:
            for key in wanted:
                self._appended.pop(key, None)
        if not wanted:
            return
        clients = self._connect()

        def delete(some: list[str]) -> None:
            try:
                clients.api.delete(clients.small, some)
            except clients.errors as error:
                if meaning_of(error) is not Meaning.ABSENT:
                    raise self._translated(error, "delete", writing=True) from None
                if len(some) > 1:  # it stopped at one that is gone
                    for key in some:
                        delete([key])

        self._ask(lambda: delete(wanted), "delete", self._brief)

    # -- reading -----------------------------------------------------------------------

    def get(self, key: str, *, max_bytes: int) -> bytes:
        check_key(key)
        self._send(key)
        clients = self._connect()
        client = clients.large if max_bytes > _LARGE_GET_BYTES else clients.small

        def get() -> bytes:
            try:
                reply = clients.api.get(client, key)
                nbytes = int(reply.meta["size"])
                if nbytes > max_bytes:
                    raise DamagedObject(
                        key, f"it has {nbytes:,} bytes; at most {max_bytes:,} can be"
                    )
                data = bytes(memoryview(reply.bytes()))
            except clients.errors as error:
                raise self._translated(error, f"read {key!r}", key) from None
            if len(data) != nbytes:
                raise Passing(f"{len(data):,} of {nbytes:,} bytes came")
            return data

        return self._ask(get, f"read {key!r}")

    def read_into(self, key: str, offset: int, into: memoryview, *, shared: bool = False) -> None:
        check_key(key)
        self._send(key)
        if offset < 0:
            raise DamagedObject(key, f"there is no byte {offset:,}")
        end = offset + into.nbytes
        if not into.nbytes or end > _LARGEST_BYTES:
            self._check_end(key, end)
            return
        clients = self._connect()
        client = clients.large if into.nbytes >= LARGE_BYTES else clients.small

        def read() -> None:
            try:
                data = memoryview(clients.api.get_range(client, key, start=offset, end=end))
            except clients.errors as error:
                translated = self._translated(error, f"read {key!r}", key)
                passing = isinstance(translated, Passing | ObjectNotFound)
                if not passing and status_of(error) not in (401, 403):
                    self._check_end(key, end)  # it may just be too short
                raise translated from None
            if data.nbytes != into.nbytes:
                self._check_end(key, end)
                raise Passing(f"{data.nbytes:,} of {into.nbytes:,} bytes came")
            copy_bytes(into.cast("B"), data)

        self._ask(read, f"read {key!r}")

    def _check_end(self, key: str, end: int) -> None:
        if (nbytes := self.size(key)) < end:
            raise DamagedObject(key, f"it ends at byte {nbytes:,}, before byte {end:,}")

    def size(self, key: str) -> int:
        check_key(key)
        self._send(key)
        clients = self._connect()

        def size() -> int:
            try:
                return int(clients.api.head(clients.small, key)["size"])
            except clients.errors as error:
                raise self._translated(error, f"read {key!r}", key) from None

        return self._ask(size, f"read {key!r}")

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        for key in list(self._appended):
            if key.startswith(prefix):
                self._send(key)
        clients = self._connect()

        def found() -> list[ObjectInfo]:
            try:
                pages = clients.api.list(
                    clients.small, prefix.rstrip("/") or None, offset=after or None
                )
                return [
                    ObjectInfo(item["path"], int(item["size"]), _md5_in(item))
                    for page in pages
                    for item in page
                ]
            except clients.errors as error:
                raise self._translated(error, f"list {prefix!r}") from None

        infos = self._ask(found, f"list {prefix!r}")
        return (
            info
            for info in infos
            if info.key.startswith(prefix) and info.key > after and is_key(info.key)
        )

    def look(self, path: str) -> tuple[set[str], list[str]]:
        """(names, paths of those that have more below them) of what lies directly below
        `path`, a key or "": as in a folder."""
        clients = self._connect()

        def found() -> tuple[set[str], list[str]]:
            try:
                reply = clients.api.list_with_delimiter(clients.small, path or None)
            except clients.errors as error:
                raise self._translated(error, f"list {path!r}") from None
            folders = [str(name) for name in reply["common_prefixes"]]
            paths = [*folders, *(str(item["path"]) for item in reply["objects"])]
            return {name.rpartition("/")[2] for name in paths}, folders

        return self._ask(found, f"list {path!r}")

    def below(self, path: str) -> str:
        """The address of what lies at `path`."""
        return self._parsed.below(path)

    # -- the rest ------------------------------------------------------------------------

    def prepare_writing(self) -> None:
        """Three requests on a scratch key, one more where the second one is not refused: the
        key may have been free, since another process took it for a leftover (`remove_debris`)."""
        key = f"{_PROBE}{secrets.token_hex(8)}"

        def is_refused(content: bytes) -> bool:
            view = memoryview(content)
            put = lambda: self._put(key, [view], view.nbytes, "create", md5=False)  # noqa: E731
            return self._ask(put, f"write {key!r}") is None

        try:
            with suppress(ObjectNotFound):  # where what was put is read: gone already
                self.put_new(key, [b"first"])
            if not is_refused(b"second") and not is_refused(b"third"):
                raise StoreUnfit(
                    f"{self.address} cannot hold a run: its server replaces an object that was to "
                    "be created only if there is none, so that two writers could overwrite each "
                    "other",
                    hint="Use a server with conditional writes (If-None-Match: *), as S3, GCS, "
                    "Azure, MinIO, Ceph and R2 have, or a local folder. Reading works here.",
                )
        finally:
            with suppress(HoldfastError):  # what was found out matters more
                self.delete([key])

    def remove_debris(self, *, thorough: bool = False) -> int:
        """Scratch objects of `prepare_writing` whose deletion failed; nothing half is ever there.

        Their age is what the server and this machine's clock say, and may be wrong: to a process
        that has just made one it does no harm.
        """
        if not thorough:
            return 0
        clients = self._connect()

        def found() -> list[str]:
            try:
                reply = clients.api.list_with_delimiter(clients.small, None)
            except clients.errors as error:
                raise self._translated(error, "list ''") from None
            latest = self._clock() - _PROBE_S
            return [
                str(item["path"])
                for item in reply["objects"]
                if is_probe(item["path"]) and item["last_modified"].timestamp() < latest
            ]

        left = self._ask(found, "list ''")
        self.delete(left)
        return len(left)

    def close(self) -> None:
        for key in list(self._appended):
            try:
                self._send(key)
            except HoldfastError:
                continue  # for people; nothing depends on it
        self._appended.clear()

    def _connect(self) -> Clients:
        check_not_forked(self._parsed)
        with self._lock:
            if self._clients is None:
                self._clients = connect(self._parsed)
            return self._clients

    def _ask(self, work: Callable[[], _T], what: str, retry: Retry | None = None) -> _T:
        try:
            return (retry or self._retry).call(work)
        except Passing as error:
            raise StoreUnavailable(
                f"cannot {what} in {self.address}: {error}",
                hint="Check the network and the server; what was asked is tried again later.",
            ) from None

    def _translated(
        self, error: Exception, what: str, key: str = "", *, writing: bool = False
    ) -> Exception:
        if isinstance(error, HoldfastError | Passing):
            return error
        meaning = meaning_of(error)
        if meaning is Meaning.ABSENT and key:
            return ObjectNotFound(key, self.address)
        if meaning is Meaning.PASSING or (meaning is Meaning.ABSENT and not writing):
            return Passing(words_of(error))
        return refusal(error, what, self.address, writing=writing)


def _md5_in(about: Mapping[str, Any]) -> str:
    """The MD5 digest that an object's entity tag is, or looks like; "" if it is none."""
    tag = str(about.get("e_tag") or "").strip('"').lower()
    return tag if len(tag) == 32 and set(tag) <= set("0123456789abcdef") else ""


def _md5_of(views: Iterable[memoryview]) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for view in views:
        digest.update(view)
    return digest.hexdigest()


def is_key(key: str) -> bool:
    """Whether a name that a server lists is one that a store accepts."""
    try:
        check_key(key)
    except HoldfastError:
        return False
    return True


def is_probe(key: str) -> bool:
    """Whether it is the key of a scratch object of `ObjectStore.prepare_writing`."""
    return re.fullmatch(rf"{_PROBE}[0-9a-f]{{16}}", key) is not None


class _Appended:
    """An object that grows, as this process knows it."""

    def __init__(self, data: bytearray, sent: float) -> None:
        self.data = data
        self.dirty = False
        self.sent = sent
        self.lock = threading.Lock()
