"""Azure on loopback: Azurite, from npm. It honours every condition and checks signatures."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime

from tests.support.servers.process import node_program, running
from tests.support.servers.service import Service, send

ACCOUNT = "holdfast"
KEY = base64.b64encode(b"the key of an account that exists in tests only").decode()
_VERSION = "2021-12-02"


@contextmanager
def azurite() -> Iterator[Service]:
    """Azurite with an account and a container, while the `with` lasts."""
    with running(
        [
            *node_program("azurite/dist/src/blob/main.js"),
            *("--blobHost", "127.0.0.1", "--blobPort", "0"),
            *("--silent", "--skipApiVersionCheck", "--inMemoryPersistence"),
            "--disableTelemetry",  # it reports to its makers unless told not to
        ],
        announces=r"successfully listens on http://127\.0\.0\.1:(\d+)",
        environment={"AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"},
    ) as url:
        service = Service(
            "az",
            f"{url}/{ACCOUNT}",
            {"AZURE_STORAGE_ACCOUNT_KEY": KEY},
            parameters={"account": ACCOUNT},
        )
        create_container(service)
        yield service


def create_container(service: Service) -> None:
    """What no blob client of ours does: signed by hand, as the documentation of Shared Key says."""
    date = format_datetime(datetime.now(UTC), usegmt=True)
    to_sign = "\n".join(
        [
            "PUT",
            *[""] * 11,  # the standard headers, Content-Length among them; Date is x-ms-date
            f"x-ms-date:{date}",
            f"x-ms-version:{_VERSION}",
            f"/{ACCOUNT}/{ACCOUNT}/{service.bucket}",  # twice: the account is in the path too
            "restype:container",
        ]
    )
    digest = hmac.digest(base64.b64decode(KEY), to_sign.encode(), hashlib.sha256)
    send(
        "PUT",
        f"{service.endpoint}/{service.bucket}?restype=container",
        headers={
            "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
            "Content-Type": "",
            "x-ms-date": date,
            "x-ms-version": _VERSION,
        },
    )
