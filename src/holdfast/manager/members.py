"""Checkpoints of one or more runs, opened together."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from holdfast.core.address import split_reference
from holdfast.errors import UsageError
from holdfast.manager.info import CheckpointInfo
from holdfast.manager.manager import CheckpointManager

References: TypeAlias = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
"""`runs/x@last=5`, `runs/x@best:val_loss`, `runs/x` (the latest), or a list of such."""


@dataclass(frozen=True)
class Member:
    """One of them."""

    manager: CheckpointManager
    info: CheckpointInfo

    @property
    def ref(self) -> str:
        return self.info.ref


@contextmanager
def members(references: References) -> Generator[list[Member], None, None]:
    """Open what `references` name, each checkpoint once: in their order, those of one reference
    oldest first. Nothing is created. Raises NoStore, CheckpointNotFound, BadAddress,
    BadPolicy, and UsageError if nothing is named.
    """
    found: dict[tuple[str, str], Member] = {}
    with ExitStack() as stack:
        managers: dict[str, CheckpointManager] = {}
        for address, words in [_divided(text) for text in listed(references)]:
            manager = managers.get(address)
            if manager is None:
                manager = CheckpointManager(address, keep=None)
                managers[address] = stack.enter_context(manager)
            for info in manager.choose(words):
                found.setdefault((address, info.id), Member(manager, info))
        yield list(found.values())


def listed(references: References) -> list[str]:
    """Them as texts. Raises UsageError if there is none."""
    one = isinstance(references, str | os.PathLike)
    texts = [os.fspath(text) for text in ([references] if one else references)]  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]
    if not texts:
        raise UsageError("no checkpoint is named", hint='Name some: "runs/x@last=5".')
    return texts


def _divided(text: str) -> tuple[str, str]:
    address, words = split_reference(text)
    return address, "latest" if words is None else words
