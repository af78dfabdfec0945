"""The fault proxy passes everything on as it is, but for what it is told to spoil."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from tests.support.servers import faults
from tests.support.servers.proxy import FaultProxy
from tests.support.waiting import within

BODY = bytes(range(256)) * 1000  # several pieces


class Upstream(ThreadingHTTPServer):
    """Answers GET with BODY, PUT and POST with what arrived; remembers the requests."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.heard: list[str] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: Upstream
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.heard.append(f"{self.command} {self.path}")
        chunked = "chunked" in self.path
        self.send_response(200 if "absent" not in self.path else 404)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif "until-the-end" in self.path:
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if chunked:
            self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))
        else:
            self.wfile.write(BODY)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while length := int(self.rfile.readline(), 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.heard.append(f"{self.command} {self.path}")
        about = {
            "command": self.command,
            "path": self.path,
            "headers": dict(self.headers),
            "md5": hashlib.md5(body).hexdigest(),
        }
        answer = json.dumps(about).encode()
        self.send_response(201)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_PUT

    def do_DELETE(self) -> None:
        self.server.heard.append(f"{self.command} {self.path}")
        self.send_response(204)
        self.end_headers()


class Client:
    """One connection, opened again where it was cut."""

    def __init__(self, proxy: FaultProxy) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", urlsplit(proxy.url).port)

    def __call__(
        self, method: str, target: str, body: bytes = b"", **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        try:
            self.connection.request(method, target, body, headers)
            reply = self.connection.getresponse()
            return reply.status, reply.headers, reply.read()
        except BaseException:
            self.connection.close()
            raise


CUT = (ConnectionError, http.client.HTTPException)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(upstream: Upstream) -> Iterator[FaultProxy]:
    with FaultProxy(f"http://127.0.0.1:{upstream.server_port}") as proxy:
        yield proxy


@pytest.fixture
def ask(proxy: FaultProxy) -> Iterator[Client]:
    client = Client(proxy)
    yield client
    client.connection.close()


# -- without faults ------------------------------------------------------------------------


def test_a_request_arrives_as_it_was_sent(ask: Client) -> None:
    status, _, body = ask(
        "PUT", "/b/a%2Fb?x=%20&y", BODY, Host="bucket.example", Authorization="signed", Range="a"
    )
    about = json.loads(body)
    assert status == 201
    assert (about["command"], about["path"]) == ("PUT", "/b/a%2Fb?x=%20&y")
    assert about["md5"] == hashlib.md5(BODY).hexdigest()
    kept = {"Host": "bucket.example", "Authorization": "signed", "Range": "a"}
    assert about["headers"] == kept | {
        "Accept-Encoding": "identity",
        "Content-Length": str(len(BODY)),
    }


@pytest.mark.parametrize("target", ["/a", "/chunked", "/until-the-end", "/absent"])
def test_a_reply_arrives_as_it_was_sent(ask: Client, target: str) -> None:
    status, headers, body = ask("GET", target)
    assert status == (404 if target == "/absent" else 200)
    assert body == BODY
    assert len(headers.get_all("Date", [])) == 1


def test_requests_without_bodies_follow_each_other_on_one_connection(ask: Client) -> None:
    for target in ["/a", "/chunked", "/until-the-end"]:
        status, _, body = ask("HEAD", target)
        assert (status, body) == (200, b"")
    status, headers, body = ask("HEAD", "/a")
    assert headers["Content-Length"] == str(len(BODY))
    assert ask("DELETE", "/a")[0] == 204
    assert ask("GET", "/a")[2] == BODY


def test_bodies_in_chunks(ask: Client) -> None:
    ask.connection.request("POST", "/a", iter([b"one", b"two", BODY]))
    about = json.loads(ask.connection.getresponse().read())
    assert about["headers"]["Transfer-Encoding"] == "chunked"
    assert about["md5"] == hashlib.md5(b"onetwo" + BODY).hexdigest()


def test_many_at_once(proxy: FaultProxy) -> None:
    def ask_ten(number: int) -> None:
        client = Client(proxy)
        for _ in range(10):
            assert client("GET", f"/{number}")[2] == BODY
        client.connection.close()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask_ten, range(16)))
    assert proxy.count() == 160


def test_what_happened_is_counted(ask: Client, proxy: FaultProxy) -> None:
    ask("PUT", "/b/log%2F1?a=b", b"12345")
    ask("GET", "/b/packs/a")
    ask("GET", "/absent")
    first, second, third = proxy.exchanges()
    assert (first.method, first.target) == ("PUT", "/b/log/1?a=b")
    assert (first.status, first.server_status, first.sent_bytes) == (201, 201, 5)
    assert (second.sent_bytes, second.reply_bytes) == (0, len(BODY))
    assert third.status == 404
    assert proxy.count(method="GET") == 2
    assert proxy.count(target="^/b/") == 2
    assert proxy.count(method="GET", target="^/b/") == 1
    proxy.forget()
    assert proxy.exchanges() == []


