"""The end of a process whose main thread does not come back."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import NoReturn

from holdfast.core.aside import Helper, NoThread

_FLUSH_S = 1.0  # the main thread may hold a stream's lock for ever


def leave(code: int) -> NoReturn:
    """End this process now, from any thread: what has been printed is written, and daemonic
    children of `multiprocessing` end, as at a normal end. Nothing else of a normal end happens:
    no `finally`, no exit hook of the program."""
    with contextlib.suppress(NoThread):
        Helper(_flush, name="holdfast-flush").join(_FLUSH_S)
    if (multiprocessing := sys.modules.get("multiprocessing")) is not None:
        with contextlib.suppress(Exception):  # nothing may keep this process
            for child in multiprocessing.active_children():
                if child.daemon:
                    child.kill()
    os._exit(code)


def _flush() -> None:
    for handler in logging.getLogger().handlers:
        with contextlib.suppress(Exception):
            handler.flush()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
