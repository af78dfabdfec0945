"""What a machine of EC2 says about itself, on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ACTION = '{"action": "terminate", "time": "2026-11-26T19:00:00Z"}'


class Machine:
    """A spot instance, until `life_cycle` says otherwise."""

    def __init__(self) -> None:
        self.url = ""
        self.life_cycle = "spot"
        self.taken = False
        """The notice is there; also if the file `notice` is."""
        self.notice: Path | None = None
        self.status = 200
        """Of every answer; 200: as it should be."""
        self.asked: list[str] = []
        self.tokens = 0
        """How many were given; only the newest is good."""

    def said(self, path: str) -> str | None:
        """None: there is no such thing."""
        if path == "/latest/meta-data/instance-life-cycle":
            return self.life_cycle
        is_taken = self.taken or (self.notice is not None and self.notice.exists())
        return ACTION if path == "/latest/meta-data/spot/instance-action" and is_taken else None


@contextmanager
def machine_on_loopback() -> Iterator[Machine]:
    """Runs while the `with` lasts; `AWS_EC2_METADATA_SERVICE_ENDPOINT` names its `url`."""
    machine = Machine()

    class Metadata(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            machine.asked.append(self.path)
            assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            machine.tokens += machine.status == 200
            self._answer(f"token {machine.tokens}" if machine.status == 200 else "an\nerror")

        def do_GET(self) -> None:
            machine.asked.append(self.path)
            if self.headers["X-aws-ec2-metadata-token"] != f"token {machine.tokens}":
                self.send_error(401)
            elif (text := machine.said(self.path)) is None:
                self.send_error(404)
            else:
                self._answer(text)

        def _answer(self, text: str) -> None:
            self.send_response(machine.status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        machine.url = f"http://127.0.0.1:{server.server_port}"
        serving = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        serving.start()
        try:
            yield machine
        finally:
            server.shutdown()
            serving.join()
