"""Counts to ten and saves in the background, with a payload that the saves take a while for.
Ends in the middle as `HOW` says: in the first attempt; in each that comes to five for "fails"; in
the first `KILLS` for "killed"."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

from metaflow import FlowSpec, checkpoint, current, step
from telling import attempts, die, tell


class Ending(FlowSpec):
    @checkpoint
    @step
    def start(self):
        how = os.environ["HOW"]
        block = how in ("timeout", "killed")
        folder = Path(current.checkpoint.directory)
        loaded = 0
        if current.checkpoint.is_loaded:
            loaded = int((folder / "count").read_text())
            # A whole checkpoint: its two files are of the same save.
            assert (folder / "payload").read_bytes() == payload(loaded)
            assert current.checkpoint.info.metadata == {"count": loaded}
        tell(attempt=current.retry_count, loaded=loaded)
        endless = how == "timeout" and current.retry_count == 0
        if how == "killed" and attempts() <= int(os.environ["KILLS"]):
            endless = True
            threading.Timer(random.uniform(0, 0.3), die).start()
        count = loaded
        while count < 10 or endless:
            count += 1
            (folder / "count").write_text(str(count))
            (folder / "payload").write_bytes(payload(count))
            current.checkpoint.save(metadata={"count": count}, block=block)
            if block:
                tell(saved=count)
            if endless and count == 1 and how == "timeout":
                signal.alarm(2)  # Metaflow's, however long a slow machine took to come here
            if count == 5 and current.retry_count == 0 and how.isdigit():
                sys.exit(int(how))
            if count == 5 and current.retry_count == 0 and how == "raises":
                raise RuntimeError("told to fail")
            if count == 5 and current.retry_count == 0 and how == "terminated":
                os.kill(os.getpid(), signal.SIGTERM)
            if count >= 5 and how == "fails":
                raise RuntimeError("told to fail")
            if how == "timeout" and current.retry_count == 0 and os.environ.get("OUTSIDE"):
                time.sleep(60)  # the alarm ends it
        self.count = count
        self.next(self.end)

    @step
    def end(self):
        tell(count=getattr(self, "count", None), failed=str(getattr(self, "failed", None)))


def payload(count):
    """Two megabytes, other ones each time."""
    return count.to_bytes(8, "big") * 250_000


if __name__ == "__main__":
    Ending()
