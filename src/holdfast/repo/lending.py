"""The parent's side of a fork: giving back what a child no longer needs."""

from __future__ import annotations

from holdfast.errors import HoldfastError
from holdfast.repo.log import logger
from holdfast.repo.repo import Repo
from holdfast.stores.addresses import join_address, relative_address
from holdfast.stores.open import open_store

_FORK = "fork:"


def fork_pin(child: str) -> str:
    """The pin that a forked run at `child` (relative address) leaves on its parent."""
    return _FORK + child


def is_fork_pin(pin: str) -> bool:
    """Whether a pin belongs to a forked run and not to a user."""
    return pin.startswith(_FORK)


def release(child: Repo, borrowed: frozenset[str]) -> None:
    """Remove the child's pins from parents that none of its checkpoints needs any more.

    Called after the child's log entry that dropped the last of them is durable. A
    parent that cannot be reached keeps its pin: it wastes space and loses nothing.
    """
    for address in borrowed:
        target = join_address(child.address, address)
        try:
            parent = Repo(open_store(target), clock=child.clock)
            pin = fork_pin(relative_address(target, child.address))
            for record in parent.records():
                if pin in record.pins:
                    parent.update_record(
                        "release fork",
                        record.id,
                        lambda r, pin=pin: {"pins": tuple(p for p in r.pins if p != pin)},
                    )
        except HoldfastError as error:
            logger.warning("%s keeps a pin for %s: %s", target, child.address, error)
