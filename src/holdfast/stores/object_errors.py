"""What a cloud's error means to a store, in words that hold no secret.

The client gives text: a URL (with a signature in it, where a token is part of the URL), the
status, and the server's own document. Only the status and the server's code and message are
passed on.
"""

from __future__ import annotations

import re
from enum import Enum

from holdfast.errors import StoreError, StoreReadOnly, StoreUnavailable, StoreUnfit

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(
    r"<Code>([\w.-]{1,80})</Code>|\"code\":\s*\"?([\w.-]{1,80})|ErrorCode:(\w{1,80})"
)
_MESSAGE = re.compile(r"<Message>([^<]{1,300})|\"message\":\s*\"([^\"]{1,300})")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s<\"]+", re.IGNORECASE)
_OURS = re.compile(r"External AWS credential provider: Credentials(?:Refused|Unreachable): (.*)")
# Where the machine's role is asked for when nothing else is given.
_ROLE = re.compile(r"https?://\S+(/latest/api/token|/computeMetadata/|/metadata/identity/)")
_DOING = re.compile(r"Error performing \w+(?: request)? .*? in [\d.]+\S+ - ")
# Why there was no answer: the client's own words stand at the bottom of what it tells.
_WHY = re.compile(
    r"(?:message|error): \"([^\"]{1,120})\""
    r"|InvalidCertificate\(\s*(?:Other\(\s*OtherError\(\s*)?(\w{1,60})"
)
_LONGEST = 300

_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "specified bucket does not exist")
_EXPIRED = ("ExpiredToken", "TokenRefreshRequired", "RequestExpired", "AuthenticationFailed")
_CLOCK = ("RequestTimeTooSkewed",)
# A handshake that failed will fail again.
_UNTRUSTED = "InvalidCertificate("
_NOT_TLS = "InvalidContentType"
# What Go's servers, MinIO for one, and nginx say to plain HTTP.
_TLS_ONLY = ("HTTP request to an HTTPS server", "plain HTTP request was sent to HTTPS port")
_CERTIFICATES = {
    "UnknownIssuer": "If its authority is your own, let SSL_CERT_FILE, or for S3 AWS_CA_BUNDLE, "
    "name the file with that authority's certificate.",
    "CaUsedAsEndEntity": "It is an authority's own certificate: make one that it has signed, "
    "with `CA:FALSE`, for the server.",
    "NotValidForName": "Use a name in the endpoint that the certificate has, or one that has it.",
    "Expired": "Renew it on the server, or set this machine's clock.",
    "NotValidYet": "Set this machine's clock.",
}
# What our own providers of credentials raised.
_PROVIDER = "External AWS credential provider: "
# What obstore says of a server that leaves out of its answers what it needs.
_STRANGE = ("Header missing", "non-partial response", "Unable to parse")
# Turned away for the moment, under statuses that otherwise mean a mistake.
_PASSING_CODES = (
    *("SlowDown", "RequestTimeout", "ConditionalRequestConflict", "OperationAborted"),
    *("XAmzContentSHA256Mismatch", "BadDigest"),  # it arrived changed, and was not stored
)
_PASSING_STATUSES = {408, 409, 425, 429}


_TOO_SHORT = ("Wanted range starting at", "Failed to parse value for CONTENT_RANGE")
"""The client's own words where a server answers a read behind an object's end with something
else than a refusal, as Azurite does: asking again brings the same."""


class Meaning(Enum):
    """What became of a request."""

    ABSENT = 1
    """There is no such object."""
    EXISTS = 2
    """There is one already: nothing was written."""
    PASSING = 3
    """Nobody knows; asking again may help."""
    REFUSED = 4
    """It was not done, and asking again is of no use."""


