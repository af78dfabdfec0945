"""Addresses of buckets: what is accepted, and that no secret is repeated."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import BadAddress
from holdfast.stores.object_address import parse_object_address

GOOD = [
    "s3://bucket",
    "s3://bucket/run",
    "s3://bucket/exp/gpt-2/run_1",
    "s3://my.bucket-1/lr=0.1,seed=3",
    "s3://bucket/run?region=eu-west-1",
    "s3://bucket/run?endpoint=http://127.0.0.1:9000&region=us-east-1",
    "s3://bucket/run?endpoint=http://[::1]:9000",
    "s3://bucket/run?virtual_hosted=true",
    "gs://bucket/run",
    "gs://bucket/run?endpoint=https://gcs.example",
    "az://container/run?account=devstoreaccount1",
    "az://container/run?account=a&endpoint=http://127.0.0.1:10000/a",
]

BAD = [
    "s3://",
    "s3:///run",
    "s3://x",
    "s3://-bucket/run",
    "s3://bucket_/run",
    "s3://bu cket/run",
    "s3://bucket/../run",
    "s3://bucket/./run",
    "s3://bucket/.hidden",
    "s3://bucket/a b",
    "s3://bucket/a%20b",
    "s3://bucket/a\\b",
    "s3://bucket/run#fragment",
    "s3://bucket/run?region",
    "s3://bucket/run?region=a&region=b",
    "s3://bucket/run?account=a",
    "s3://bucket/run?endpoint=",
    "s3://bucket/run?endpoint=127.0.0.1:9000",
    "s3://bucket/run?endpoint=ftp://host",
    "s3://bucket/run?endpoint=http://",
    "s3://bucket/run?endpoint=http://host:port",
    "s3://bucket/run?endpoint=http://[::1",
    "gs://bucket/run?region=a",
    "az://container/run?virtual_hosted=true",
    "s3://[::1/run",
]


@pytest.mark.parametrize("address", GOOD)
def test_good_ones(address: str) -> None:
    found = parse_object_address(address)
    assert found.text == address
    assert f"{found.scheme}://{found.bucket}/{found.prefix}".rstrip("/") == address.split("?")[0]


@pytest.mark.parametrize(
    ("written", "one_form"),
    [
        ("S3://bucket/run/", "s3://bucket/run"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/run?", "s3://bucket/run"),
        ("s3://bucket//run", "s3://bucket/run"),
        (
            "s3://bucket/run/?region=us-east-1&endpoint=http%3A%2F%2Fhost%3A9000",
            "s3://bucket/run?endpoint=http://host:9000&region=us-east-1",
        ),
    ],
)
def test_each_has_one_form(written: str, one_form: str) -> None:
    assert parse_object_address(written).text == one_form


@pytest.mark.parametrize("address", BAD)
def test_bad_ones(address: str) -> None:
    with pytest.raises(BadAddress) as caught:
        parse_object_address(address)
    assert caught.value.hint


@given(
    scheme=st.sampled_from(["s3", "gs", "az"]),
    host=st.from_regex(r"[a-z]{1,8}(:[0-9]{1,4})?", fullmatch=True),
    path=st.text(max_size=10),
    option=st.text(max_size=10),
)
def test_the_one_form_means_the_same(scheme: str, host: str, path: str, option: str) -> None:
    """Whatever is written in it, percent-encoded: it is stored in forks and read again."""
    from urllib.parse import urlencode

    name = {"s3": "region", "gs": "", "az": "account"}[scheme]
    options = {"endpoint": f"https://{host}/{path}", **({name: option} if name else {})}
    try:
        found = parse_object_address(f"{scheme}://bucket/run?{urlencode(options)}")
    except BadAddress:
        return
    assert parse_object_address(found.text) == found
    assert found.options == options


SECRETS = [
    "s3://AKIAKEY:{}@bucket/run",
    "s3://{}@bucket/run",
    "s3://AKIAKEY:{}/x@bucket/run",
    "s3://AKIAKEY:{}?x@bucket/run",
    "s3://AKIAKEY:{}#x@bucket/run",
    "s3://AKIAKEY:{}@[bucket/run",
    "s3://AKIAKEY:{}@/run",
    "s3://AKIAKEY:{}/bucket/run",
    "s3://bucket/run?aws_secret_access_key={}",
    "s3://bucket/run?region=a&X-Amz-Signature={}",
    "s3://bucket/run?region=a&region=b&token={}",
    "s3://bucket/run?{}",
    "s3://bucket/run#{}",
    "s3://bucket/run?endpoint=http://user:{}@host",
    "s3://bucket/run?endpoint=http://host?sig={}",
    "s3://bucket/run?endpoint=http://host%23{}",
    "s3://bucket/run?endpoint=http://{}@[host",
    "az://container/run?sv=2024&sig={}",
    "az://container/run?account=a&endpoint=https://a.blob.core.windows.net?sig={}",
    "gs://bucket/run?token={}",
]


@pytest.mark.parametrize("form", SECRETS)
@given(secret=st.from_regex(r"A[A-Za-z0-9+/=%_.~-]{11,39}", fullmatch=True))
def test_secrets_are_refused_and_not_repeated(form: str, secret: str) -> None:
    with pytest.raises(BadAddress) as caught:
        parse_object_address(form.format(secret))
    said = f"{caught.value.message} {caught.value.hint} {caught.value!r}"
    assert longest_common(secret, said) < 8
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def longest_common(secret: str, said: str) -> int:
    """How many characters of `secret` in a row are in `said`."""
    return max(
        (
            length
            for start in range(len(secret))
            for length in range(1, len(secret) - start + 1)
            if secret[start : start + length] in said
        ),
        default=0,
    )
