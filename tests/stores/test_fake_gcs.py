"""The fake of GCS keeps GCS's rules: conditions, generations, ranges, pages, parts, refusals."""

from __future__ import annotations

import base64
import hashlib
import http.client
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.servers.gcs import PAGE, FakeGcs
from tests.support.servers.gcs_objects import PART_MIN_BYTES, Bucket, Refused, part_etag

THREADS = 16
IF_ABSENT = {"x-goog-if-generation-match": "0"}


@dataclass(frozen=True)
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def code(self) -> str | None:
        """GCS's word for a refusal."""
        return ET.fromstring(self.body).findtext("Code")

    @property
    def generation(self) -> int:
        return int(self.headers["x-goog-generation"])


class Client:
    """One connection that stays open: a body that is not read would spoil the next request."""

    def __init__(self, server: FakeGcs) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.server_port)

    def __call__(
        self, method: str, target: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> Reply:
        self.connection.request(method, target, body, headers or {})
        reply = self.connection.getresponse()
        return Reply(reply.status, reply.headers, reply.read())


@pytest.fixture
def server() -> Iterator[FakeGcs]:
    with FakeGcs() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def ask(server: FakeGcs) -> Iterator[Client]:
    client = Client(server)
    assert client("PUT", "/bucket").status == 200
    yield client
    client.connection.close()


# -- conditions ----------------------------------------------------------------------------


def test_only_if_absent(ask: Client) -> None:
    assert ask("PUT", "/bucket/a", b"first", IF_ABSENT).status == 200
    refused = ask("PUT", "/bucket/a", b"second", IF_ABSENT)
    assert (refused.status, refused.code) == (412, "PreconditionFailed")
    assert ask("GET", "/bucket/a").body == b"first"
    assert ask("DELETE", "/bucket/a").status == 204
    assert ask("PUT", "/bucket/a", b"second", IF_ABSENT).status == 200


def test_only_that_generation(ask: Client) -> None:
    first = ask("PUT", "/bucket/a", b"first").generation
    condition = {"x-goog-if-generation-match": str(first)}
    second = ask("PUT", "/bucket/a", b"second", condition).generation
    assert second > first
    for method in ["PUT", "GET", "HEAD", "DELETE"]:
        assert ask(method, "/bucket/a", b"third", condition).status == 412
    assert ask("GET", "/bucket/a").body == b"second"
    assert ask("DELETE", "/bucket/a", headers={"x-goog-if-generation-match": str(second)})
    assert ask("GET", "/bucket/a").status == 404


def test_a_condition_that_is_no_generation(ask: Client) -> None:
    refused = ask("PUT", "/bucket/a", b"x", {"x-goog-if-generation-match": "zero"})
    assert (refused.status, refused.code) == (400, "InvalidArgument")
    assert ask("GET", "/bucket/a").status == 404


def test_a_copy_has_conditions_too(ask: Client) -> None:
    ask("PUT", "/bucket/a", b"first")
    source = {"x-goog-copy-source": "bucket/a"}
    assert ask("PUT", "/bucket/b", b"", source | IF_ABSENT).status == 200
    assert ask("PUT", "/bucket/b", b"", source | IF_ABSENT).status == 412
    assert ask("GET", "/bucket/b").body == b"first"


def test_of_threads_that_race_one_creates(server: FakeGcs, ask: Client) -> None:
    begin = threading.Barrier(THREADS)

    def create(number: int) -> list[int]:
        client = Client(server)
        statuses: list[int] = []
        for race in range(20):
            begin.wait()
            statuses.append(client("PUT", f"/bucket/{race}", b"%d" % number, IF_ABSENT).status)
        client.connection.close()
        return statuses

    with ThreadPoolExecutor(THREADS) as pool:
        statuses = list(pool.map(create, range(THREADS)))
    for race, of_one in enumerate(zip(*statuses, strict=True)):
        assert sorted(of_one) == [200] + [412] * (THREADS - 1)
        assert ask("GET", f"/bucket/{race}").body == b"%d" % of_one.index(200)


def test_a_careless_one_ignores_conditions() -> None:
    bucket = Bucket(careless=True)
    bucket.put("a", b"first", 0)
    bucket.put("a", b"second", 0)
    assert bucket.get("a").data == b"second"


# -- reading -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "status", "body", "content_range"),
    [
        (None, 200, b"0123456789", None),
        ("bytes=0-0", 206, b"0", "bytes 0-0/10"),
        ("bytes=3-5", 206, b"345", "bytes 3-5/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-2", 206, b"89", "bytes 8-9/10"),
        ("bytes=-20", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("lines=1-2", 200, b"0123456789", None),
    ],
)
def test_ranges(
    ask: Client, asked: str | None, status: int, body: bytes, content_range: str | None
) -> None:
    ask("PUT", "/bucket/a", b"0123456789")
    reply = ask("GET", "/bucket/a", headers={"Range": asked} if asked else {})
    assert (reply.status, reply.body) == (status, body)
    assert reply.headers["Content-Range"] == content_range


@pytest.mark.parametrize("asked", ["bytes=10-", "bytes=10-12", "bytes=-0"])
def test_ranges_outside(ask: Client, asked: str) -> None:
    ask("PUT", "/bucket/a", b"0123456789")
    refused = ask("GET", "/bucket/a", headers={"Range": asked})
    assert (refused.status, refused.code) == (416, "InvalidRange")


def test_what_is_said_about_an_object(ask: Client) -> None:
    made = ask("PUT", "/bucket/a", b"hello")
    md5 = hashlib.md5(b"hello")
    for reply in [made, ask("GET", "/bucket/a"), ask("HEAD", "/bucket/a")]:
        assert reply.headers["ETag"] == f'"{md5.hexdigest()}"'
        assert reply.headers["x-goog-hash"] == f"md5={base64.b64encode(md5.digest()).decode()}"
        assert reply.generation == made.generation
        assert reply.headers["Last-Modified"]
    head = ask("HEAD", "/bucket/a")
    assert (head.headers["Content-Length"], head.body) == ("5", b"")
    assert ask("GET", "/bucket/a", headers={"If-None-Match": made.headers["ETag"]}).status == 304
    assert ask("GET", "/bucket/a", headers={"If-Match": '"other"'}).status == 412


def test_what_is_not_there(ask: Client) -> None:
    for method in ["GET", "DELETE"]:
        absent = ask(method, "/bucket/absent")
        assert (absent.status, absent.code) == (404, "NoSuchKey")
        nowhere = ask(method, "/nowhere/a")
        assert (nowhere.status, nowhere.code) == (404, "NoSuchBucket")
    absent = ask("HEAD", "/bucket/absent")
    assert (absent.status, absent.body) == (404, b"")


# -- writing -------------------------------------------------------------------------------


def test_a_body_that_changed_on_its_way(ask: Client) -> None:
    digest = {"Content-MD5": base64.b64encode(hashlib.md5(b"hello").digest()).decode()}
    refused = ask("PUT", "/bucket/a", b"hellp", digest)
    assert (refused.status, refused.code) == (400, "BadDigest")
    assert ask("PUT", "/bucket/a", b"hello", digest).status == 200


def test_a_body_that_ends_early_is_not_stored(ask: Client, server: FakeGcs) -> None:
    client = Client(server)
    client.connection.putrequest("PUT", "/bucket/a")
    client.connection.putheader("Content-Length", "10")
    client.connection.endheaders(b"half")
    assert client.connection.sock
    client.connection.sock.shutdown(1)
    assert client.connection.getresponse().read()
    client.connection.close()
    assert ask("GET", "/bucket/a").status == 404


@pytest.mark.parametrize("key", ["a b/ü%+?#&<>", "..", "a//b", "x" * 1024])
def test_any_key(ask: Client, key: str) -> None:
    target = "/bucket/" + quote(key, safe="")
    assert ask("PUT", target, b"x", IF_ABSENT).status == 200
    assert ask("GET", target).body == b"x"
    assert ET.fromstring(ask("GET", "/bucket").body).findtext("Contents/Key") == key


def test_a_key_that_is_too_long(ask: Client) -> None:
    assert ask("PUT", "/bucket/" + "x" * 1025, b"x").code == "KeyTooLong"


# -- uploads in parts --------------------------------------------------------------------


def named(*parts: tuple[int, str]) -> bytes:
    inner = "".join(
        f"<Part><ETag>{etag}</ETag><PartNumber>{n}</PartNumber></Part>" for n, etag in parts
    )
    return f"<CompleteMultipartUpload>{inner}</CompleteMultipartUpload>".encode()


def begun(ask: Client) -> str:
    reply = ask("POST", "/bucket/a?uploads=")
    return ET.fromstring(reply.body).findtext("UploadId", "")


def test_parts_become_an_object(ask: Client) -> None:
    large, small = b"1" * PART_MIN_BYTES, b"2"
    upload = begun(ask)
    second = ask("PUT", f"/bucket/a?partNumber=2&uploadId={upload}", small).headers["ETag"]
    first = ask("PUT", f"/bucket/a?partNumber=1&uploadId={upload}", large).headers["ETag"]
    assert ask("GET", "/bucket/a").status == 404
    done = ask("POST", f"/bucket/a?uploadId={upload}", named((1, first), (2, second)))
    assert (done.status, ET.fromstring(done.body).tag) == (200, "CompleteMultipartUploadResult")
    assert ask("GET", "/bucket/a").body == large + small
    head = ask("HEAD", "/bucket/a")
    assert "x-goog-hash" not in head.headers
    assert hashlib.md5(large + small).hexdigest() not in head.headers["ETag"]
    again = ask("POST", f"/bucket/a?uploadId={upload}", named((1, first), (2, second)))
    assert (again.status, again.code) == (404, "NoSuchUpload")


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([], "InvalidPartOrder"),
        ([(2, part_etag(b"2")), (1, part_etag(b"1"))], "InvalidPartOrder"),
        ([(1, part_etag(b"1")), (1, part_etag(b"1"))], "InvalidPartOrder"),
        ([(3, part_etag(b"1"))], "InvalidPart"),
        ([(1, part_etag(b"2"))], "InvalidPart"),
        ([(1, part_etag(b"1")), (2, part_etag(b"2"))], "EntityTooSmall"),
    ],
)
def test_parts_that_do_not_fit(ask: Client, parts: list[tuple[int, str]], code: str) -> None:
    upload = begun(ask)
    for number in [1, 2]:
        ask("PUT", f"/bucket/a?partNumber={number}&uploadId={upload}", b"%d" % number)
    refused = ask("POST", f"/bucket/a?uploadId={upload}", named(*parts))
    assert (refused.status, refused.code) == (400, code)
    assert ask("GET", "/bucket/a").status == 404


