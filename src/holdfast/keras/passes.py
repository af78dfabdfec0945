"""What the kinds of data that `fit` goes through have in common.

A *pass* is what Keras makes an iterator for: an epoch, or as many epochs as the data lasts for
where `steps_per_epoch` is given. Each kind of data says how a pass begins and how one is gone
on with behind the batches that were taken.
"""

from __future__ import annotations

from typing import Any


class Data:
    """What the kinds of data share. `state` says where a pass is; `go_on` goes there."""

    kind = ""
    known = ""
    """Why the order cannot be known, in words; "" if it can."""
    peeks = False
    """Whether the end of a pass is seen only by asking for the next batch."""
    dataset: Any = None
    """The program's own object, where its state is saved too."""

    def __init__(self, iterator: Any) -> None:
        self.iterator = iterator
        self.adapter = iterator.data_adapter

    def state(self) -> dict[str, Any]:
        """Of the pass in progress, as it was before the next batch."""
        return {}

    def rest(self, saved: dict[str, Any], taken: int) -> None:
        """Bring what lasts between passes to where it was. Nothing is taken."""

    def go_on(self, saved: dict[str, Any], taken: int) -> None:
        """The next pass to begin is the saved one, behind `taken` batches."""
        self.rest(saved, taken)

    def peek(self, batches: int) -> bool:
        """Whether there is another batch."""
        return True

    def ended(self, *, whole: bool) -> None:
        """An epoch has; `whole`: it was a pass, and the next one begins another."""

    def stop(self) -> None:
        """Training is left: what goes on beside it ends."""


class Unknown(Data):
    """Data whose order nobody can tell: its epochs are whole."""

    kind = "unknown"

    def __init__(self, iterator: Any, why: str) -> None:
        super().__init__(iterator)
        self.known = why
