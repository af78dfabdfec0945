"""What a cloud's error means, and that its words hold no secret."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore import exceptions

from holdfast.errors import StoreReadOnly, StoreUnavailable, StoreUnfit
from holdfast.stores.object_errors import Meaning, meaning_of, refusal, status_of, words_of


def said(status: int, code: str, message: str = "Text.") -> str:
    """As obstore words a refusal."""
    return (
        "Generic S3 error: Error performing PUT http://127.0.0.1:9000/bucket/run/log/1?sig=abc in "
        f"2.1ms - Server returned non-2xx status code: {status} Name: "
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code>'
        f"<Message>{message}</Message></Error>"
    )


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (FileNotFoundError("Object at location run/log/1 not found"), Meaning.ABSENT),
        (FileNotFoundError(said(404, "NoSuchKey")), Meaning.ABSENT),
        (FileNotFoundError(said(404, "NoSuchBucket")), Meaning.REFUSED),
        (exceptions.AlreadyExistsError(said(412, "PreconditionFailed")), Meaning.EXISTS),
        (exceptions.PreconditionError(said(412, "PreconditionFailed")), Meaning.EXISTS),
        (exceptions.AlreadyExistsError(said(409, "ConditionalRequestConflict")), Meaning.PASSING),
        (exceptions.GenericError(said(409, "OperationAborted")), Meaning.PASSING),
        (exceptions.GenericError(said(503, "SlowDown")), Meaning.PASSING),
        (exceptions.GenericError(said(500, "InternalError")), Meaning.PASSING),
        (exceptions.GenericError(said(429, "TooManyRequests")), Meaning.PASSING),
        (exceptions.GenericError(said(400, "RequestTimeout")), Meaning.PASSING),
        (exceptions.GenericError(said(400, "XAmzContentSHA256Mismatch")), Meaning.PASSING),
        (exceptions.GenericError(said(400, "BadDigest")), Meaning.PASSING),
        (exceptions.GenericError(said(400, "InvalidArgument")), Meaning.REFUSED),
        (exceptions.GenericError("error sending request: connection closed"), Meaning.PASSING),
        (exceptions.PermissionDeniedError(said(403, "AccessDenied")), Meaning.REFUSED),
        (exceptions.PermissionDeniedError(said(403, "ExpiredToken")), Meaning.REFUSED),
        (exceptions.PermissionDeniedError(said(403, "RequestTimeTooSkewed")), Meaning.REFUSED),
        (exceptions.UnauthenticatedError(said(401, "Unauthorized")), Meaning.REFUSED),
    ],
)
def test_meanings(error: Exception, meaning: Meaning) -> None:
    assert meaning_of(error) is meaning


def test_words() -> None:
    error = exceptions.GenericError(said(503, "SlowDown", "Please reduce your request rate."))
    assert status_of(error) == 503
    assert words_of(error) == "status 503, SlowDown, Please reduce your request rate."
    assert words_of(exceptions.GenericError("")) == "GenericError"
    assert status_of(OSError("status code: none")) is None


def unanswered(inner: str) -> Exception:
    """As obstore words a request that no server has answered."""
    return exceptions.GenericError(
        "Generic S3 error: Error performing PUT https://host/b/a?sig=abc in 2ms - HTTP error: "
        "error sending request\n\nDebug source:\n"
        f"uri: Some(https://host/b/a?sig=abc),\ninner: {inner}"
    )


@pytest.mark.parametrize(
    ("inner", "words", "meaning"),
    [
        ('Os { code: 111, message: "Connection refused" }', "Connection refused", Meaning.PASSING),
        ('Custom { error: "failed to lookup" }', "failed to lookup", Meaning.PASSING),
        ("InvalidCertificate(\n    UnknownIssuer,\n)", "UnknownIssuer", Meaning.REFUSED),
        ("InvalidCertificate(Other(OtherError(CaUsed)))", "CaUsed", Meaning.REFUSED),
        ("InvalidMessage(InvalidContentType)", "error sending request", Meaning.REFUSED),
        ('message: "see https://host/b?sig=abc now"', "see (address)", Meaning.PASSING),
    ],
)
def test_why_there_was_no_answer(inner: str, words: str, meaning: Meaning) -> None:
    error = unanswered(inner)
    assert meaning_of(error) is meaning
    assert words in words_of(error)
    assert "sig=" not in words_of(error)


@pytest.mark.parametrize(
    "body",
    [
        "Client sent an HTTP request to an HTTPS server.\n",
        "<title>400 The plain HTTP request was sent to HTTPS port</title>",
    ],
)
def test_a_server_that_wants_tls(body: str) -> None:
    error = exceptions.GenericError(f"Server returned non-2xx status code: 400 Bad Request: {body}")
    assert meaning_of(error) is Meaning.REFUSED
    assert "https://" in refusal(error, "write 'a'", "s3://b/r", writing=True).hint


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/api/token",
        "http://169.254.169.254/computeMetadata/v1/instance/service-accounts/default/token?a=b",
        "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2019-08-01",
    ],
)
def test_the_role_of_a_machine_that_has_none(url: str) -> None:
    """Asked again all the same: it is not there yet when a container has just started."""
    error = exceptions.GenericError(
        f"Error performing token request: Error performing GET {url} in 1ms - HTTP error: odd"
    )
    assert meaning_of(error) is Meaning.PASSING
    assert words_of(error).startswith("no credentials: none are in the environment")


@pytest.mark.parametrize(
    ("name", "meaning"),
    [("CredentialsRefused", Meaning.REFUSED), ("CredentialsUnreachable", Meaning.PASSING)],
)
def test_what_our_own_provider_raised(name: str, meaning: Meaning) -> None:
    error = exceptions.UnauthenticatedError(
        "The operation lacked valid authentication credentials for path External AWS credential "
        f"provider: {name}: SSOTokenLoadError, it is over\n\nDebug source: SESAME"
    )
    assert meaning_of(error) is meaning
    assert words_of(error) == "no credentials: SSOTokenLoadError, it is over"
    found = refusal(error, "write 'a'", "s3://b/r", writing=True)
    assert isinstance(found, StoreUnavailable)
    assert "aws s3 ls" in found.hint


def test_what_a_server_says_is_not_taken_for_the_clients_own_words() -> None:
    error = exceptions.GenericError(said(503, "Odd", "InvalidCertificate(UnknownIssuer)"))
    assert meaning_of(error) is Meaning.PASSING


@pytest.mark.parametrize(
    ("code", "writing", "kind", "hint"),
    [
        ("NoSuchBucket", True, StoreUnfit, "Create it"),
        ("RequestTimeTooSkewed", True, StoreUnavailable, "Set this machine's clock"),
        ("ExpiredToken", True, StoreUnavailable, "Renew the credentials"),
        ("AccessDenied", True, StoreReadOnly, "what they allow"),
        ("AccessDenied", False, StoreUnavailable, "what they allow"),
    ],
)
def test_refusals_say_what_to_do(code: str, writing: bool, kind: type, hint: str) -> None:
    error = exceptions.PermissionDeniedError(said(403, code))
    found = refusal(error, "write 'log/1'", "s3://bucket/run", writing=writing)
    assert type(found) is kind
    assert hint in found.hint
    assert "s3://bucket/run" in found.message
    assert "127.0.0.1" not in found.message


FORMS = [
    "Error performing GET {url} in 2.1ms - connection closed",
    "Generic S3 error: Error performing PUT {url} in 10.2s, after 3 retries - timed out",
    "error sending request for url ({url})",
    "cannot parse {url}: relative URL without a base",
    "Server returned non-2xx status code: 403 Forbidden: <Code>AccessDenied</Code>"
    "<Message>You may not ask {url} for this</Message>",
    'status code: 403 {{"error": {{"code": 403, "message": "Not allowed: {url} (see the docs)"}}}}',
    "status code: 403 {url}",
    "{url}\nin a second line {url}",
    "\n{url}",
    "Error performing HEAD\n{url} in 1s - odd",
]


@pytest.mark.parametrize("form", FORMS)
@given(
    secret=st.from_regex(r"[A-Za-z0-9+/=%&_.~-]{12,60}", fullmatch=True),
    url=st.sampled_from(
        [
            "https://account.blob.core.windows.net/c/run?sv=2024&sig={}",
            "http://AKIA:{}@host:9000/bucket",
            "https://host/bucket/run/log/1?X-Amz-Credential={}&X-Amz-Signature=0",
            "HTTPS://HOST/b?SIG={}",
            "x_https://host/b?sig={}",
        ]
    ),
)
def test_no_secret_in_a_url_comes_through(form: str, url: str, secret: str) -> None:
    error = exceptions.GenericError(form.format(url=url.format(secret)))
    found = refusal(error, "write 'log/1'", "s3://bucket/run", writing=True)
    for words in (words_of(error), str(found), found.hint):
        assert secret not in words
        assert secret[:12] not in words
        assert "host" not in words.lower().replace("hostname", "")
