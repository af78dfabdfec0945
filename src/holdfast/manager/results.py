"""`Results`: what calls of functions gave, found by what was called, and stored once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from holdfast.core.address import printable
from holdfast.errors import CorruptionError, ObjectNotFound, StoredWrong
from holdfast.manager import heartbeat
from holdfast.repo import keys, results
from holdfast.repo.repo import Repo

if TYPE_CHECKING:
    from holdfast.core.calls import Call
    from holdfast.manager.listing import Listing

logger = logging.getLogger("holdfast")

# Another process may put back what is damaged at the same moment; and a store that
# spoils what it is given does so again and again.
_ATTEMPTS = 3


class Found(NamedTuple):
    """A result that was stored."""

    value: Any
    time_s: float
    """When."""
    took_s: float
    """How long it was computed; 0 if that is not known."""


class Results:
    """The results of one run. From any thread."""

    def __init__(self, repo: Repo, tell: Callable[[str], None] = logger.error) -> None:
        self._repo = repo
        self._tell = tell
        self._began = False
        self._lock = threading.Lock()

    @classmethod
    def of(cls, run: Listing, tell: Callable[[str], None] = logger.error) -> Self:
        """Of the run that is open as `run`. `tell` gets lines that must not be missed."""
        run._check_usable()
        return cls(run._repo, tell)

    def verify(self) -> list[CorruptionError]:
        """Read every byte of all; what is damaged."""
        return list(results.damaged(self._repo.store))

    def names(self, function: str) -> set[tuple[str, str]]:
        """(arguments, code) of each stored result of a function, as `name_in` gives them."""
        from holdfast.core.digest import digest

        found = self._repo.store.list(keys.results_of(digest(function.encode())))
        return {names for info in found if (names := keys.result_names(info.key))}

    def find(self, call: Call) -> Found | None:
        """The stored result of `call`, every byte verified; None if there is none. Damage is
        told, and as if there were none. Raises FormatTooNew, StoreUnavailable."""
        try:
            return self._read(call)
        except ObjectNotFound:
            return None
        except CorruptionError as error:
            self._tell(
                f"{printable(self._repo.address)}: a result of {call.function} is damaged and is "
                f"computed again: {error.message}"
            )
            return None

    def keep(self, call: Call, value: object, took_s: float = 0.0) -> Any:
        """Store `value` as the result of `call`, unless there is one: what is stored then,
        durable and made anew from there, as any later process gets it.

        Raises UnsupportedValue for what cannot be stored; CorruptionError if what is stored
        there is damaged and stays so; and as `Store.put_new`.
        """
        encoded = results.encode(value)
        try:
            self._begin()
            key = results.key_of(call)
            store = self._repo.store
            for attempt in range(_ATTEMPTS):
                try:
                    results.put(store, call, encoded, time_s=self._repo.clock(), took_s=took_s)
                except StoredWrong:
                    if attempt == _ATTEMPTS - 1:
                        raise
                    store.delete([key])
                    continue
                try:
                    return self._read(call).value
                except (CorruptionError, ObjectNotFound):
                    if attempt == _ATTEMPTS - 1:
                        raise
                # It was damaged before, or another process has just deleted what was.
                store.delete([key])
        finally:
            encoded.close()
        raise AssertionError("not reached")

    def _read(self, call: Call) -> Found:
        """Damage is looked at twice: what came may be other bytes than what is stored."""
        store, key = self._repo.store, results.key_of(call)
        try:
            found = results.stored(store, key, call)
            value = found.value()
        except CorruptionError:
            found = results.stored(store, key, call)
            value = found.value()
        heartbeat.alive()
        return Found(value, found.result.time_s, found.result.took_s)

    def _begin(self) -> None:
        """The run is there. Nobody has to hold it."""
        from holdfast.repo.run_info import ensure_info

        with self._lock:
            if self._began:
                return
            self._repo.store.prepare_writing()
            ensure_info(self._repo, "", None)
            self._began = True


def names_in(call: Call) -> tuple[str, str]:
    """What `Results.names` has of this call."""
    names = keys.result_names(results.key_of(call))
    assert names is not None
    return names
