"""Times as notices have them, as Unix time."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


def from_iso(text: str) -> float | None:
    """None if it is no time of ISO 8601. In UTC if it names no zone.

    >>> from_iso("1970-01-01T00:01:00Z"), from_iso("soon")
    (60.0, None)
    """
    try:
        return _unix(datetime.fromisoformat(text.strip()))
    except ValueError:
        return None


def from_http(text: str) -> float | None:
    """None if it is no date of RFC 1123.

    >>> from_http("Thu, 01 Jan 1970 00:01:00 GMT"), from_http("")
    (60.0, None)
    """
    try:
        return _unix(parsedate_to_datetime(text))
    except (ValueError, TypeError):
        return None


def _unix(moment: datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
