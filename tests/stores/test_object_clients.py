"""From an address and an environment to a client."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.core.types import MiB
from holdfast.errors import StoreUnavailable, UsageError
from holdfast.stores import object, object_clients
from holdfast.stores.object_address import parse_object_address
from holdfast.stores.object_clients import connect
from holdfast.stores.open import open_store
from holdfast.stores.retrying import Retry
from tests.support.servers.faults import delayed
from tests.support.servers.proxy import FaultProxy
from tests.support.servers.service import Place


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
def test_the_address_wins_over_the_environment(
    s3: Place, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert open_store(s3.address).put_new("a", [b"x"])


def test_the_environment_says_what_the_address_does_not(
    s3: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    store = open_store(f"s3://{s3.service.bucket}/{s3.prefix}")
    assert store.put_new("a", [b"x"])
    assert open_store(s3.address).get("a", max_bytes=1) == b"x"


@pytest.fixture
def profile(s3: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials in a shared file alone, instead of those that `s3` has set."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "credentials"
    path.write_text("[training]\naws_access_key_id = AKIA\naws_secret_access_key = hidden\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "training")


@pytest.mark.usefixtures("profile")
def test_credentials_of_a_profile(s3: Place) -> None:
    clients = connect(parse_object_address(s3.address))
    found = clients.small.credential_provider()
    assert (found["access_key_id"], found["secret_access_key"]) == ("AKIA", "hidden")
    assert open_store(s3.address).put_new("a", [b"x"])


@pytest.mark.usefixtures("profile")
def test_a_profile_without_what_reads_it(s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("boto3", "botocore", "obstore.auth.boto3"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match="boto3, which reads those, is not installed") as caught:
        open_store(s3.address).size("a")
    assert "pip install boto3" in caught.value.hint


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs"), ("az", "azure")])
def test_without_the_package(monkeypatch: pytest.MonkeyPatch, scheme: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    store = open_store(f"{scheme}://bucket/run")
    with pytest.raises(UsageError, match="needs the package obstore") as caught:
        store.size("a")
    assert f"pip install 'holdfast[{extra}]'" in caught.value.hint


def test_a_pack_of_a_folder_has_the_time_that_its_size_needs(
    s3: Place,
    faulty: Callable[[Place], tuple[Place, FaultProxy]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GiB in one request takes longer than what a bucket's own packs get, if the link is slow."""
    monkeypatch.setattr(object_clients, "_LARGE_S", 1)
    monkeypatch.setattr(object_clients, "IN_MEMORY_BYTES", 2 * MiB)
    place, proxy = faulty(s3)
    store = object.ObjectStore(place.address, retry=Retry(deadline_s=0))
    rule = proxy.fail(delayed(2), method="PUT", times=None)
    with pytest.raises(StoreUnavailable):
        store.put_new("own", [bytes(2 * MiB)])
    assert store.put_new("copied", [bytes(2 * MiB + 1)])
    assert rule.met == 2
