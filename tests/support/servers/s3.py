"""S3 on loopback: moto in a process of its own. Starts in 0.3 s, some 450 small puts a second.

It honours `If-None-Match: *`, keeps objects in memory (large ones in temporary files), lists
ten keys to a page, and checks neither signatures nor checksums.
"""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.servers.process import running
from tests.support.servers.service import Service, send

PAGE = 10
"""Keys to a page of a listing; a real S3 gives 1000."""


@contextmanager
def moto() -> Iterator[Service]:
    """moto's S3 with a bucket, while the `with` lasts."""
    with running(
        [sys.executable, "-m", __name__],
        announces=r"listens on (\d+)",
        environment={"MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE)},
    ) as url:
        service = Service(
            "s3",
            url,
            {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "not-a-secret"},
            parameters={"region": "us-east-1"},
        )
        send("PUT", f"{url}/{service.bucket}", headers=SIGNED_FOR_S3)
        yield service


# moto serves all of AWS at one port, and knows by this which part is meant.
SIGNED_FOR_S3 = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=tests/20200101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
}


# -- in the server's process --------------------------------------------------------------


class OneAtATime:
    """A WSGI application whose requests run one after the other.

    moto looks whether a key exists and then stores it, so that of two threads both could be
    the first. Bodies are read before a request's turn comes: a slow client holds up nobody.
    """

    def __init__(self, application: Any) -> None:
        self._application = application
        self._turn = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if "CONTENT_LENGTH" in environ:
            length = int(environ["CONTENT_LENGTH"] or 0)
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        with self._turn:
            return list(self._application(environ, start_response))


def main() -> None:
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = make_server(
        "127.0.0.1",
        0,
        OneAtATime(DomainDispatcherApplication(create_backend_app)),
        threaded=True,
        request_handler=MotoRequestHandler,
    )
    print(f"listens on {server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
