"""From an address and an environment to a client."""

from __future__ import annotations

import base64
import hmac
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from holdfast.core.types import MiB
from holdfast.errors import StoreUnavailable, UsageError
from holdfast.stores import object, object_clients
from holdfast.stores.object_address import parse_object_address
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


# -- Azure's connection string -----------------------------------------------------------

STRING = "DefaultEndpointsProtocol=https;AccountName=lab;AccountKey=c2VzYW1lcw==;EndpointSuffix={}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        (
            STRING.format("core.windows.net"),
            {
                "account_name": "lab",
                "account_key": "c2VzYW1lcw==",
                "endpoint": "https://lab.blob.core.windows.net",
            },
        ),
        (
            "BlobEndpoint=http://127.0.0.1:1/lab;AccountName=lab;SharedAccessSignature=sv=1&sig=a=;",
            {
                "account_name": "lab",
                "sas_key": "sv=1&sig=a=",
                "endpoint": "http://127.0.0.1:1/lab",
            },
        ),
    ],
)
def test_what_a_connection_string_says(text: str, expected: dict[str, str]) -> None:
    assert object_clients._connection_string(text) == expected


def azure_config(monkeypatch: pytest.MonkeyPatch, address: str) -> dict[str, str]:
    for name in list(os.environ):
        if name.startswith("AZURE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", STRING.format("core.chinacloudapi.cn"))
    return object_clients.connect(parse_object_address(address)).small.config


def test_a_connection_string_opens_its_account(monkeypatch: pytest.MonkeyPatch) -> None:
    config = azure_config(monkeypatch, "az://container/run")
    assert (config["account_name"], config["account_key"]) == ("lab", "c2VzYW1lcw==")
    config = azure_config(monkeypatch, "az://container/run?account=lab")
    assert config["endpoint"] == "https://lab.blob.core.chinacloudapi.cn"


def test_a_connection_string_opens_no_other_account(monkeypatch: pytest.MonkeyPatch) -> None:
    config = azure_config(monkeypatch, "az://container/run?account=other")
    assert config["account_name"] == "other"
    assert "account_key" not in config


def test_without_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AZURE_"):
            monkeypatch.delenv(name)
    with pytest.raises(UsageError, match="Account must be specified"):
        open_store("az://container/run").size("a")


def test_a_service_account_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "account.json"
    path.write_text('{"type": "service_account", "private_key": "SESAME"}')
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    with pytest.raises(UsageError, match="private_key_id") as caught:
        open_store("gs://bucket/run").size("a")
    assert "SESAME" not in str(caught.value)


@pytest.mark.slow
def test_azure_by_connection_string(azure: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    key = os.environ["AZURE_STORAGE_ACCOUNT_KEY"]
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    account = azure.service.parameters["account"]
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING",
        f"AccountName={account};AccountKey={key};BlobEndpoint={azure.endpoint};",
    )
    assert open_store(f"az://{azure.service.bucket}/{azure.prefix}").put_new("a", [b"x"])


# -- a service account, a shared access signature ------------------------------------------


def test_a_service_account_of_google(
    gcs: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It signs its own tokens, and nobody is asked for one."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path = tmp_path / "account.json"
    account = {
        "type": "service_account",
        "private_key": key.decode(),
        "private_key_id": "1",
        "client_email": "training@lab.iam.gserviceaccount.com",
        "client_id": "1",
    }
    path.write_text(json.dumps(account))
    monkeypatch.delenv("GOOGLE_BEARER_TOKEN")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    assert open_store(gcs.address).put_new("a", [b"x"])


@pytest.mark.slow
def test_azure_by_shared_access_signature(azure: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    key = os.environ["AZURE_STORAGE_ACCOUNT_KEY"]
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    words = {"sp": "rwdlc", "ss": "b", "srt": "sco", "se": "2100-01-01T00:00:00Z"}
    words["sv"] = "2021-12-02"
    # In Azure's order, with what is left out: begin, addresses, protocols, encryption scope.
    signed = [azure.service.parameters["account"], words["sp"], words["ss"], words["srt"]]
    to_sign = "\n".join([*signed, "", words["se"], "", "", words["sv"], "", ""])
    signature = base64.b64encode(hmac.digest(base64.b64decode(key), to_sign.encode(), "sha256"))
    token = urlencode({**words, "sig": signature.decode()})
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", token)
    assert open_store(azure.address).put_new("a", [b"x"])
    spoiled = token.replace("sig=", "sig=SESAME")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", spoiled)
    with pytest.raises(StoreUnavailable, match="status 403") as caught:
        open_store(azure.address).get("a", max_bytes=9)
    assert "SESAME" not in str(caught.value)
    assert signature.decode()[:12] not in str(caught.value)
