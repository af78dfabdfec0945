"""Keys for S3 that do not last, from where a container and a machine ask for them."""

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
_ROLES = "/latest/meta-data/iam/security-credentials/"


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

    def end(self) -> None:
        """All that were given are over."""
        self.ends = dict.fromkeys(self.ends, datetime.now(UTC))

    def give(self) -> dict[str, str]:
        self.given += 1
        self.ends[self.newest] = datetime.now(UTC) + timedelta(seconds=self.lasting_s)
        return {
            "Code": "Success",
            "AccessKeyId": self.newest,
            "SecretAccessKey": SECRET,
            "Token": SESSION,
            "Expiration": self.ends[self.newest].isoformat(),
        }

    @property
    def newest(self) -> str:
        return f"KEY{self.given}"


@contextmanager
def keys_on_loopback() -> Iterator[Keys]:
    """Runs while the `with` lasts. `AWS_CONTAINER_CREDENTIALS_FULL_URI` names its `url` with
    `/container`, `AWS_EC2_METADATA_SERVICE_ENDPOINT` its `url`: it serves a machine's role, too.
    """
    keys = Keys()

    class Giver(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self._answer("a token" if self.path == "/latest/api/token" else "")

        def do_GET(self) -> None:
            allowed = {"/container": self.headers["Authorization"] == AUTHORIZATION}
            role = self.headers["x-aws-ec2-metadata-token"] == "a token"
            if not keys.answers:
                self.send_error(500)
            elif not allowed.get(self.path, role):
                self.send_error(403)
            elif self.path == _ROLES:
                self._answer("role")
            else:
                self._answer(json.dumps(keys.give()))

        def _answer(self, text: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Giver) as server:
        keys.url = f"http://127.0.0.1:{server.server_port}"
        serving = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        serving.start()
        try:
            yield keys
        finally:
            server.shutdown()
            serving.join()
