"""HTTPS before a server on loopback, with a certificate of an authority of the test's own."""

from __future__ import annotations

import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import trustme

_PIECE = 1 << 16


@contextmanager
def tls_before(endpoint: str, certificate: trustme.LeafCert) -> Iterator[str]:
    """Passes what comes by TLS on to `endpoint`; yields the URL (`https://127.0.0.1:PORT`)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    upstream = urlsplit(endpoint)

    class Front(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            try:
                inside = context.wrap_socket(self.request, server_side=True)
            except OSError:  # the client did not like the certificate
                return
            with (
                inside,
                socket.create_connection((upstream.hostname, upstream.port)) as server,
            ):
                back = threading.Thread(target=_pump, args=(server, inside), daemon=True)
                back.start()
                _pump(inside, server)
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Front) as front:
        front.daemon_threads = True
        serving = threading.Thread(target=front.serve_forever, args=(0.02,), daemon=True)
        serving.start()
        try:
            yield f"https://127.0.0.1:{front.server_address[1]}"
        finally:
            front.shutdown()
            serving.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    """Until one of them is closed."""
    try:
        while piece := source.recv(_PIECE):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return
