"""A proxy on loopback that a test tells how to misbehave, and that counts requests.

    with FaultProxy(s3.endpoint) as proxy:
        store = open_store(s3.through(proxy.url).address)
        proxy.fail(lost_reply(), method="PUT", target="log/")
        ...
        assert proxy.count(method="PUT", target="log/") == 2

The fixture `faulty` does the first two lines. Bodies pass through in pieces; nothing is kept.
"""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler
from time import monotonic
from typing import Self
from urllib.parse import unquote, urlsplit

from tests.support.servers.faults import Drop, Fault, first, flip

_PIECE = 1 << 16
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "expect"})
_SIGNER = re.compile(r"Credential=([^/]+)/")
_FAULTLESS = Fault()
_SERVER_TIMEOUT_S = 60
_LOOK_S = 0.02


@dataclass
class Exchange:
    """One request as it arrived, and what became of it."""

    method: str
    target: str
    """Path and query, percent-decoded."""
    headers: Mapping[str, str]
    """Of the request, by names in lower case."""
    fault: Fault = _FAULTLESS
    server_status: int | None = None
    """What the server answered; None if it was never asked or did not answer."""
    status: int | None = None
    """What the client was answered; None if it was cut off without a status."""
    sent_bytes: int = 0
    """Of the request's body."""
    reply_bytes: int = 0
    """Of the reply's body, as far as they were sent on."""

    @property
    def signer(self) -> str:
        """The id of the key that signed it, in S3."""
        found = _SIGNER.search(self.headers.get("authorization", ""))
        return found[1] if found else ""


class Rule:
    """A fault, and which requests it meets. Made by `FaultProxy.fail`."""

    def __init__(
        self,
        fault: Fault,
        method: str,
        target: str,
        skip: int,
        times: int | None,
        for_s: float | None,
        when: Callable[[Exchange], bool],
    ) -> None:
        self.fault = fault
        self.met = 0
        """How many requests it has met."""
        self._method = method
        self._target = re.compile(target)
        self._skip = skip
        self._left = times
        self._when = when
        self._met_one = threading.Event()
        self._until = None if for_s is None else monotonic() + for_s

    def stop(self) -> None:
        """It meets no further request."""
        self._left = 0

    def meets(self, exchange: Exchange) -> bool:
        """Whether it is this request's turn; counts it if so."""
        if self._left == 0 or not matches(exchange, self._method, self._target):
            return False
        if not self._when(exchange):
            return False
        if self._until is not None and monotonic() >= self._until:
            return False
        if self._skip:
            self._skip -= 1
            return False
        if self._left is not None:
            self._left -= 1
        self.met += 1
        self._met_one.set()
        return True

    def wait(self, timeout_s: float = 30) -> None:
        """Return once it has met a request. Raises TimeoutError."""
        if not self._met_one.wait(timeout_s):
            raise TimeoutError(f"no such request after {timeout_s:g} s")


def matches(exchange: Exchange, method: str, target: re.Pattern[str]) -> bool:
    return method in ("", exchange.method) and target.search(exchange.target) is not None


