"""Which results of calls a run has. Imports neither NumPy nor the tree code."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.repo import keys
from holdfast.stores.base import ObjectInfo, Store


@dataclass(frozen=True)
class Summary:
    """All results of a run."""

    count: int
    nbytes: int
    """Of the objects."""


def listed(store: Store) -> list[ObjectInfo]:
    """Every result, by one listing."""
    return [info for info in store.list(keys.RESULTS) if keys.result_names(info.key)]


def summary(store: Store) -> Summary:
    """How many there are."""
    infos = listed(store)
    return Summary(len(infos), sum(info.size_bytes for info in infos))
