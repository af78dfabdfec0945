"""What is changed in the records of checkpoints: metrics and tags. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import msgspec

from holdfast.core.records import Record
from holdfast.errors import CheckpointNotFound, UsageError


def split_metrics(metrics: Mapping[str, float]) -> tuple[dict[str, float], dict[str, str]]:
    """(finite ones, the others as "nan", "inf", "-inf"). Raises UsageError for non-numbers."""
    finite: dict[str, float] = {}
    odd: dict[str, str] = {}
    for name, value in metrics.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UsageError(
                f"metric {name!r} is not a number: {value!r:.80}",
                hint="Metrics are numbers; keep other values in the state.",
            ) from None
        if math.isfinite(number):
            finite[name] = number
        else:
            odd[name] = str(number)
    return finite, odd


def more_metrics(
    record: Record, finite: Mapping[str, float], odd: Mapping[str, str]
) -> dict[str, object]:
    """The record's metrics with these in place of those of the same names."""
    old_finite = {k: v for k, v in record.metrics.items() if k not in odd}
    old_odd = {k: v for k, v in record.odd_metrics.items() if k not in finite}
    return {"metrics": {**old_finite, **finite}, "odd_metrics": {**old_odd, **odd}}


def require(records: Iterable[Record], id: str, address: str) -> Record:
    """The record with this id. Raises CheckpointNotFound if another process removed it."""
    for record in records:
        if record.id == id:
            return record
    raise CheckpointNotFound(f"the checkpoint {id:.12} of {address} was removed meanwhile")


def with_tag(record: Record, add: bool, name: str) -> Record:
    """The record with the tag `name`, or without it."""
    tags = tuple(tag for tag in record.tags if tag != name) + ((name,) if add else ())
    return record if tags == record.tags else msgspec.structs.replace(record, tags=tags)