class FaultProxy:
    """Stands before the server at `endpoint`, from its making to `close`. Any thread may ask it."""

    def __init__(self, endpoint: str) -> None:
        upstream = urlsplit(endpoint)
        self.upstream = upstream.hostname or "", upstream.port or 80
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._exchanges: list[Exchange] = []
        self._connections: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self.closing = threading.Event()
        self._listens = threading.Event()
        self._listener = _bound_listener()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self.come_back()
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cut every connection and end every thread."""
        self.closing.set()
        self.go_down()
        self._listens.set()
        self._accepting.join()
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join()
        self._listener.close()

    # -- what goes wrong -----------------------------------------------------------------

    def fail(
        self,
        fault: Fault,
        *,
        method: str = "",
        target: str = "",
        skip: int = 0,
        times: int | None = 1,
        for_s: float | None = None,
        when: Callable[[Exchange], bool] = lambda exchange: True,
    ) -> Rule:
        """Let `fault` meet the requests with `method` whose target has a match of `target`,
        and for which `when` is true.

        `target` is a regular expression for path and query, percent-decoded. The first `skip`
        of these pass, the next `times` (None: all) are met, within `for_s` seconds if given.
        Of several rules that meet a request, the oldest has it.
        """
        rule = Rule(fault, method, target, skip, times, for_s, when)
        with self._lock:
            self._rules.append(rule)
        return rule

    def heal(self) -> None:
        """Forget every rule."""
        with self._lock:
            self._rules.clear()

    def go_down(self) -> None:
        """Cut all connections; new ones are refused until `come_back`."""
        with self._lock:
            if self._listens.is_set():
                self._listens.clear()
                self._listener.shutdown(socket.SHUT_RDWR)  # it stays bound: nobody gets the port
            for connection in self._connections:
                _cut(connection)

    def come_back(self) -> None:
        with self._lock:
            self._listener.listen(128)
            self._listens.set()

    @property
    def is_up(self) -> bool:
        return self._listens.is_set() and not self.closing.is_set()

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Down while the `with` lasts."""
        self.go_down()
        try:
            yield
        finally:
            self.come_back()

    # -- what happened -------------------------------------------------------------------

    def exchanges(self, *, method: str = "", target: str = "") -> list[Exchange]:
        """The requests so far, in the order of their arrival, those cut off among them."""
        pattern = re.compile(target)
        with self._lock:
            return [each for each in self._exchanges if matches(each, method, pattern)]

    def count(self, *, method: str = "", target: str = "") -> int:
        return len(self.exchanges(method=method, target=target))

    def forget(self) -> None:
        """Begin a new record of requests."""
        with self._lock:
            self._exchanges.clear()

    def begin(self, method: str, target: str, headers: Iterable[tuple[str, str]]) -> Exchange:
        """Record a request, with the fault that meets it."""
        named = {name.lower(): value for name, value in headers}
        exchange = Exchange(method, unquote(target), named)
        with self._lock:
            if not self._listens.is_set():
                raise ConnectionAbortedError("down: what was still in the pipe is not heard")
            rule = next((rule for rule in self._rules if rule.meets(exchange)), None)
            exchange.fault = rule.fault if rule else _FAULTLESS
            self._exchanges.append(exchange)
        return exchange

    # -- connections ---------------------------------------------------------------------

    def _accept(self) -> None:
        while self._listens.wait() and not self.closing.is_set():
            try:
                connection, address = self._listener.accept()
            except OSError:
                continue  # it went down
            thread = threading.Thread(target=self._serve, args=(connection, address), daemon=True)
            with self._lock:
                self._connections.add(connection)
                self._threads.add(thread)
                if not self._listens.is_set():
                    _cut(connection)
            thread.start()

    def _serve(self, connection: socket.socket, address: object) -> None:
        try:
            _Connection(connection, address, self)  # type: ignore[arg-type]  # in a server's place
        except (OSError, http.client.HTTPException):
            pass  # the client or the server has gone: the client sees it
        finally:
            with self._lock:
                self._connections.discard(connection)
                self._threads.discard(threading.current_thread())
            connection.close()


