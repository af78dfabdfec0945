"""Counts to ten; at the fourth the machine of the first attempt is about to be taken away. How it
says so is up to the test: `NOTICE` is the file of it, and Metaflow names it if `NAMED` is set."""

from __future__ import annotations

import os
import time
from pathlib import Path

from metaflow import FlowSpec, checkpoint, current, retry, step
from telling import tell

NOTICE = Path(os.environ["NOTICE"])

if "NAMED" in os.environ:
    # As `@batch` and `@kubernetes` do.
    current._update_env({"spot_termination_notice": str(NOTICE)})


class Preempted(FlowSpec):
    @retry(times=1, minutes_between_retries=0)
    @checkpoint
    @step
    def start(self):
        file = Path(current.checkpoint.directory, "count")
        loaded = int(file.read_text()) if current.checkpoint.is_loaded else 0
        tell(attempt=current.retry_count, loaded=loaded)
        for count in range(loaded + 1, 11):
            file.write_text(str(count))
            if count == 4 and current.retry_count == 0:
                take_away()
            current.checkpoint.save(latest=False)  # goes on
            current.checkpoint.save(block=False)
            if current.checkpoint.preempted:
                tell(preempted=count)
                if "STOPS" in os.environ and current.retry_count == 0:
                    raise RuntimeError("stopped by itself")
        self.next(self.end)

    @step
    def end(self):
        pass


def take_away():
    NOTICE.write_text("2026-11-26T19:00:00Z")
    until = time.monotonic() + 20
    while not current.checkpoint.preempted and time.monotonic() < until:
        time.sleep(0.05)
    NOTICE.unlink()  # the next attempt has another machine


if __name__ == "__main__":
    Preempted()
