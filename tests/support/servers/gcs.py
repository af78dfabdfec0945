"""GCS on loopback: a fake of our own, because the emulators at hand ignore conditions.

It speaks the part of the XML API that obstore uses (obstore never calls the JSON API):
uploads whole and in parts, downloads with ranges, HEAD, DELETE, copies and listings, with
`x-goog-if-generation-match` honoured, generations that only grow, Content-MD5 checked, listings
of a few keys to a page, and refusals in GCS's words. It asks for no credentials.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.servers.gcs_objects import Bucket, Object, Refused
from tests.support.servers.process import running
from tests.support.servers.service import Service, send

PAGE = 10
"""Keys to a page of a listing; the real GCS gives 1000."""
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_KEY_MAX_BYTES = 1024


@contextmanager
def gcs(*, careless: bool = False) -> Iterator[Service]:
    """The fake with a bucket in a process of its own, while the `with` lasts.

    `careless`: it ignores conditions, and nobody may write to it.
    """
    flags = ["--careless"] if careless else []
    with running([sys.executable, "-m", __name__, *flags], announces=r"listens on (\d+)") as url:
        service = Service("gs", url, {"GOOGLE_BEARER_TOKEN": "tests"})
        send("PUT", f"{url}/{service.bucket}")
        yield service


class FakeGcs(ThreadingHTTPServer):
    """The server, in this process: `serve_forever` until `shutdown`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *, careless: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets: dict[str, Bucket] = {}
        self.careless = careless

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that goes away is none
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: FakeGcs
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one packet

    def log_message(self, format: str, *args: object) -> None:
        pass

    # -- from a request to a call ------------------------------------------------------

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        bucket, _, key = url.path.removeprefix("/").partition("/")
        try:
            body = self._body()
            if not key:
                self._answer_bucket(unquote(bucket))
            else:
                self._answer_object(self._bucket(unquote(bucket)), _checked(unquote(key)), body)
        except Refused as refusal:
            self._refuse(refusal)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def _answer_bucket(self, name: str) -> None:
        if self.command == "PUT":
            self.server.buckets[name] = Bucket(careless=self.server.careless)
            return self._send(200)
        bucket = self._bucket(name)
        if self.command == "GET" and "uploads" in self.query:
            return self._send_xml("ListMultipartUploadsResult", _uploads(name, bucket))
        if self.command == "GET":
            return self._list(name, bucket)
        raise _not_allowed()

    def _answer_object(self, bucket: Bucket, key: str, body: bytes) -> None:
        upload = self.query.get("uploadId")
        match self.command:
            case "GET" | "HEAD":
                self._download(bucket.get(key, self._condition()))
            case "DELETE" if upload is not None:
                bucket.abort(key, upload)
                self._send(204)
            case "DELETE":
                bucket.delete(key, self._condition())
                self._send(204)
            case "PUT" if upload is not None:
                etag = bucket.add_part(key, upload, int(self.query["partNumber"]), body)
                self._send(200, {"ETag": etag})
            case "PUT" if source := self.headers.get("x-goog-copy-source"):
                made = bucket.copy(_same_bucket(source), key, self._condition())
                self._send_xml("CopyObjectResult", [("ETag", made.etag)], _about(made))
            case "PUT":
                self._send(200, _about(bucket.put(key, body, self._condition())))
            case "POST" if "uploads" in self.query:
                begun: _Fields = [("Key", key), ("UploadId", bucket.begin(key))]
                self._send_xml("InitiateMultipartUploadResult", begun)
            case "POST" if upload is not None:
                made = bucket.complete(key, upload, _named_parts(body))
                done: _Fields = [("Key", key), ("ETag", made.etag)]
                self._send_xml("CompleteMultipartUploadResult", done, _about(made))
            case _:
                raise _not_allowed()

    def _body(self) -> bytes:
        """The whole body, whatever becomes of the request: the next one begins behind it."""
        if self.headers.get("Transfer-Encoding"):
            self.close_connection = True
            raise Refused(411, "LengthRequired", "POST requests require a Content-length header.")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if len(body) < int(self.headers.get("Content-Length", 0)):
            self.close_connection = True
            raise Refused(400, "IncompleteBody", "The body is shorter than its Content-Length.")
        given = self.headers.get("Content-MD5")
        if given is not None and base64.b64decode(given) != hashlib.md5(body).digest():
            raise Refused(400, "BadDigest", "The Content-MD5 did not match what was received.")
        return body

    def _bucket(self, name: str) -> Bucket:
        if name not in self.server.buckets:
            raise Refused(404, "NoSuchBucket", "The specified bucket does not exist.")
        return self.server.buckets[name]

    def _condition(self) -> int | None:
        given = self.headers.get("x-goog-if-generation-match")
        if given is None:
            return None
        if not given.isdecimal():
            raise Refused(400, "InvalidArgument", f"Invalid generation: {given}")
        return int(given)

    # -- answers -------------------------------------------------------------------------

    def _download(self, found: Object) -> None:
        if_match = self.headers.get("If-Match")
        if if_match not in (None, "*", found.etag):
            raise Refused(412, "PreconditionFailed", "The ETag does not match.")
        if self.headers.get("If-None-Match") in ("*", found.etag):
            return self._send(304, _about(found))
        span = _span(self.headers.get("Range"), len(found.data))
        if span is None:
            return self._send(200, _about(found), found.data)
        headers = {"Content-Range": f"bytes {span.start}-{span.stop - 1}/{len(found.data)}"}
        self._send(206, _about(found) | headers, found.data[span])

    def _list(self, name: str, bucket: Bucket) -> None:
        query = self.query
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = max(
            _decoded(query.get("continuation-token", "")),
            query.get("start-after", ""),
            key=str.encode,
        )
        at_most = max(1, min(int(query.get("max-keys", PAGE)), PAGE))
        page = bucket.page(prefix=prefix, delimiter=delimiter, after=after, at_most=at_most)
        fields: _Fields = [
            ("Name", name),
            ("Prefix", prefix),
            ("KeyCount", str(len(page.objects) + len(page.prefixes))),
            ("IsTruncated", "true" if page.next is not None else "false"),
        ]
        if page.next is not None:
            fields.append(("NextContinuationToken", _encoded(page.next)))
        for key, found in page.objects:
            modified = datetime.fromtimestamp(found.modified_s, UTC)
            about: _Fields = [
                ("Key", key),
                ("Generation", str(found.generation)),
                ("MetaGeneration", "1"),
                ("LastModified", modified.strftime("%Y-%m-%dT%H:%M:%S.%fZ")),
                ("ETag", found.etag),
                ("Size", str(len(found.data))),
            ]
            fields.append(("Contents", about))
        fields.extend(("CommonPrefixes", [("Prefix", folder)]) for folder in page.prefixes)
        self._send_xml("ListBucketResult", fields)

    def _refuse(self, refusal: Refused) -> None:
        fields: _Fields = [("Code", refusal.code), ("Message", refusal.message)]
        self._send_xml("Error", fields, status=refusal.status)

    def _send_xml(
        self, name: str, fields: _Fields, headers: dict[str, str] | None = None, status: int = 200
    ) -> None:
        body = b"<?xml version='1.0' encoding='UTF-8'?>" + ET.tostring(_element(name, fields))
        kind = {"Content-Type": "application/xml; charset=UTF-8"}
        self._send(status, {**(headers or {}), **kind}, body)

    def _send(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


# -- shapes ------------------------------------------------------------------------------

# The children of an XML element: a name and its text, or its own children.
_Fields: TypeAlias = "list[tuple[str, str | _Fields]]"


def _element(name: str, fields: str | _Fields) -> ET.Element:
    element = ET.Element(name)
    if isinstance(fields, str):
        element.text = fields
    else:
        element.extend(_element(*field) for field in fields)
    return element


def _about(found: Object) -> dict[str, str]:
    headers = {
        "ETag": found.etag,
        "Last-Modified": formatdate(found.modified_s, usegmt=True),
        "x-goog-generation": str(found.generation),
        "x-goog-metageneration": "1",
        "x-goog-stored-content-length": str(len(found.data)),
    }
    if found.md5 is not None:
        headers["x-goog-hash"] = f"md5={base64.b64encode(found.md5).decode()}"
    return headers


def _uploads(name: str, bucket: Bucket) -> _Fields:
    fields: _Fields = [("Bucket", name), ("IsTruncated", "false")]
    for key, upload in bucket.uploads():
        fields.append(("Upload", [("Key", key), ("UploadId", upload)]))
    return fields


def _named_parts(body: bytes) -> list[tuple[int, str]]:
    try:
        return [
            (int(part.findtext("PartNumber", "")), part.findtext("ETag", ""))
            for part in ET.fromstring(body).iter("Part")
        ]
    except (ET.ParseError, ValueError):
        raise Refused(400, "MalformedXML", "The list of parts cannot be read.") from None


def _span(given: str | None, nbytes: int) -> slice | None:
    """The bytes that a Range header asks for; None for all. A header that is none is ignored."""
    match = _RANGE.fullmatch(given or "")
    if match is None or match.group() == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        start, end = max(0, nbytes - int(last)), nbytes
    else:
        start, end = int(first), min(nbytes, int(last) + 1 if last else nbytes)
    if start >= nbytes or end <= start:
        raise Refused(416, "InvalidRange", "The requested range cannot be satisfied.")
    return slice(start, end)


def _checked(key: str) -> str:
    if len(key.encode()) > _KEY_MAX_BYTES:
        raise Refused(400, "KeyTooLong", "The specified key is too long.")
    return key


def _same_bucket(source: str) -> str:
    """The key in `bucket/key`; a copy within one bucket is all that tests need."""
    return unquote(source.removeprefix("/").partition("/")[2])


def _not_allowed() -> Refused:
    return Refused(405, "MethodNotAllowed", "The specified method is not allowed.")


def _encoded(key: str) -> str:
    return base64.urlsafe_b64encode(key.encode()).decode()


def _decoded(token: str) -> str:
    return base64.urlsafe_b64decode(token).decode()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--careless", action="store_true")
    with FakeGcs(careless=parser.parse_args().careless) as server:
        print(f"listens on {server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
