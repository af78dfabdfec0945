"""What a user says about a run's mirror."""

from __future__ import annotations

import os
from dataclasses import dataclass

from holdfast.core.retention import KeepPolicy, parse_keep
from holdfast.core.units import parse_duration, parse_size
from holdfast.errors import UsageError
from holdfast.stores.addresses import real_address
from holdfast.stores.open import open_store


@dataclass(frozen=True)
class MirrorOptions:
    """What the user asked for."""

    address: str
    keep: KeepPolicy
    """Which checkpoints stay there."""
    bytes_per_s: int | None = None
    wait_s: float = 300.0
    """For how long `close` copies what is not there yet."""


def mirror_options(
    address: str,
    keep: KeepPolicy,
    mirror: str | os.PathLike[str] | None,
    mirror_keep: str | None,
    mirror_bandwidth: int | str | None,
    mirror_wait: float | str | None,
) -> MirrorOptions | None:
    """The arguments of a manager, checked; None without a mirror. Raises UsageError.

    >>> from holdfast.core.retention import parse_keep
    >>> options = mirror_options("a", parse_keep("last=3"), "b", None, "200MB/s", None)
    >>> str(options.keep), options.bytes_per_s
    ('last=3', 200000000)
    """
    if mirror is None:
        for name, value in (
            ("mirror_keep", mirror_keep),
            ("mirror_bandwidth", mirror_bandwidth),
            ("mirror_wait", mirror_wait),
        ):
            if value is not None:
                raise UsageError(
                    f"{name}={value!r} is about a mirror, and there is none",
                    hint='Give mirror="s3://bucket/run", or leave it out.',
                )
        return None
    where = os.fspath(mirror)
    if real_address(open_store(where).address) == real_address(open_store(address).address):
        raise UsageError(
            f"mirror={where!r} is the run itself", hint="Name a place where the run is not yet."
        )
    return MirrorOptions(
        address=where,
        keep=keep if mirror_keep is None else parse_keep(mirror_keep),
        bytes_per_s=None if mirror_bandwidth is None else _bandwidth(mirror_bandwidth),
        wait_s=MirrorOptions.wait_s if mirror_wait is None else _seconds(mirror_wait),
    )


def _bandwidth(value: int | str) -> int:
    try:
        number = parse_size(value.removesuffix("/s")) if isinstance(value, str) else value
    except ValueError as error:
        raise UsageError(f"mirror_bandwidth: {error}", hint='E.g. "200MB/s".') from None
    if isinstance(number, bool) or number < 1:
        raise UsageError(
            f"mirror_bandwidth={value!r} is no number of bytes per second", hint='E.g. "200MB/s".'
        )
    return number


def _seconds(value: float | str) -> float:
    try:
        seconds = parse_duration(value) if isinstance(value, str) else float(value)
    except ValueError as error:
        raise UsageError(f"mirror_wait: {error}", hint='E.g. "5min", or 0.') from None
    if not seconds >= 0:
        raise UsageError(f"mirror_wait={value!r} is no duration", hint='E.g. "5min", or 0.')
    return seconds
