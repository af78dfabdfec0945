"""A store that fails on command, for tests: die, lose a reply, fail, delay, damage.

A `FaultPlan` says what happens at which call; `FaultyStore` counts the calls and
makes it happen. With an empty plan it is the store that it wraps.

    for n in count_calls(save):
        store = FaultyStore(inner, FaultPlan.at(n, Effect.DIE_AFTER))
        with suppress(Died):
            save(store)
        look_at(store.survivor())
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from holdfast.core.types import Buffer
from holdfast.errors import ObjectNotFound, StoredWrong, StoreError, StoreUnavailable
from holdfast.stores.base import NewObject, ObjectInfo, Store, check_key

_T = TypeVar("_T")

READS = frozenset({"get", "read_into"})


class Died(BaseException):
    """The process is gone. Not an Exception: nothing that handles errors may live on."""


class Effect(Enum):
    """What happens at a call."""

    DIE_BEFORE = "die before"
    """The call has no effect, and no call is made any more."""
    DIE_AFTER = "die after"
    """The call has its effect, and no call is made any more."""
    FAIL = "fail"
    """The call raises and has no effect."""
    LOSE_REPLY = "lose the reply"
    """The call has its effect, and raises as if it had none."""
    DELAY = "delay"
    """A write raises now and has its effect at `release()`. Other calls: as FAIL."""
    SPOIL = "spoil"
    """A put creates its object with one flipped bit, and raises StoredWrong. Other calls:
    nothing."""
    DAMAGE = "damage"
    """A read returns one flipped bit. Other calls: nothing."""
    STALE = "stale"
    """A listing is as it was `Fault.age` changes ago. Other calls: nothing."""


@dataclass(frozen=True)
class Call:
    """One call of a store. A `delete` of n keys is n calls."""

    number: int
    """From 1, over all calls of the wrapper."""
    operation: str
    """The method's name."""
    key: str
    """The key, the prefix of a listing, or ""."""


@dataclass(frozen=True)
class Fault:
    """An effect and the calls that it meets: all given conditions must hold."""

    effect: Effect
    call: int | None = None
    """`Call.number`."""
    operation: str = ""
    """Only this method."""
    prefix: str = ""
    """Only keys that start so."""
    nth: int = 1
    """From the nth call on that meets the conditions above …"""
    times: int | None = 1
    """… so many times; None: for ever."""
    error: type[StoreError] = StoreUnavailable
    """What FAIL, LOSE_REPLY and DELAY raise."""
    bit: int = 0
    """DAMAGE, SPOIL: which bit of the bytes, modulo their number."""
    age: int = 1
    """STALE: how many creations and deletions the listing does not know of."""

    def meets(self, call: Call) -> bool:
        """Whether `call` meets the conditions other than `nth` and `times`."""
        return (
            self.call in (None, call.number)
            and self.operation in ("", call.operation)
            and call.key.startswith(self.prefix)
        )


@dataclass(frozen=True)
class FaultPlan:
    """What happens at which call. Pure: how often each fault was met is an argument."""

    faults: tuple[Fault, ...] = ()

    @staticmethod
    def at(call: int, effect: Effect) -> FaultPlan:
        """A plan with one fault, at the call of this number."""
        return FaultPlan((Fault(effect, call=call),))

    def decide(self, met: Sequence[int], call: Call) -> tuple[tuple[int, ...], Fault | None]:
        """(how often each fault was met, now with `call`; the fault that happens).

        `met` has one number per fault, all 0 at first. Of several the first wins.

        >>> plan = FaultPlan((Fault(Effect.FAIL, operation="get", nth=2),))
        >>> plan.decide((1,), Call(9, "get", "log/1"))[1].effect
        <Effect.FAIL: 'fail'>
        """
        now = tuple(
            count + fault.meets(call) for count, fault in zip(met, self.faults, strict=True)
        )
        for before, after, fault in zip(met, now, self.faults, strict=True):
            last = float("inf") if fault.times is None else fault.nth + fault.times - 1
            if after > before and fault.nth <= after <= last:
                return now, fault
        return now, None


@dataclass(frozen=True)
class _Change:
    """A creation or deletion, kept so that a stale listing can undo it."""

    info: ObjectInfo
    created: bool


