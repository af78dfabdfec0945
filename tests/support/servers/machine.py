"""What the machines of three clouds say about themselves, over their protocols, on loopback."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

ACTION = '{"action": "terminate", "time": "2026-11-26T19:00:00Z"}'


@dataclass(frozen=True)
class Request:
    """As a machine gets it."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    """Names in lower case."""


@dataclass(frozen=True)
class Reply:
    """As a machine gives it."""

    text: str
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()


class Service:
    """What all three have in common."""

    def __init__(self) -> None:
        self.url = ""
        self.status = 200
        """Of every answer; 200: as it should be."""
        self.garbage: str | None = None
        """Instead of every answer to a GET that is a 200."""
        self.asked: list[str] = []
        self.closing = threading.Event()

    def answer(self, request: Request) -> Reply:
        raise NotImplementedError


class Machine(Service):
    """A spot instance of EC2, until `life_cycle` says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.life_cycle = "spot"
        self.taken = False
        """The notice is there; also if the file `notice` is."""
        self.action = ACTION
        self.notice: Path | None = None
        self.rebalance = False
        self.tokens = 0
        """How many were given; only the newest is good."""

    def answer(self, request: Request) -> Reply:
        if request.method == "PUT":
            if "x-aws-ec2-metadata-token-ttl-seconds" not in request.headers:
                return Reply("Bad Request", 400)
            self.tokens += self.status == 200
            return Reply(f"token {self.tokens}" if self.status == 200 else "an\nerror")
        if request.headers.get("x-aws-ec2-metadata-token") != f"token {self.tokens}":
            return Reply("Unauthorized", 401)
        text = self.said(request.path)
        return Reply("Not Found", 404) if text is None else Reply(text)

    def said(self, path: str) -> str | None:
        """None: there is no such thing."""
        if path == "/latest/meta-data/instance-life-cycle":
            return self.life_cycle
        if path == "/latest/meta-data/events/recommendations/rebalance" and self.rebalance:
            return '{"noticeTime": "2026-11-26T18:58:00Z"}'
        is_taken = self.taken or (self.notice is not None and self.notice.exists())
        return (
            self.action if path == "/latest/meta-data/spot/instance-action" and is_taken else None
        )


class GoogleMachine(Service):
    """A virtual machine of Compute Engine, with its long poll."""

    def __init__(self) -> None:
        super().__init__()
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self._changed = threading.Condition()
        self.waiting = 0
        """Requests that are held back."""

    def change(self, key: str, value: str) -> None:
        with self._changed:
            self.values[key] = value
            self._changed.notify_all()

    def answer(self, request: Request) -> Reply:
        if request.headers.get("metadata-flavor") != "Google":
            return Reply("Missing Metadata-Flavor:Google header.", 403)
        key = request.path.removeprefix("/computeMetadata/v1/instance/")
        if key not in self.values:
            return Reply("Not Found", 404)
        if request.query.get("wait_for_change") == "true":
            self._wait(key, request.query["last_etag"], float(request.query["timeout_sec"]))
        value = self.values[key]
        return Reply(value, headers=(("ETag", _etag(value)), ("Metadata-Flavor", "Google")))

    def _wait(self, key: str, etag: str, timeout_s: float) -> None:
        with self._changed:
            self.waiting += 1
            self._changed.wait_for(
                lambda: self.closing.is_set() or _etag(self.values[key]) != etag, timeout_s
            )
            self.waiting -= 1


def _etag(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:16]


class AzureMachine(Service):
    """A virtual machine of Azure, one of several in a scale set."""

    def __init__(self, name: str = "train_0") -> None:
        super().__init__()
        self.name = name
        self.events: list[dict[str, object]] = []
        self.first_s = 0.0
        """How long the first question for events takes."""
        self._asked_events = False

    def schedule(
        self, kind: str, *names: str, not_before_s: float | None = None, status: str = "Scheduled"
    ) -> None:
        """An event for the machines `names`; blank times as they are once it has begun."""
        self.events.append(
            {
                "EventId": "602d9444-d2cd-49c7-8624-8643e7171297",
                "EventStatus": status,
                "EventType": kind,
                "ResourceType": "VirtualMachine",
                "Resources": list(names),
                "NotBefore": "" if not_before_s is None else formatdate(not_before_s, usegmt=True),
                "Description": "",
                "EventSource": "Platform",
                "DurationInSeconds": -1,
            }
        )

    def answer(self, request: Request) -> Reply:
        if request.method != "GET":
            return Reply("an event was confirmed", 500)
        if request.headers.get("metadata") != "true" or "api-version" not in request.query:
            return Reply('{"error": "Bad request"}', 400)
        if request.path == "/metadata/instance/compute/name":
            return Reply(self.name)
        if request.path != "/metadata/scheduledevents":
            return Reply("{}", 404)
        if not self._asked_events:
            self.closing.wait(self.first_s)
        self._asked_events = True
        return Reply(json.dumps({"DocumentIncarnation": 1, "Events": self.events}))


@contextmanager
def on_loopback(service: Service) -> Iterator[None]:
    """It answers at its `url` while the `with` lasts."""

    class Metadata(BaseHTTPRequestHandler):
        def respond(self) -> None:
            place = urlsplit(self.path)
            service.asked.append(place.path)
            query = {name: values[0] for name, values in parse_qs(place.query).items()}
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = service.answer(Request(self.command, place.path, query, headers))
            status, text = reply.status, reply.text
            if status == 200 and service.status != 200:
                status = service.status
            if status == 200 and service.garbage is not None and self.command == "GET":
                text = service.garbage
            try:
                self.send_response(status)
                for name, value in (*reply.headers, ("Content-Length", str(len(text)))):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:
                pass  # who asked has gone

        do_GET = do_PUT = do_POST = respond

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        service.url = f"http://127.0.0.1:{server.server_port}"
        serving = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        serving.start()
        try:
            yield
        finally:
            service.closing.set()
            if isinstance(service, GoogleMachine):
                service.change("preempted", service.values["preempted"])
            server.shutdown()
            serving.join()


@contextmanager
def machine_on_loopback() -> Iterator[Machine]:
    """A spot instance; `AWS_EC2_METADATA_SERVICE_ENDPOINT` names its `url`."""
    machine = Machine()
    with on_loopback(machine):
        yield machine
