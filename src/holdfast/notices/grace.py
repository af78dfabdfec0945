"""For how long this process may live after a signal, if anybody said so."""

from __future__ import annotations

import math
import os

from holdfast.core.units import parse_duration
from holdfast.errors import UsageError


def grace_s(grace: float | str | None) -> float | None:
    """`grace=` in seconds; else what the variable HOLDFAST_GRACE says, as "45s" or "45".

    >>> grace_s("2min"), grace_s(45)
    (120.0, 45.0)
    """
    said = "grace"
    if grace is None:
        grace, said = os.environ.get("HOLDFAST_GRACE", "").strip() or None, "HOLDFAST_GRACE"
    if grace is None:
        return None
    try:
        seconds = float(grace)
    except ValueError:
        try:
            seconds = parse_duration(str(grace))
        except ValueError as error:
            raise UsageError(f"{said}: {error}", hint='Write grace="45s".') from None
    if not math.isfinite(seconds) or seconds <= 0:
        raise UsageError(f"{said}={grace!r} is not above 0", hint='Write grace="45s".')
    return seconds
