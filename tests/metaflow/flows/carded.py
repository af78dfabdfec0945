"""Three steps: one whose checkpoints have a card, and which fails once; one without; one with a
card of the user's beside it."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from metaflow import FlowSpec, card, checkpoint, current, retry, step
from metaflow.cards import Markdown
from telling import tell


class Carded(FlowSpec):
    @retry(times=1, minutes_between_retries=0)
    @checkpoint(show_card=True, keep="last=2 best=1:loss")
    @step
    def start(self):
        # Metaflow looks for cards below the working directory.
        os.chdir(os.path.dirname(current.checkpoint.directory))
        number = current.checkpoint.info.version_id if current.checkpoint.is_loaded else 0
        for loss in [3.0, 1.0, 2.0, 4.0][number:]:
            Path(current.checkpoint.directory, "loss").write_text(str(loss))
            current.checkpoint.save(name="<i>epoch</i>", metadata={"loss": loss})
            if loss == 2.0:
                raise RuntimeError("told to fail")
        self.next(self.middle)

    @checkpoint
    @step
    def middle(self):
        current.checkpoint.save(__file__)
        tell(
            imported=any(name.startswith("holdfast.metaflow.card") for name in sys.modules),
            thread="holdfast-card" in [thread.name for thread in threading.enumerate()],
        )
        self.next(self.end)

    @card
    @checkpoint(show_card=True)
    @step
    def end(self):
        current.card.append(Markdown("# of the user"))
        current.checkpoint.save(__file__, block=False)


if __name__ == "__main__":
    Carded()