def _bound_listener() -> socket.socket:
    """A socket that keeps its port while it does not listen."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Linux gives a port back at `shutdown` unless it was asked for by its number.
    listener.bind(address)
    return listener


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the other side was faster


class _Connection(BaseHTTPRequestHandler):
    """A client's connection, with one request after the other."""

    server: FaultProxy  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and small bodies in one packet

    def log_message(self, format: str, *args: object) -> None:
        pass

    def exchange(self) -> None:
        exchange = self.server.begin(self.command, self.path, self.headers.items())
        fault = exchange.fault
        if fault.delay_s:
            self.server.closing.wait(fault.delay_s)
            if not self.server.is_up:
                return self._drop()
        if fault.drop is Drop.BEFORE:
            return self._drop()
        sent = _counted(self._body(), exchange)
        if fault.answer is not None:
            for _ in sent:
                pass
            return self._answer(exchange)
        if fault.flip_sent is not None:
            sent = flip(sent, fault.flip_sent)
        if fault.drop is Drop.ON_ITS_WAY:
            sent = [b"".join(sent)]
            self._drop()
        if fault.held is not None:
            while not fault.held.wait(_LOOK_S):
                if not self.server.is_up:
                    return self._drop()
        server = http.client.HTTPConnection(*self.server.upstream, timeout=_SERVER_TIMEOUT_S)
        try:
            self._ask(server, sent)
            reply = server.getresponse()
            exchange.server_status = reply.status
            if fault.drop is not None:
                reply.read()
                return self._drop()
            self._pass_on(exchange, reply)
        finally:
            server.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = exchange

    # -- to the server -------------------------------------------------------------------

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while length := self._chunk_length():
                yield from self._read(length)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass  # trailers
        else:
            yield from self._read(int(self.headers.get("Content-Length", 0)))

    def _chunk_length(self) -> int:
        line = self.rfile.readline().partition(b";")[0]
        if not line:
            raise ConnectionAbortedError("the client went away")
        return int(line, 16)

    def _read(self, length: int) -> Iterator[bytes]:
        while length:
            piece = self.rfile.read(min(length, _PIECE))
            if not piece:
                raise ConnectionAbortedError("the client went away")
            length -= len(piece)
            yield piece

    def _ask(self, server: http.client.HTTPConnection, body: Iterable[bytes]) -> None:
        """Send the request on as it came, Host included: S3's signatures cover it."""
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                server.putheader(name, value)
        chunked = "Transfer-Encoding" in self.headers
        if chunked:
            server.putheader("Transfer-Encoding", "chunked")
        server.endheaders()
        try:
            for piece in body:
                server.send(_chunk(piece) if chunked else piece)
            if chunked:
                server.send(_chunk(b""))
        except BrokenPipeError:
            self.close_connection = True  # it has answered without hearing all of it

    # -- to the client -------------------------------------------------------------------

    def _drop(self) -> None:
        self.close_connection = True
        _cut(self.connection)

    def _answer(self, exchange: Exchange) -> None:
        answer = exchange.fault.answer
        assert answer
        body = answer.body()
        exchange.status = answer.status
        self.send_response_only(answer.status)
        date = formatdate(time.time() + exchange.fault.skew_s, usegmt=True)
        headers = {**answer.headers(), "Date": date, "Content-Length": str(len(body))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            exchange.reply_bytes = len(body)

    def _pass_on(self, exchange: Exchange, reply: http.client.HTTPResponse) -> None:
        fault = exchange.fault
        chunked = reply.chunked and self.command != "HEAD"
        exchange.status = reply.status
        self.send_response_only(reply.status, reply.reason)
        for name, value in reply.getheaders():
            if name.lower() == "date" and fault.skew_s:
                moved = parsedate_to_datetime(value).timestamp() + fault.skew_s
                value = formatdate(moved, usegmt=True)
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif reply.length is None and reply.getheader("Content-Length") is None:
            self.close_connection = True  # the end of the connection is the end of the body
            self.send_header("Connection", "close")
        self.end_headers()
        slow = fault.bytes_per_s
        nbytes = min(_PIECE, max(1, int(slow / 20))) if slow else _PIECE  # 20 pieces a second
        body: Iterable[bytes] = iter(lambda: reply.read(nbytes), b"")
        if fault.flip_reply is not None:
            body = flip(body, fault.flip_reply)
        if fault.keep_bytes is not None:
            body = first(body, fault.keep_bytes)
        for piece in body:
            if slow and self.server.closing.wait(len(piece) / slow):
                return self._drop()
            exchange.reply_bytes += len(piece)
            self.wfile.write(_chunk(piece) if chunked else piece)
            if slow:
                self.wfile.flush()
        if fault.keep_bytes is not None:
            self.wfile.flush()
            return self._drop()
        if chunked:
            self.wfile.write(_chunk(b""))


def _chunk(piece: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def _counted(pieces: Iterable[bytes], exchange: Exchange) -> Iterator[bytes]:
    for piece in pieces:
        exchange.sent_bytes += len(piece)
        yield piece
