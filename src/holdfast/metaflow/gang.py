"""What the nodes of a step that runs on several go on from: the same, whatever is saved meanwhile.

The control node chooses, and writes its choice down once for each attempt; the others wait for
it. They may not look for themselves: the control node may have saved by then, and a process of
an attempt that was given up may still save.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from holdfast.errors import ObjectNotFound, StoreUnavailable
from holdfast.metaflow.places import Place, Root
from holdfast.metaflow.reference import Reference
from holdfast.stores.open import open_store

_FOLDER = "chosen"
"""Beside the folders of the writers. It is no run of Holdfast's: lists pass it over."""
_MAX_BYTES = 1 << 20
# Nodes on other machines begin minutes apart: images are fetched, disks attached.
_WAIT_S = 900.0
_POLL_S = 0.5


def publish(root: Root, place: Place, attempt: int, chosen: Reference | None) -> None:
    """For the control node: what it has loaded itself, for all nodes of this attempt.

    Raises StoreError.
    """
    text = json.dumps(chosen and chosen.to_dict())
    open_store(root.address(*place.parts, _FOLDER)).put_new(_key(attempt), [text.encode()])


def await_choice(
    root: Root,
    place: Place,
    attempt: int,
    *,
    timeout_s: float = _WAIT_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Reference | None:
    """For the other nodes. Raises StoreUnavailable if the control node has not chosen in time."""
    store = open_store(root.address(*place.parts, _FOLDER))
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            found = json.loads(store.get(_key(attempt), max_bytes=_MAX_BYTES))
            return found and Reference.of(found)
        except ObjectNotFound:
            pass
        if time.monotonic() > deadline:
            raise StoreUnavailable(
                f"the control node has not said within {timeout_s:g} s what this attempt of "
                f"{place.step!r} goes on from: {store.address}/{_key(attempt)} is not there",
                hint="Its log says why: it has not begun, or cannot write to the datastore.",
            )
        sleep(_POLL_S)


def _key(attempt: int) -> str:
    return f"attempt-{attempt}"
