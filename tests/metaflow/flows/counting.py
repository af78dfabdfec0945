"""Counts to ten, saves each number, and ends where it is told to: `DIES_AT`, once, by SIGKILL;
`FAILS_AT`, in every attempt that comes there; with `NO_TASKS` before a task begins."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from metaflow import FlowSpec, checkpoint, current, retry, step
from telling import die, tell

if os.environ.get("NO_TASKS") and "step" in sys.argv:
    sys.exit("told to fail")


class Counting(FlowSpec):
    @retry(times=2, minutes_between_retries=0)
    @checkpoint
    @step
    def start(self):
        file = Path(current.checkpoint.directory, "count")
        loaded = int(file.read_text()) if current.checkpoint.is_loaded else 0
        info = current.checkpoint.info
        tell(
            attempt=current.retry_count,
            run=current.run_id,
            loaded=loaded,
            metadata=dict(info.metadata) if info else None,
            files=sorted(os.listdir(current.checkpoint.directory)),
        )
        for count in range(loaded + 1, 11):
            if count == int(os.environ.get("FAILS_AT", 0)):
                raise RuntimeError("told to fail")
            file.write_text(str(count))
            current.checkpoint.save(metadata={"count": count})
            if count == int(os.environ.get("DIES_AT", 0)) and current.retry_count == 0:
                die()
        self.count = int(file.read_text())
        self.next(self.end)

    @step
    def end(self):
        tell(count=self.count)


if __name__ == "__main__":
    Counting()