class FaultyStore:
    """`inner`, with the faults of `plan`.

    Every method but `address` counts as a call. `on_call` is told each call before
    anything happens, in the calling thread: what it does to the inner store comes
    between two calls of the caller, as another process's work would.
    """

    def __init__(
        self,
        inner: Store,
        plan: FaultPlan | None = None,
        *,
        on_call: Callable[[Call], None] | None = None,
    ) -> None:
        self._inner = inner
        self._plan = plan or FaultPlan()
        self._on_call = on_call
        self._met: tuple[int, ...] = (0,) * len(self._plan.faults)
        self._lock = threading.Lock()
        self._dead = False
        self._changes: list[_Change] = []
        self._delayed: list[Callable[[], object]] = []
        self.calls: list[Call] = []
        """Every call so far, those that failed too."""

    @property
    def address(self) -> str:
        return self._inner.address

    # -- after the fact --------------------------------------------------------------

    def survivor(self) -> Store:
        """The inner store: what a new process finds."""
        return self._inner

    def release(self) -> int:
        """Let all delayed writes arrive; how many there were. Works after death too."""
        with self._lock:
            delayed, self._delayed = self._delayed, []
        for write in delayed:
            write()
        return len(delayed)

    # -- the store -------------------------------------------------------------------

    @property
    def whole_bytes(self) -> int:
        return self._inner.whole_bytes

    @property
    def parallel(self) -> int:
        return self._inner.parallel

    def put_new(self, key: str, parts: Sequence[Buffer]) -> bool:
        def put() -> bool:
            created = self._inner.put_new(key, parts)
            if created:
                nbytes = sum(memoryview(part).nbytes for part in parts)
                self._note(_Change(ObjectInfo(key, nbytes), created=True))
            return created

        def late() -> Callable[[], object]:
            copy = b"".join(parts)  # the caller may change its buffers
            return lambda: self._inner.put_new(key, [copy])

        def spoiled(bit: int) -> Callable[[], bool]:
            wrong = bytearray(b"".join(parts))
            _flip(memoryview(wrong), bit)
            return lambda: self._inner.put_new(key, [wrong])

        return self._run("put_new", key, put, late, spoiled)

    def create(self, key: str, *, at_most_bytes: int) -> NewObject:
        inner = self._run(
            "create", key, lambda: self._inner.create(key, at_most_bytes=at_most_bytes)
        )
        return _FaultyObject(key, inner, self._run, self._note)

    def append(self, key: str, data: Buffer) -> None:
        self._run("append", key, lambda: self._inner.append(key, data))

    def get(self, key: str, *, max_bytes: int) -> bytes:
        fault, data = self._call("get", key, lambda: self._inner.get(key, max_bytes=max_bytes))
        if fault and fault.effect is Effect.DAMAGE and data:
            damaged = bytearray(data)
            _flip(memoryview(damaged), fault.bit)
            return bytes(damaged)
        return data

    def read_into(self, key: str, offset: int, into: memoryview, *, shared: bool = False) -> None:
        def read() -> None:
            self._inner.read_into(key, offset, into, shared=shared)

        fault, _ = self._call("read_into", key, read)
        if fault and fault.effect is Effect.DAMAGE and into.nbytes:
            _flip(into.cast("B"), fault.bit)

    def size(self, key: str) -> int:
        return self._run("size", key, lambda: self._inner.size(key))

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        fault, found = self._call("list", prefix, lambda: [*self._inner.list(prefix)])
        if fault and fault.effect is Effect.STALE:
            found = self._as_of(fault.age, prefix, found)
        return (info for info in found if info.key > after)

    def delete(self, keys: Iterable[str]) -> None:
        for key in [check_key(key) for key in keys]:
            self._run(
                "delete",
                key,
                lambda key=key: self._delete(key),
                lambda key=key: lambda: self._inner.delete([key]),
            )

    def _delete(self, key: str) -> None:
        try:
            gone = _Change(ObjectInfo(key, self._inner.size(key)), created=False)
        except ObjectNotFound:
            gone = None
        self._inner.delete([key])
        if gone:
            self._note(gone)

    def settle(self, key: str) -> None:
        self._run("settle", key, lambda: self._inner.settle(key))

    def prepare_writing(self) -> None:
        self._run("prepare_writing", "", self._inner.prepare_writing)

    def remove_debris(self, *, thorough: bool = False) -> int:
        return self._run("remove_debris", "", lambda: self._inner.remove_debris(thorough=thorough))

    def close(self) -> None:
        self._run("close", "", self._inner.close)

    # -- faults ----------------------------------------------------------------------

    def _run(
        self,
        operation: str,
        key: str,
        effect: Callable[[], _T],
        late: Callable[[], Callable[[], object]] | None = None,
        spoiled: Callable[[int], Callable[[], bool]] | None = None,
    ) -> _T:
        return self._call(operation, key, effect, late, spoiled)[1]

    def _call(
        self,
        operation: str,
        key: str,
        effect: Callable[[], _T],
        late: Callable[[], Callable[[], object]] | None = None,
        spoiled: Callable[[int], Callable[[], bool]] | None = None,
    ) -> tuple[Fault | None, _T]:
        """(the fault that the caller has to act on, if any; the result of `effect`)."""
        call, fault = self._next(operation, key)
        if self._on_call:
            self._on_call(call)
        if fault is None:
            return None, effect()
        match fault.effect:
            case Effect.DIE_BEFORE:
                raise self._die(call)
            case Effect.DIE_AFTER:
                with suppress(StoreError):
                    effect()
                raise self._die(call)
            case Effect.LOSE_REPLY:
                with suppress(StoreError):  # a lost reply tells nothing, errors neither
                    effect()
                raise self._error(fault, call)
            case Effect.DELAY if late is not None:
                with self._lock:
                    self._delayed.append(late())
                raise self._error(fault, call)
            case Effect.FAIL | Effect.DELAY:
                raise self._error(fault, call)
            case Effect.SPOIL if spoiled is not None and spoiled(fault.bit)():
                raise StoredWrong(f"injected at call {call.number}: {call.operation} {key!r}")
            case Effect.SPOIL | Effect.DAMAGE | Effect.STALE:
                return fault, effect()

    def _next(self, operation: str, key: str) -> tuple[Call, Fault | None]:
        with self._lock:
            if self._dead:
                raise Died(f"{operation} {key!r} by a process that is gone")
            call = Call(len(self.calls) + 1, operation, key)
            self.calls.append(call)
            self._met, fault = self._plan.decide(self._met, call)
            return call, fault

    def _die(self, call: Call) -> Died:
        self._dead = True
        return Died(f"at call {call.number}: {call.operation} {call.key!r}")

    def _error(self, fault: Fault, call: Call) -> StoreError:
        return fault.error(f"injected at call {call.number}: {call.operation} {call.key!r}")

    def _note(self, change: _Change) -> None:
        with self._lock:
            self._changes.append(change)

    def _as_of(self, age: int, prefix: str, found: list[ObjectInfo]) -> list[ObjectInfo]:
        """`found` without the newest `age` changes made through this wrapper."""
        listing = {info.key: info for info in found}
        with self._lock:
            undone = self._changes[::-1][:age]
        for change in undone:
            if change.created:
                listing.pop(change.info.key, None)
            elif change.info.key.startswith(prefix):
                listing[change.info.key] = change.info
        return [*listing.values()]


class _FaultyObject:
    """An object in the making. `write` and `publish` count as calls; a publication may be
    delayed, and the object is then there although it was discarded."""

    def __init__(
        self,
        key: str,
        inner: NewObject,
        run: Callable[..., Any],
        note: Callable[[_Change], None],
    ) -> None:
        self._key = key
        self._inner = inner
        self._run = run
        self._note = note
        self._late = False

    def write(self, offset: int, data: memoryview) -> None:
        self._run("write", self._key, lambda: self._inner.write(offset, data))

    def publish(self, nbytes: int) -> bool:
        def publish() -> bool:
            created = self._inner.publish(nbytes)
            if created:
                self._note(_Change(ObjectInfo(self._key, nbytes), created=True))
            return created

        def late() -> Callable[[], object]:
            self._late = True

            def arrive() -> None:
                self._inner.publish(nbytes)
                self._inner.discard()

            return arrive

        return self._run("publish", self._key, publish, late)

    def discard(self) -> None:
        if not self._late:
            self._inner.discard()


def _flip(data: memoryview, bit: int) -> None:
    index, shift = divmod(bit % (data.nbytes * 8), 8)
    data[index] ^= 1 << shift
