"""How a test names and reaches what a server keeps."""

from __future__ import annotations

import itertools
import os
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from obstore.store import AzureStore, GCSStore, S3Store

# What the machine's owner has set must not reach a test, and no proxy stands before loopback.
_FOREIGN = ("AWS_", "GOOGLE_", "AZURE_", "AZURITE_", "S3RVER_")
_PROXIES = frozenset({"http_proxy", "https_proxy", "all_proxy"})

_numbers = itertools.count()


@dataclass(frozen=True)
class Service:
    """A server that runs, and a bucket in it."""

    scheme: str
    """`s3`, `gs` or `az`."""
    endpoint: str
    """`http://127.0.0.1:PORT`, with the account's path for Azure."""
    credentials: Mapping[str, str]
    """Environment variables that open it."""
    bucket: str = "bucket"
    parameters: Mapping[str, str] = field(default_factory=dict)
    """What an address says besides the endpoint: `region`, `account`."""
    checks_digests: bool = False
    """It refuses what arrives changed, as S3 does."""

    def environment(self) -> dict[str, str | None]:
        """Changes to the environment of a process that uses it; None: to be removed."""
        changes: dict[str, str | None] = {
            name: None
            for name in os.environ
            if name.startswith(_FOREIGN) or name.lower() in _PROXIES
        }
        return {**changes, **self.credentials}

    def place(self) -> Place:
        """A prefix that nothing else uses."""
        return Place(self, f"test{os.getpid()}-{next(_numbers)}", self.endpoint)


@dataclass(frozen=True)
class Place:
    """Where one test keeps its objects."""

    service: Service
    prefix: str
    endpoint: str

    @property
    def address(self) -> str:
        """What `open_store` takes, e.g. `s3://bucket/test1?endpoint=http://…&region=…`."""
        query = {"endpoint": self.endpoint, **self.service.parameters}
        encoded = urllib.parse.urlencode(query, safe=":/")
        return f"{self.service.scheme}://{self.service.bucket}/{self.prefix}?{encoded}"

    def through(self, url: str) -> Place:
        """The same place, reached by way of `url`, which is a proxy's."""
        path = urllib.parse.urlsplit(self.service.endpoint).path
        return replace(self, endpoint=url + path)

    def client(self, **options: Any) -> S3Store | GCSStore | AzureStore:
        """A client of its own, without retries unless `options` say otherwise.

        Reads the credentials from the environment, as Holdfast does.
        """
        given: dict[str, Any] = {
            "prefix": self.prefix,
            "client_options": {"allow_http": True},
            "retry_config": {"max_retries": 0},
            **options,
        }
        match self.service.scheme:
            case "s3":
                region = self.service.parameters["region"]
                return S3Store(self.service.bucket, endpoint=self.endpoint, region=region, **given)
            case "gs":
                return GCSStore(self.service.bucket, base_url=self.endpoint, **given)
            case _:
                account = self.service.parameters["account"]
                return AzureStore(
                    self.service.bucket, endpoint=self.endpoint, account_name=account, **given
                )


def send(
    method: str, url: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> bytes:
    """One plain request of a fixture; the body of the answer. Raises HTTPError."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, body, {**(headers or {})}, method=method)
    with opener.open(request, timeout=60) as answer:
        return answer.read()
