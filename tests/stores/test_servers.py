"""The servers that tests of object stores rely on do what the tests take them to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.error
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError, BaseError

from tests.support.servers import faults
from tests.support.servers.process import ROOT, ServerFailed, node_program, running
from tests.support.servers.proxy import FaultProxy
from tests.support.servers.service import Place, send

THREADS = 16
RACES = 10

Faulty = Callable[[Place], tuple[Place, FaultProxy]]
Client = Any  # obstore's three stores, which share no base


@pytest.fixture(
    params=[
        "s3",
        "gcs",
        pytest.param("azure", marks=pytest.mark.slow),
    ]
)
def place(request: pytest.FixtureRequest) -> Place:
    """A place on each server that keeps its promises."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["careless_gcs", pytest.param("careless_s3", marks=pytest.mark.slow)])
def careless(request: pytest.FixtureRequest) -> Place:
    """A place on each server that does not."""
    return request.getfixturevalue(request.param)


def created(client: Client, key: str, data: bytes) -> bool:
    try:
        obstore.put(client, key, data, mode="create", use_multipart=False)
    except AlreadyExistsError:
        return False
    return True


def listed(client: Client) -> dict[str, int]:
    return {info["path"]: info["size"] for page in obstore.list(client) for info in page}


# -- what a server must do -------------------------------------------------------------


def test_the_first_stays(place: Place) -> None:
    client = place.client()
    assert created(client, "log/1", b"first")
    assert not created(client, "log/1", b"second")
    assert not created(place.client(), "log/1", b"first")
    assert bytes(obstore.get(client, "log/1").bytes()) == b"first"


def test_of_many_that_race_one_wins(place: Place) -> None:
    client = place.client()
    with ThreadPoolExecutor(THREADS) as pool:
        for race in range(RACES):
            key = f"log/{race}"
            contents = [b"%d" % n for n in range(THREADS)]
            won = list(pool.map(lambda data, key=key: created(client, key, data), contents))
            assert Counter(won) == {True: 1, False: THREADS - 1}
            assert bytes(obstore.get(client, key).bytes()) == contents[won.index(True)]


def test_ranges(place: Place) -> None:
    client = place.client()
    data = bytes(range(200))
    assert created(client, "a", data)
    for start, end in [(0, 1), (5, 10), (0, 200), (199, 200)]:
        assert bytes(obstore.get_range(client, "a", start=start, end=end)) == data[start:end]
    with pytest.raises(BaseError):
        obstore.get_range(client, "a", start=200, length=1)


def test_listing_goes_on_over_pages(place: Place) -> None:
    client = place.client()
    keys = {f"packs/{n}": 1 for n in range(25)} | {"b.c": 2, "a/b c": 3, "a/ü%20+": 4}
    for key, size in keys.items():
        assert created(client, key, b"x" * size)
    assert listed(client) == keys
    beside = place.service.place()
    assert listed(beside.client()) == {}


def test_deleted_is_gone(place: Place) -> None:
    client = place.client()
    for key in ["a", "b", "c"]:
        assert created(client, key, b"x")
    obstore.delete(client, ["a", "b"])
    assert listed(client) == {"c": 1}
    with pytest.raises(FileNotFoundError):
        obstore.head(client, "a")
    with pytest.raises(FileNotFoundError):
        obstore.get(client, "a")
    assert created(client, "a", b"again")


def test_uploads_in_parts(place: Place) -> None:
    client = place.client()
    data = os.urandom((11 << 20) + 5)
    obstore.put(client, "packs/a", data, chunk_size=5 << 20, use_multipart=True)
    assert obstore.head(client, "packs/a")["size"] == len(data)
    assert bytes(obstore.get(client, "packs/a").bytes()) == data


READ_IT = """
import sys
import obstore
from tests.support.servers.proxy import FaultProxy
from tests.support.servers.service import Place, Service
print(bytes(obstore.get(eval(sys.argv[1]).client(), "a").bytes()))
"""


