"""Keys for S3 that do not last, from where a container asks for them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

AUTHORIZATION = "the token of a container"
SECRET = "wJalrXUtnFEMI-secret"
SESSION = "IQoJb3JpZ2luX2VjE-session"


class Keys:
    """Another pair at each request: KEY1, KEY2, …"""

    def __init__(self) -> None:
        self.url = ""
        self.given = 0
        self.ends: dict[str, datetime] = {}
        self.lasting_s = 3600.0
        """How long the next is good for."""
        self.answers = True
        """False: it fails with a status that says to come again."""

    def is_over(self, key_id: str) -> bool:
        return datetime.now(UTC) >= self.ends[key_id]

    @property
    def newest(self) -> str:
        return f"KEY{self.given}"


@contextmanager
def keys_for_containers() -> Iterator[Keys]:
    """Runs while the `with` lasts; `AWS_CONTAINER_CREDENTIALS_FULL_URI` names its `url`."""
    keys = Keys()

    class Giver(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not keys.answers or self.headers["Authorization"] != AUTHORIZATION:
                return self.send_error(500 if not keys.answers else 403)
            keys.given += 1
            until = datetime.now(UTC) + timedelta(seconds=keys.lasting_s)
            keys.ends[keys.newest] = until
            body = json.dumps(
                {
                    "AccessKeyId": keys.newest,
                    "SecretAccessKey": SECRET,
                    "Token": SESSION,
                    "Expiration": until.isoformat(),
                }
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Giver) as server:
        keys.url = f"http://127.0.0.1:{server.server_port}/keys"
        serving = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        serving.start()
        try:
            yield keys
        finally:
            server.shutdown()
            serving.join()
