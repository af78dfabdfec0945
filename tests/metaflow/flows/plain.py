"""Has no decorator: `--with checkpoint` gives it one. Saves thrice, and fails once where it
should: `FAILS`."""

from __future__ import annotations

import os
from pathlib import Path

from metaflow import FlowSpec, current, step
from telling import tell


class Plain(FlowSpec):
    @step
    def start(self):
        checkpoint = current.checkpoint
        tell(
            attempt=current.retry_count,
            loaded=dict(checkpoint.info.metadata) if checkpoint.is_loaded else None,
        )
        for count in range(3):
            Path(checkpoint.directory, "count").write_text(str(count))
            checkpoint.save(metadata={"by": os.environ.get("BY", ""), "count": count})
        if os.environ.get("FAILS") and current.retry_count == 0:
            raise RuntimeError("told to fail")
        tell(counts=[each["metadata"]["count"] for each in checkpoint.list()])
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    Plain()
