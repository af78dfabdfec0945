"""What a supervisor adds to the histories of runs: how processes ended that could not say so."""

from __future__ import annotations

import logging
import threading

from holdfast.supervise.machine import Record

logger = logging.getLogger("holdfast")

# A bucket that does not answer must not hold up the restart.
_PATIENCE_S = 10.0


def record(what: Record, now_s: float, text: str) -> None:
    """Append it, with `now_s` (Unix time) as the moment, and `text` for people. Never raises;
    waits a few seconds at most."""
    # A daemon: the supervisor may end before the store has answered.
    thread = threading.Thread(
        target=_append, args=(what, now_s, text), name="holdfast-recording", daemon=True
    )
    try:
        thread.start()
    except RuntimeError:  # too many threads
        return
    thread.join(_PATIENCE_S)


def _append(what: Record, now_s: float, text: str) -> None:
    from holdfast.manager.history import EndEvent, append_outside

    for process in what.processes:
        event = EndEvent(
            time_s=now_s,
            why=what.why,
            step=process.step,
            exit_code=what.status if what.status < 128 else None,
            signal=max(0, what.status - 128),
            pid=process.pid,
            text=text,
        )
        try:
            append_outside(process.address, [event])
        except Exception:  # a client that is not installed here, say; the restart matters more
            logger.debug("could not tell %s of an end", process.address, exc_info=True)
