"""What a fault proxy can do to one exchange. Combine them with `dataclasses.replace`."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum


class Drop(Enum):
    """When the connection is closed on the client."""

    BEFORE = "before the server hears of the request"
    AFTER = "after the server has acted: its reply is lost"
    ON_ITS_WAY = "once all of the request is sent: the server hears of it, and nobody of its reply"


@dataclass(frozen=True)
class Answer:
    """A refusal in the server's place, in the XML that S3, GCS and Azure share."""

    status: int
    code: str
    message: str
    retry_after_s: int | None = None

    def headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/xml", "x-ms-error-code": self.code}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        return headers

    def body(self) -> bytes:
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{self.code}</Code><Message>{self.message}</Message>"
            "<RequestId>4442587FB7D0A2F9</RequestId></Error>"
        ).encode()


@dataclass(frozen=True)
class Fault:
    """What goes wrong; the default is nothing."""

    delay_s: float = 0
    """Before anything else happens."""
    held: threading.Event | None = None
    """The server hears of the request when it is set."""
    drop: Drop | None = None
    answer: Answer | None = None
    """Given instead of asking the server."""
    flip_sent: int | None = None
    """Which byte of the request's body arrives wrong."""
    flip_reply: int | None = None
    """Which byte of the reply's body arrives wrong."""
    keep_bytes: int | None = None
    """How much of the reply's body arrives before the connection is closed."""
    bytes_per_s: float | None = None
    """How fast the reply's body comes."""
    skew_s: float = 0
    """How far the reply's Date is ahead of the time."""


def dropped() -> Fault:
    """The connection is closed, and the server never hears of the request."""
    return Fault(drop=Drop.BEFORE)


def lost_reply() -> Fault:
    """The server acts, and the connection is closed in place of its reply."""
    return Fault(drop=Drop.AFTER)


def delayed(delay_s: float) -> Fault:
    return Fault(delay_s=delay_s)


def held(until: threading.Event) -> Fault:
    """The request arrives, and is answered, when that is set."""
    return Fault(held=until)


def given_up(until: threading.Event) -> Fault:
    """The connection is closed at once, and the server acts on the request when that is set."""
    return Fault(held=until, drop=Drop.ON_ITS_WAY)


def trickled(bytes_per_s: float) -> Fault:
    """The reply's body comes so slowly."""
    return Fault(bytes_per_s=bytes_per_s)


def truncated(keep_bytes: int) -> Fault:
    """The reply names its whole length, and the connection is closed after so many bytes."""
    return Fault(keep_bytes=keep_bytes)


def wrong_reply(byte: int = 0) -> Fault:
    """One byte of the reply's body is another; length and headers are right."""
    return Fault(flip_reply=byte)


def wrong_upload(byte: int = 0) -> Fault:
    """One byte of the request's body reaches the server as another."""
    return Fault(flip_sent=byte)


def skewed_date(skew_s: float) -> Fault:
    """The server's reply, from another time."""
    return Fault(skew_s=skew_s)


def slow_down(retry_after_s: int | None = None) -> Fault:
    """S3's throttling."""
    message = "Please reduce your request rate."
    return Fault(answer=Answer(503, "SlowDown", message, retry_after_s))


def internal_error() -> Fault:
    message = "We encountered an internal error. Please try again."
    return Fault(answer=Answer(500, "InternalError", message))


def expired_token() -> Fault:
    return Fault(answer=Answer(403, "ExpiredToken", "The provided token has expired."))


def clock_skewed(skew_s: float = 3600) -> Fault:
    """S3's refusal of a client whose clock is wrong, by a server `skew_s` ahead of it."""
    message = "The difference between the request time and the current time is too large."
    return Fault(answer=Answer(403, "RequestTimeTooSkewed", message), skew_s=skew_s)


# -- on the bytes of a body ------------------------------------------------------------


def flip(pieces: Iterable[bytes], byte: int) -> Iterator[bytes]:
    """`pieces` with one bit of byte number `byte` turned; shorter bodies stay as they are."""
    at = 0
    for piece in pieces:
        if at <= byte < at + len(piece):
            changed = bytearray(piece)
            changed[byte - at] ^= 1
            yield bytes(changed)
        else:
            yield piece
        at += len(piece)


def first(pieces: Iterable[bytes], nbytes: int) -> Iterator[bytes]:
    """The first `nbytes` of `pieces`."""
    for piece in pieces:
        if nbytes <= 0:
            return
        yield piece[:nbytes]
        nbytes -= len(piece)