def test_processes_find_the_credentials(place: Place) -> None:
    assert created(place.client(), "a", b"hello")
    command = [sys.executable, "-c", READ_IT, repr(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "b'hello'\n"


# -- through the proxy ---------------------------------------------------------------------


def test_everything_works_through_the_proxy(place: Place, faulty: Faulty) -> None:
    through, proxy = faulty(place)
    client = through.client()
    contents = [b"%d" % n for n in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        won = list(pool.map(lambda data: created(client, "log/1", data), contents))
    assert Counter(won) == {True: 1, False: THREADS - 1}
    assert proxy.count(method="PUT", target="log/1") == THREADS
    data = os.urandom((6 << 20) + 5)
    obstore.put(client, "packs/a", data, chunk_size=5 << 20, use_multipart=True)
    assert bytes(obstore.get(client, "packs/a").bytes()) == data
    assert bytes(obstore.get_range(client, "packs/a", start=7, length=5)) == data[7:12]
    sizes = {"log/1": len(contents[won.index(True)]), "packs/a": len(data)}
    assert listed(client) == listed(place.client()) == sizes
    obstore.delete(client, ["packs/a", "log/1"])
    assert listed(place.client()) == {}


def test_a_lost_reply_leaves_the_object(place: Place, faulty: Faulty) -> None:
    through, proxy = faulty(place)
    client = through.client()
    proxy.fail(faults.lost_reply(), method="PUT")
    with pytest.raises(BaseError):
        created(client, "log/1", b"mine")
    assert not created(client, "log/1", b"again")
    assert bytes(obstore.get(client, "log/1").bytes()) == b"mine"


def test_a_dropped_request_leaves_nothing(place: Place, faulty: Faulty) -> None:
    through, proxy = faulty(place)
    client = through.client()
    proxy.fail(faults.dropped(), method="PUT")
    with pytest.raises(BaseError):
        created(client, "log/1", b"mine")
    assert listed(client) == {}


@pytest.mark.parametrize(
    "fault",
    [
        faults.slow_down(retry_after_s=0),
        faults.internal_error(),
        faults.expired_token(),
        faults.clock_skewed(),
        faults.truncated(3),
    ],
)
def test_faults_reach_the_client(place: Place, faulty: Faulty, fault: faults.Fault) -> None:
    through, proxy = faulty(place)
    client = through.client()
    assert created(client, "a", b"hello")
    proxy.fail(fault, method="GET")
    with pytest.raises((BaseError, PermissionError)):
        obstore.get(client, "a").bytes()
    assert bytes(obstore.get(client, "a").bytes()) == b"hello"


def test_wrong_bytes_reach_the_client(place: Place, faulty: Faulty) -> None:
    through, proxy = faulty(place)
    client = through.client()
    proxy.fail(faults.wrong_upload(byte=1), method="PUT")
    assert created(client, "a", b"hello")
    assert bytes(obstore.get(client, "a").bytes()) == b"hdllo"
    proxy.fail(faults.wrong_reply(byte=0), method="GET")
    assert bytes(obstore.get(client, "a").bytes()) == b"idllo"


def test_an_outage_is_seen_at_once(place: Place, faulty: Faulty) -> None:
    through, proxy = faulty(place)
    client = through.client()
    assert created(client, "a", b"x")
    with proxy.outage(), pytest.raises(BaseError):
        obstore.get(client, "a")
    assert bytes(obstore.get(client, "a").bytes()) == b"x"


# -- what the adversaries do -----------------------------------------------------------


def test_careless_servers_let_the_second_replace_the_first(careless: Place) -> None:
    client = careless.client()
    assert created(client, "log/1", b"first")
    assert created(client, "log/1", b"second")
    assert bytes(obstore.get(client, "log/1").bytes()) == b"second"
    assert listed(client) == {"log/1": 6}
    obstore.delete(client, ["log/1"])
    assert listed(client) == {}


def test_gcp_storage_emulator_stores_the_second_too_and_reports_errors(
    gcp_emulator: Place,
) -> None:
    client = gcp_emulator.client()
    for data in [b"first", b"second"]:
        with pytest.raises(BaseError, match="ETag Header missing"):
            obstore.put(client, "log/1", data, mode="create", use_multipart=False)
        stored = send("GET", f"{gcp_emulator.endpoint}/bucket/{gcp_emulator.prefix}%2Flog%2F1")
        assert stored == data


# -- how servers come and go -------------------------------------------------------------

SERVER = [
    sys.executable,
    "-c",
    "import http.server as h; s = h.HTTPServer(('127.0.0.1', 0), h.BaseHTTPRequestHandler);"
    "print('listens on', s.server_port, flush=True); s.serve_forever()",
]
ANNOUNCES = r"listens on (\d+)"
STARTER = f"""
import time
from tests.support.servers import faults
from tests.support.servers.process import running
with running({SERVER!r}, announces={ANNOUNCES!r}) as url:
    print(url, flush=True)
    time.sleep(600)
"""


def test_a_server_is_gone_after_its_with() -> None:
    with running(SERVER, announces=ANNOUNCES) as url, pytest.raises(urllib.error.HTTPError):
        send("GET", url)
    with pytest.raises(urllib.error.URLError, match="refused"):
        send("GET", url)


def test_a_server_dies_with_the_process_that_started_it() -> None:
    command = [sys.executable, "-c", STARTER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        url = process.stdout.readline().strip()
        process.send_signal(signal.SIGKILL)
    assert refuses_soon(url)


def refuses_soon(url: str) -> bool:
    """Until the kernel has ended the server it may still take a connection, but not for long."""
    for _ in range(10_000):
        try:
            send("GET", url)
        except urllib.error.HTTPError:
            continue
        except OSError:
            return True
    return False


def why_it_failed(code: str, within_s: float) -> str:
    starting = running([sys.executable, "-c", code], announces=ANNOUNCES, within_s=within_s)
    with pytest.raises(ServerFailed) as caught, starting:
        pass
    return str(caught.value)


def test_a_server_that_ends_fails_the_test() -> None:
    said = why_it_failed("print('no such luck'); raise SystemExit(3)", 60)
    assert "ended before it listened\nno such luck" in said


def test_a_server_that_never_listens_fails_the_test() -> None:
    code = "print('going on', flush=True); import time; time.sleep(600)"
    for within_s in (2, 20, 60):  # on a busy machine it prints nothing so soon
        said = why_it_failed(code, within_s)
        assert f"no port after {within_s} s" in said
        if "going on" in said.splitlines():
            return
    raise AssertionError(said)


def test_a_server_that_is_not_installed_fails_the_test() -> None:
    with pytest.raises(ServerFailed, match="make node-servers"):
        node_program("absent/main.js")


def test_the_environment_of_the_machine_stays_out(
    monkeypatch: pytest.MonkeyPatch, gcs_server: Any, opened: Callable[[Any], Place]
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "the owner's")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    opened(gcs_server)
    assert "AWS_PROFILE" not in os.environ
    assert "HTTPS_PROXY" not in os.environ
    assert os.environ["GOOGLE_BEARER_TOKEN"] == "tests"