def test_unreadable_lists_of_parts(ask: Client) -> None:
    upload = begun(ask)
    for body in [b"", b"<a>", b"<a><Part><PartNumber>x</PartNumber></Part></a>"]:
        assert ask("POST", f"/bucket/a?uploadId={upload}", body).code == "MalformedXML"


def test_an_aborted_upload_is_gone(ask: Client) -> None:
    upload = begun(ask)
    listing = ET.fromstring(ask("GET", "/bucket?uploads").body)
    assert listing.findtext("Upload/UploadId") == upload
    assert listing.findtext("Upload/Key") == "a"
    assert ask("DELETE", f"/bucket/other?uploadId={upload}").code == "NoSuchUpload"
    assert ask("DELETE", f"/bucket/a?uploadId={upload}").status == 204
    assert ET.fromstring(ask("GET", "/bucket?uploads").body).find("Upload") is None
    assert ask("PUT", f"/bucket/a?partNumber=1&uploadId={upload}", b"x").code == "NoSuchUpload"


# -- listing -----------------------------------------------------------------------------


def test_a_listing_comes_in_pages(ask: Client) -> None:
    keys = [f"p/{n:03}" for n in range(2 * PAGE + 3)]
    for key in [*keys, "other"]:
        ask("PUT", f"/bucket/{key}", b"xy")
    found: list[str] = []
    sizes: list[int] = []
    token = ""
    while True:
        page = ET.fromstring(ask("GET", f"/bucket?list-type=2&prefix=p%2F{token}").body)
        found += [contents.findtext("Key", "") for contents in page.iter("Contents")]
        sizes.append(len(page.findall("Contents")))
        assert {contents.findtext("Size") for contents in page.iter("Contents")} == {"2"}
        if page.findtext("IsTruncated") == "false":
            break
        token = "&continuation-token=" + quote(page.findtext("NextContinuationToken", ""))
    assert found == keys
    assert sizes == [PAGE, PAGE, 3]