def meaning_of(error: BaseException) -> Meaning:
    """Of an error that obstore raised."""
    text, kind = str(error), type(error).__name__
    if any(word in text for word in _PASSING_CODES):
        return Meaning.PASSING
    if any(word in text for word in (*_NO_BUCKET, *_EXPIRED, *_CLOCK, *_STRANGE)):
        return Meaning.REFUSED
    if _PROVIDER in text:
        return Meaning.REFUSED if "CredentialsRefused" in text else Meaning.PASSING
    if _unanswered(error) and (_UNTRUSTED in text or _NOT_TLS in text):
        return Meaning.REFUSED
    if isinstance(error, FileNotFoundError):
        return Meaning.ABSENT
    if any(words in text for words in _TOO_SHORT):
        return Meaning.REFUSED
    if kind in ("AlreadyExistsError", "PreconditionError"):
        return Meaning.EXISTS
    if kind in ("PermissionDeniedError", "UnauthenticatedError"):
        return Meaning.REFUSED
    status = status_of(error)
    if status is not None and 400 <= status < 500 and status not in _PASSING_STATUSES:
        return Meaning.REFUSED
    return Meaning.PASSING


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an error of obstore's; None if there was no answer."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def _unanswered(error: BaseException) -> bool:
    """Whether what the error tells is the client's own, since no server has said a word."""
    return status_of(error) is None


def _why(error: BaseException) -> str:
    """Why there was no answer; "" if that is not known."""
    found = _WHY.findall(_URL.sub("(address)", str(error))) if _unanswered(error) else []
    return next(filter(None, found[-1])) if found else ""


def words_of(error: BaseException) -> str:
    """What is told of an error: what the server said, or why there was no answer.

    >>> words_of(OSError("Generic S3 error: Error performing GET http://h/b?sig=xyz in 2.1ms - "
    ...                  "Server returned non-2xx status code: 503 Slow: <Code>SlowDown</Code>"))
    'status 503, SlowDown'
    """
    if found := _OURS.search(str(error)):
        return f"no credentials: {_URL.sub('(address)', found[1])}"[:_LONGEST]
    text = _URL.sub("(address)", str(error))
    status, code, message = status_of(error), _CODE.search(text), _MESSAGE.search(text)
    parts: list[str] = [] if status is None else [f"status {status}"]
    parts += [next(filter(None, found.groups())) for found in (code, message) if found]
    if not parts:
        line = _DOING.sub("", text.partition("\n")[0])
        parts = [part for part in (line or type(error).__name__, _why(error)) if part]
    if _ROLE.search(str(error).partition("\n")[0]):
        parts.insert(0, "no credentials: none are in the environment, and the machine gave none")
    return ", ".join(parts)[:_LONGEST]


def refusal(error: BaseException, what: str, address: str, *, writing: bool) -> StoreError:
    """The error of ours for a request that was refused."""
    text, kind = str(error), type(error).__name__
    said = f"cannot {what} in {address}: {words_of(error)}"
    if any(word in text for word in _NO_BUCKET):
        return StoreUnfit(
            f"cannot {what}: the bucket or container of {address} does not exist",
            hint="Create it, or mend the address: Holdfast makes none.",
        )
    if any(word in text for word in _STRANGE):
        return StoreUnfit(
            f"{said}: its server does not answer as the cloud does",
            hint="Use another server, or a local folder.",
        )
    if _PROVIDER in text:
        return StoreUnavailable(said, hint="Renew the credentials: try `aws s3 ls`.")
    if _unanswered(error) and _UNTRUSTED in text:
        hints = (hint for kind, hint in _CERTIFICATES.items() if _why(error).startswith(kind))
        return StoreUnavailable(
            f"cannot {what} in {address}: its server's certificate is not trusted ({_why(error)})",
            hint=next(hints, "Mend the certificate on the server."),
        )
    if _unanswered(error) and _NOT_TLS in text:
        return StoreUnavailable(
            f"cannot {what} in {address}: its server does not speak TLS",
            hint="Write http:// in the endpoint if the server has no certificate.",
        )
    if any(word in text for word in _TLS_ONLY):
        return StoreUnavailable(said, hint="Write https:// in the endpoint.")
    if any(word in text for word in _CLOCK):
        return StoreUnavailable(said, hint="Set this machine's clock: the server's is another.")
    if any(word in text for word in _EXPIRED):
        return StoreUnavailable(said, hint="Renew the credentials in this program's environment.")
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or status_of(error) in (401, 403):
        hint = "Check the credentials in this program's environment and what they allow."
        return StoreReadOnly(said, hint=hint) if writing else StoreUnavailable(said, hint=hint)
    return StoreUnavailable(said)
