"""Servers behind HTTPS whose certificates only some trust, as on premises."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trustme

import holdfast
from holdfast.errors import StoreUnavailable, UsageError
from holdfast.stores.object import ObjectStore
from holdfast.stores.open import open_store
from holdfast.stores.retrying import Retry
from tests.support.servers.service import Place
from tests.support.servers.tls import tls_before


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def bundle(authority: trustme.CA, tmp_path: Path) -> Path:
    """The authority's certificate, in a file."""
    path = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


@pytest.fixture(params=["s3", "gcs", pytest.param("azure", marks=pytest.mark.slow)])
def place(
    request: pytest.FixtureRequest, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """A place behind HTTPS; nothing in the environment says whom to trust."""
    plain: Place = request.getfixturevalue(request.param)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    with tls_before(plain.endpoint, authority.issue_cert("127.0.0.1")) as url:
        yield plain.through(url)


def own_variable(place: Place) -> str:
    """The variable that the cloud's own tools read."""
    return "AWS_CA_BUNDLE" if place.service.scheme == "s3" else "REQUESTS_CA_BUNDLE"


def never_again() -> Retry:
    """Fails a test in which something is tried twice."""

    def sleep(seconds: float) -> None:
        raise AssertionError(f"tried again after {seconds} s")

    return Retry(sleep=sleep)


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "its own"])
def test_an_authority_of_ones_own(
    place: Place, bundle: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(own_variable(place) if variable == "its own" else variable, str(bundle))
    with holdfast.CheckpointManager(place.address) as ckpts:
        ckpts.save(1, {"answer": 42}).result()
        assert ckpts.load(1) == {"answer": 42}


def test_a_folder_of_authorities(
    place: Place, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trustme.CA().cert_pem.write_to_path(str(bundle.with_name("another.pem")))
    monkeypatch.setenv(own_variable(place), str(bundle.parent))
    assert open_store(place.address).put_new("a", [b"x"])


def test_an_unknown_authority_is_told_at_once(place: Place) -> None:
    store = ObjectStore(place.address, retry=never_again())
    with pytest.raises(StoreUnavailable, match=r"is not trusted \(UnknownIssuer\)") as caught:
        store.put_new("a", [b"x"])
    assert "SSL_CERT_FILE" in caught.value.hint
    assert "AWS_CA_BUNDLE" in caught.value.hint


@pytest.mark.parametrize(
    ("leaf", "words", "hint"),
    [
        ({"not_after": datetime(2020, 1, 1, tzinfo=UTC)}, "Expired", "Renew it"),
        ({"identities": ["storage.example"]}, "NotValidForName", "Use a name in the endpoint"),
    ],
)
def test_certificates_that_are_wrong(
    s3: Place,
    authority: trustme.CA,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    leaf: dict,
    words: str,
    hint: str,
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
    identities = leaf.pop("identities", ["127.0.0.1"])
    with tls_before(s3.endpoint, authority.issue_cert(*identities, **leaf)) as url:
        store = ObjectStore(s3.through(url).address, retry=never_again())
        with pytest.raises(StoreUnavailable, match=rf"is not trusted \({words}") as caught:
            store.size("a")
    assert hint in caught.value.hint


def test_an_authority_that_poses_as_a_server(
    s3: Place, authority: trustme.CA, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `openssl req -x509` makes, and many use: even named in a bundle it is refused."""
    monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
    alone = trustme.LeafCert(
        authority.private_key_pem.bytes(), authority.cert_pem.bytes(), chain_to_ca=[]
    )
    with tls_before(s3.endpoint, alone) as url:
        store = ObjectStore(s3.through(url).address, retry=never_again())
        with pytest.raises(StoreUnavailable, match="CaUsedAsEndEntity") as caught:
            store.size("a")
    assert "CA:FALSE" in caught.value.hint


def test_a_server_without_tls(s3: Place) -> None:
    store = ObjectStore(
        s3.address.replace("endpoint=http:", "endpoint=https:"), retry=never_again()
    )
    with pytest.raises(StoreUnavailable, match="does not speak TLS") as caught:
        store.size("a")
    assert "http://" in caught.value.hint


@pytest.mark.parametrize("content", [None, b"", b"no certificate", b"-----BEGIN CERTIFICATE-----"])
def test_a_bundle_that_is_none(
    s3: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    path = tmp_path / "bundle.pem"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(path))
    with pytest.raises(UsageError) as caught:
        open_store(s3.address).size("a")
    assert "AWS_CA_BUNDLE" in caught.value.hint or "the files that they name" in caught.value.hint