names = st.text("ab/ü\U0001f600", min_size=1, max_size=6)


@given(
    keys=st.sets(names, max_size=12),
    prefix=st.text("ab/", max_size=2),
    delimiter=st.sampled_from(["", "/"]),
    at_most=st.integers(1, 4),
)
def test_pages_together_are_the_listing(
    keys: set[str], prefix: str, delimiter: str, at_most: int
) -> None:
    bucket = Bucket()
    for key in keys:
        bucket.put(key, b"x")
    objects: list[str] = []
    folders: list[str] = []
    after: str | None = ""
    while after is not None:
        page = bucket.page(prefix=prefix, delimiter=delimiter, after=after, at_most=at_most)
        assert len(page.objects) + len(page.prefixes) <= at_most
        objects += [key for key, _ in page.objects]
        folders += page.prefixes
        after = page.next
    below = {key for key in keys if key.startswith(prefix)}
    inside = {key for key in below if delimiter and delimiter in key[len(prefix) :]}
    assert objects == sorted(below - inside, key=str.encode)
    cut = {prefix + key[len(prefix) :].partition("/")[0] + "/" for key in inside}
    assert folders == sorted(cut, key=str.encode)


def test_nothing_else_is_understood(ask: Client) -> None:
    for method, target in [("POST", "/bucket/a"), ("DELETE", "/bucket"), ("POST", "/bucket")]:
        refused = ask(method, target)
        assert (refused.status, refused.code) == (405, "MethodNotAllowed")
    with pytest.raises(Refused, match="Part number"):
        Bucket().add_part("a", "upload", 10_001, b"")
