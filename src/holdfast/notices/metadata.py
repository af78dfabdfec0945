"""Requests to the metadata service of a cloud's machine. Needed by pollers only."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

TIMEOUT_S = 1.0
"""The service is on the same host: what takes longer does not come."""

_MAX_BYTES = 1 << 16


class Unanswered(Exception):
    """No answer, or none that can be what was asked for: to be asked again."""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    text: str
    etag: str = ""


def request(
    endpoint: str,
    path: str,
    headers: Mapping[str, str],
    *,
    method: str = "GET",
    timeout_s: float = TIMEOUT_S,
) -> Answer:
    """Ask the service at `endpoint`, waiting at most `TIMEOUT_S` for the connection and
    `timeout_s` for each piece of the answer. Raises Unanswered, also for a status of 5xx."""
    try:
        # Not urllib: it goes through the proxy of the environment, and follows redirections.
        place = urlsplit(endpoint)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=TIMEOUT_S)
        try:
            connection.connect()
            connection.sock.settimeout(timeout_s)
            connection.request(method, place.path.rstrip("/") + path, headers=dict(headers))
            reply = connection.getresponse()
            body = reply.read(_MAX_BYTES + 1)
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unanswered(f"{endpoint}: {error or type(error).__name__}") from None
    if reply.status >= 500:
        raise Unanswered(f"{endpoint}: HTTP {reply.status} for {path}")
    if len(body) > _MAX_BYTES:
        raise Unanswered(f"{endpoint}: more than {_MAX_BYTES:,} bytes for {path}")
    return Answer(reply.status, body.decode("utf-8", "replace"), reply.getheader("ETag", ""))
