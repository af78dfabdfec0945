"""A file that is there from the moment of the notice: `touch` it to have a run stop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from holdfast.notices.notice import Notice
from holdfast.notices.notifier import Notifier
from holdfast.notices.times import from_iso

# A machine is gone two minutes after its notice, so that an older one was about another.
_STALE_S = 600.0
_INTERVAL_S = 0.5
_MAX_BYTES = 100


def file_notifier(path: str, *, clock: Callable[[], float] = time.time) -> Notifier:
    """The file may say when: a time of ISO 8601."""
    started_s = clock()

    def ask() -> list[Notice]:
        try:
            if started_s - os.stat(path).st_mtime > _STALE_S:
                return []
            with Path(path).open("rb") as file:
                said = file.read(_MAX_BYTES).decode(errors="replace").strip()
        except OSError:
            return []
        text = f"the machine will be taken away ({path}{said and f': {said}'})"
        return [Notice("notice file", text, from_iso(said))]

    return Notifier("notice file", ask, _INTERVAL_S)