def test_waiting_for_a_request_that_does_not_come(proxy: FaultProxy) -> None:
    with pytest.raises(TimeoutError):
        proxy.fail(faults.dropped()).wait(timeout_s=0.01)


# -- which requests a rule meets ---------------------------------------------------------


def statuses(ask: Client, method: str, target: str, times: int) -> list[int]:
    return [ask(method, target)[0] for _ in range(times)]


def test_a_rule_meets_one_request(ask: Client, proxy: FaultProxy) -> None:
    rule = proxy.fail(faults.slow_down())
    assert statuses(ask, "GET", "/a", 3) == [503, 200, 200]
    assert rule.met == 1


def test_a_rule_skips_and_then_meets_so_many(ask: Client, proxy: FaultProxy) -> None:
    rule = proxy.fail(faults.slow_down(), skip=1, times=2)
    assert statuses(ask, "GET", "/a", 5) == [200, 503, 503, 200, 200]
    assert rule.met == 2


def test_a_rule_looks_at_method_and_target(ask: Client, proxy: FaultProxy) -> None:
    proxy.fail(faults.slow_down(), method="PUT", target=r"log/\d+$", times=None)
    assert ask("PUT", "/packs/1")[0] == 201
    assert ask("GET", "/log/1")[0] == 200
    assert ask("PUT", "/log%2F1")[0] == 503


def test_a_rule_meets_all_until_it_is_stopped(ask: Client, proxy: FaultProxy) -> None:
    rule = proxy.fail(faults.slow_down(), times=None)
    assert statuses(ask, "GET", "/a", 20) == [503] * 20
    rule.stop()
    assert statuses(ask, "GET", "/a", 2) == [200, 200]
    proxy.fail(faults.slow_down(), times=None)
    assert statuses(ask, "GET", "/a", 2) == [503, 503]
    proxy.heal()
    assert statuses(ask, "GET", "/a", 2) == [200, 200]


def test_a_rule_meets_all_for_a_time(
    ask: Client, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    proxy.fail(faults.slow_down(), times=None, for_s=3600)
    monkeypatch.setattr("tests.support.servers.proxy.monotonic", lambda: now + 3599)
    assert statuses(ask, "GET", "/a", 2) == [503, 503]
    monkeypatch.setattr("tests.support.servers.proxy.monotonic", lambda: now + 3601)
    assert statuses(ask, "GET", "/a", 2) == [200, 200]


def test_the_oldest_rule_comes_first(ask: Client, proxy: FaultProxy) -> None:
    proxy.fail(faults.slow_down())
    proxy.fail(faults.internal_error())
    assert statuses(ask, "GET", "/a", 3) == [503, 500, 200]


# -- what faults do --------------------------------------------------------------------------


def test_dropped_before_the_server_hears(
    ask: Client, proxy: FaultProxy, upstream: Upstream
) -> None:
    proxy.fail(faults.dropped())
    with pytest.raises(CUT):
        ask("PUT", "/a", BODY)
    assert upstream.heard == []
    assert ask("PUT", "/a", BODY)[0] == 201
    assert proxy.exchanges()[0].status is None


def test_the_reply_is_lost(ask: Client, proxy: FaultProxy, upstream: Upstream) -> None:
    proxy.fail(faults.lost_reply())
    with pytest.raises(CUT):
        ask("PUT", "/a", BODY)
    assert upstream.heard == ["PUT /a"]
    lost = proxy.exchanges()[0]
    assert (lost.status, lost.server_status, lost.reply_bytes) == (None, 201, 0)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (faults.slow_down(), 503, "SlowDown"),
        (faults.internal_error(), 500, "InternalError"),
        (faults.expired_token(), 403, "ExpiredToken"),
        (faults.clock_skewed(), 403, "RequestTimeTooSkewed"),
    ],
)
def test_refusals(
    ask: Client,
    proxy: FaultProxy,
    upstream: Upstream,
    fault: faults.Fault,
    status: int,
    code: str,
) -> None:
    proxy.fail(fault, times=2)
    got, headers, body = ask("PUT", "/a", BODY)
    assert got == status
    assert ET.fromstring(body).findtext("Code") == code
    assert headers["x-ms-error-code"] == code
    assert headers["Retry-After"] is None
    assert ask("HEAD", "/a")[0] == status
    assert upstream.heard == []
    assert ask("GET", "/a")[2] == BODY  # on the same connection: the bodies were read
    refused = proxy.exchanges()[0]
    assert (refused.status, refused.server_status) == (status, None)
    assert refused.sent_bytes == len(BODY)


def test_throttling_says_for_how_long(ask: Client, proxy: FaultProxy) -> None:
    proxy.fail(faults.slow_down(retry_after_s=7))
    assert ask("GET", "/a")[1]["Retry-After"] == "7"


