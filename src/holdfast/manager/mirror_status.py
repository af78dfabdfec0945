"""What a run's mirror holds, for people: asked quickly, or not known."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import dataclass

from holdfast.errors import HoldfastError, NoStore
from holdfast.repo.mirrors import remembered
from holdfast.repo.repo import Repo
from holdfast.stores.open import open_store

# Who lists a run waits for its mirror no longer than this.
ANSWER_S = 3.0


@dataclass(frozen=True)
class MirrorStatus:
    """The mirror of a run as of now."""

    address: str
    ids: frozenset[str] | None
    """Checkpoints that it lists; None if it did not answer."""


def mirror_status(repo: Repo) -> MirrorStatus | None:
    """The mirror that the run's last writer had; None if it had none.

    Asks it for a few seconds at most, and raises nothing that it raises.
    """
    address = remembered(repo.store)
    return MirrorStatus(address, listed_in(address)) if address else None


def listed_in(address: str) -> frozenset[str] | None:
    """Ids of the checkpoints there; None if it does not answer within a few seconds."""
    answer: list[frozenset[str]] = []

    def ask() -> None:
        try:
            with closing(Repo(open_store(address))) as mirror:
                answer.append(frozenset(record.id for record in mirror.records()))
        except NoStore:
            answer.append(frozenset())
        except HoldfastError:
            pass  # None says so

    # A daemon: the command ends while a client still waits for its connection.
    asking = threading.Thread(target=ask, name="holdfast-ask", daemon=True)
    asking.start()
    asking.join(ANSWER_S)
    return answer[0] if answer else None
