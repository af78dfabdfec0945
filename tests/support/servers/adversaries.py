"""Servers that promise conditional writes and do not keep them: nobody may write to these."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.servers.process import node_program, running
from tests.support.servers.service import Service


@contextmanager
def s3rver(folder: Path) -> Iterator[Service]:
    """s3rver (npm), which keeps its objects in `folder` and knows no conditions at all."""
    with running(
        [
            *node_program("s3rver/bin/s3rver.js"),
            *("--address", "127.0.0.1", "--port", "0", "--directory", folder),
            *("--silent", "--allow-mismatched-signatures", "--no-vhost-buckets"),
            *("--configure-bucket", "bucket"),
        ],
        announces=r"listening on 127\.0\.0\.1:(\d+)",
    ) as url:
        yield Service(
            "s3",
            url,
            {"AWS_ACCESS_KEY_ID": "S3RVER", "AWS_SECRET_ACCESS_KEY": "S3RVER"},
            parameters={"region": "us-east-1"},
        )


@contextmanager
def gcp_emulator() -> Iterator[Service]:
    """gcp-storage-emulator, which ignores preconditions.

    It also answers uploads without an ETag and knows neither HEAD nor listings of the XML API,
    so that obstore reports an error where the server has already stored the object.
    """
    with running([sys.executable, "-m", __name__], announces=r"listens on (\d+)") as url:
        yield Service("gs", url, {"GOOGLE_BEARER_TOKEN": "tests"})


def main() -> None:
    """gcp-storage-emulator at a port that the system chose: its command line cannot say which."""
    import logging
    from functools import partial
    from http.server import ThreadingHTTPServer

    from gcp_storage_emulator.handlers import buckets
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    logging.disable(logging.CRITICAL)
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket("bucket", storage)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RequestHandler, storage))
    print(f"listens on {server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