@pytest.mark.parametrize("fault", [faults.skewed_date(3600), faults.clock_skewed(3600)])
def test_another_time(ask: Client, proxy: FaultProxy, fault: faults.Fault) -> None:
    proxy.fail(fault)
    ahead_s = parsedate_to_datetime(ask("GET", "/a")[1]["Date"]).timestamp() - time.time()
    assert 3000 < ahead_s < 4200


@pytest.mark.parametrize("keep", [0, 1, 100_000])
def test_a_truncated_reply(ask: Client, proxy: FaultProxy, keep: int) -> None:
    proxy.fail(faults.truncated(keep))
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask("GET", "/a")
    assert caught.value.partial == BODY[:keep]
    assert proxy.exchanges()[0].reply_bytes == keep


@pytest.mark.parametrize("byte", [0, 70_000, len(BODY) - 1])
def test_a_wrong_byte_in_the_reply(ask: Client, proxy: FaultProxy, byte: int) -> None:
    proxy.fail(faults.wrong_reply(byte))
    status, headers, body = ask("GET", "/a")
    assert (status, headers["Content-Length"]) == (200, str(len(BODY)))
    assert [n for n in range(len(BODY)) if body[n] != BODY[n]] == [byte]


@pytest.mark.parametrize("byte", [0, 70_000, len(BODY) - 1])
def test_a_wrong_byte_in_the_upload(ask: Client, proxy: FaultProxy, byte: int) -> None:
    proxy.fail(faults.wrong_upload(byte))
    changed = bytearray(BODY)
    changed[byte] ^= 1
    assert json.loads(ask("PUT", "/a", BODY)[2])["md5"] == hashlib.md5(changed).hexdigest()
    assert json.loads(ask("PUT", "/a", BODY)[2])["md5"] == hashlib.md5(BODY).hexdigest()


def test_delays(ask: Client, proxy: FaultProxy) -> None:
    proxy.fail(faults.delayed(0.2))
    before = time.monotonic()
    assert ask("GET", "/a")[2] == BODY
    assert time.monotonic() - before >= 0.2


def test_what_is_given_up_arrives_later(ask: Client, proxy: FaultProxy) -> None:
    lands = threading.Event()
    proxy.fail(faults.given_up(lands))
    with pytest.raises(CUT):
        ask("PUT", "/a", BODY)
    [exchange] = proxy.exchanges()
    assert (exchange.sent_bytes, exchange.server_status) == (len(BODY), None)
    lands.set()
    assert within(30, lambda: exchange.server_status is not None)
    assert exchange.status is None


def test_what_is_held_is_answered_later(ask: Client, proxy: FaultProxy) -> None:
    goes_on = threading.Event()
    rule = proxy.fail(faults.held(goes_on))
    ask.connection.request("GET", "/a")
    rule.wait()
    assert proxy.exchanges()[0].server_status is None
    goes_on.set()
    assert ask.connection.getresponse().read() == BODY


def test_trickling(ask: Client, proxy: FaultProxy) -> None:
    proxy.fail(faults.trickled(len(BODY) * 4))
    before = time.monotonic()
    assert ask("GET", "/a")[2] == BODY
    assert time.monotonic() - before >= 0.24


@pytest.mark.parametrize(
    "fault", [faults.delayed(3600), faults.held(threading.Event()), faults.trickled(1)]
)
def test_closing_waits_for_no_delay(upstream: Upstream, fault: faults.Fault) -> None:
    with FaultProxy(f"http://127.0.0.1:{upstream.server_port}") as proxy:
        rule = proxy.fail(fault)
        client = Client(proxy)
        client.connection.request("GET", "/a")
        rule.wait()
    with pytest.raises(CUT):
        client.connection.getresponse().read()
    client.connection.close()


# -- outages -----------------------------------------------------------------------------


def test_an_outage_refuses_connections(ask: Client, proxy: FaultProxy) -> None:
    assert ask("GET", "/a")[2] == BODY
    for _ in range(3):
        with proxy.outage():
            with pytest.raises(CUT):
                ask("GET", "/a")  # its connection was cut
            for _ in range(3):
                with pytest.raises(ConnectionRefusedError):
                    ask("GET", "/a")
        assert ask("GET", "/a")[2] == BODY
    assert proxy.count() == 4


def test_an_outage_cuts_what_is_under_way(proxy: FaultProxy) -> None:
    rule = proxy.fail(faults.trickled(len(BODY) / 3600))
    client = Client(proxy)
    client.connection.request("GET", "/a")
    rule.wait()
    proxy.go_down()
    with pytest.raises(CUT):
        client.connection.getresponse().read()
    client.connection.close()


def test_nobody_gets_the_port_meanwhile(proxy: FaultProxy) -> None:
    with proxy.outage(), socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", urlsplit(proxy.url).port))


def test_a_server_that_is_gone(upstream: Upstream) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        with FaultProxy(f"http://127.0.0.1:{bound.getsockname()[1]}") as proxy:
            client = Client(proxy)
            with pytest.raises(CUT):
                client("GET", "/a")
