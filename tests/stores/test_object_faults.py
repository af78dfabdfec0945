"""Buckets behind a network that fails: every request of every operation, in every way.

Hours of waiting pass at once (`Hours`); the servers and the connections are real.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from holdfast.core.types import MiB
from holdfast.errors import HoldfastError, StoredWrong, StoreUnavailable
from holdfast.stores import object_clients
from holdfast.stores.base import Store
from holdfast.stores.object import ObjectStore
from holdfast.stores.object_clients import Clients
from tests.stores.contract import ANY, listed
from tests.support.hours import Hours
from tests.support.servers import faults
from tests.support.servers.faults import Drop, Fault
from tests.support.servers.proxy import Exchange, FaultProxy
from tests.support.servers.service import Place

OLD = bytes(range(256)) * 4
NEW = b"what is new, " * 50
HOUR_S = 3600.0


class Network:
    """A bucket, once directly and once through a network that fails."""

    def __init__(self, place: Place, behind: Place, proxy: FaultProxy) -> None:
        self.place = place
        self.behind = behind
        self.proxy = proxy
        self.hours = Hours()
        self._clients: Clients | None = None
        self.store = self.client()
        self.direct = ObjectStore(place.address)

    def client(self, **settings: Any) -> ObjectStore:
        """One that has appended nothing yet. All share their connections: making new ones
        reads every certificate of the machine."""
        retry = self.hours.retry(**settings)
        if self._clients is None:
            first = ObjectStore(self.behind.address, retry=retry)
            self._clients = first._connect()
        return ObjectStore(self.behind.address, retry=retry, clients=self._clients)


Faulty = Callable[[Place], tuple[Place, FaultProxy]]


@pytest.fixture(params=["s3", "gcs", pytest.param("azure", marks=pytest.mark.slow)])
def network(request: pytest.FixtureRequest, faulty: Faulty) -> Iterator[Network]:
    place = request.getfixturevalue(request.param)
    network = Network(place, *faulty(place))
    yield network
    network.proxy.heal()
    network.store.close()


# For tests that take long, and are about the client rather than the server.
ONE_NETWORK = pytest.mark.parametrize(
    "network",
    ["gcs", *(pytest.param(name, marks=pytest.mark.slow) for name in ("s3", "azure"))],
    indirect=True,
)


@dataclass(frozen=True)
class Operation:
    """One call, on a bucket that holds `a` and `b/c`."""

    call: Callable[[Store], object]
    results: tuple[object, ...]
    """The right ones: a put whose reply was lost may say that something is there."""
    after: tuple[dict[str, int], ...]
    """What may be listed once it has returned."""


def publish(store: Store) -> bool:
    made = store.create("new", at_most_bytes=1 << 16)
    try:
        made.write(0, memoryview(NEW))
        return made.publish(len(NEW))
    finally:
        made.discard()


def read_into(store: Store) -> bytes:
    into = bytearray(100)
    store.read_into("a", 50, memoryview(into))
    return bytes(into)


def append(store: Store) -> bytes:
    store.append("events/1", b"a line\n")
    return store.get("events/1", max_bytes=ANY)


OTHER_BYTES = "is there with other bytes"
"""Asked again, it cannot tell another's object from its own that was damaged on the way."""
BEFORE = {"a": len(OLD), "b/c": 3}
PUT = {**BEFORE, "new": len(NEW)}
OPERATIONS = {
    "put_new": Operation(lambda s: s.put_new("new", [NEW[:7], NEW[7:]]), (True, False), (PUT,)),
    "publish": Operation(publish, (True, False), (PUT,)),
    "put_new on what is there": Operation(
        lambda s: s.put_new("a", [NEW]), (False, OTHER_BYTES), (BEFORE,)
    ),
    "get": Operation(lambda s: s.get("a", max_bytes=ANY), (OLD,), (BEFORE,)),
    "read_into": Operation(read_into, (OLD[50:150],), (BEFORE,)),
    "size": Operation(lambda s: s.size("a"), (len(OLD),), (BEFORE,)),
    "settle": Operation(lambda s: s.settle("a"), (None,), (BEFORE,)),
    "list": Operation(listed, (BEFORE,), (BEFORE,)),
    "delete": Operation(lambda s: s.delete(["a", "absent"]), (None,), ({"b/c": 3},)),
    "append": Operation(append, (b"a line\n",), ({**BEFORE, "events/1": 7},)),
    "prepare_writing": Operation(lambda s: s.prepare_writing(), (None,), (BEFORE,)),
}

PASSING = {
    "dropped": faults.dropped(),
    "lost reply": faults.lost_reply(),
    "503 SlowDown": faults.slow_down(retry_after_s=1),
    "500": faults.internal_error(),
    "empty body": faults.truncated(0),
    "half a body": faults.truncated(40),
}


def fill(network: Network) -> None:
    """Bring the bucket to where every operation starts."""
    network.direct.delete([info.key for info in network.direct.list("")])
    network.direct.put_new("a", [OLD])
    network.direct.put_new("b/c", [b"old"])


def result_of(operation: Operation, store: Store) -> object:
    try:
        return operation.call(store)
    except StoreUnavailable as error:
        if OTHER_BYTES in error.message.replace("\n", " "):
            return OTHER_BYTES
        raise


def requests(network: Network, operation: Operation) -> int:
    """How many requests the operation makes when nothing fails."""
    fill(network)
    network.proxy.forget()
    assert operation.call(network.client()) in operation.results
    return network.proxy.count()


def whole(network: Network) -> bool:
    """Whether everything that can be seen has its right bytes."""
    right = {"a": OLD, "b/c": b"old", "new": NEW, "events/1": b"a line\n"}
    return all(
        network.direct.get(info.key, max_bytes=ANY) == right.get(info.key)
        for info in network.direct.list("")
        if not info.key.startswith("probe-")
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_passes_is_not_noticed(network: Network, name: str) -> None:
    """Each request of the operation fails once, and the one after it, in each way."""
    operation = OPERATIONS[name]
    for number in range(requests(network, operation)):
        for fault_name, fault in PASSING.items():
            where = f"request {number}: {fault_name}"
            fill(network)
            client = network.client()
            network.proxy.fail(fault, skip=number, times=2)
            slept = len(network.hours.sleeps)
            assert result_of(operation, client) in operation.results, where
            assert len(network.hours.sleeps) - slept <= 2, where
            network.proxy.heal()
            assert listed(network.direct) in operation.after, where
            assert whole(network), where


@ONE_NETWORK
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_does_not_pass_is_an_error_in_time(network: Network, name: str) -> None:
    """For two minutes it is tried again; what is seen then is the old or the new."""
    operation = OPERATIONS[name]
    shortest_s = 5 if name == "delete" else 100
    count = requests(network, operation)
    if name == "prepare_writing":
        count -= 1  # the scratch object that cannot be removed is no error
    for number in range(count):
        for fault_name in ("dropped", "lost reply", "503 SlowDown", "500"):
            where = f"from request {number} on: {fault_name}"
            fill(network)
            client = network.client()
            begun = network.hours.now
            network.proxy.fail(PASSING[fault_name], skip=number, times=None)
            with pytest.raises(StoreUnavailable, match=r"^cannot ") as caught:
                operation.call(client)
            assert network.store.address in caught.value.message, where
            assert shortest_s < network.hours.now - begun < 240, where
            network.proxy.heal()
            found = {k: v for k, v in listed(network.direct).items() if k[:6] != "probe-"}
            assert found in (BEFORE, *operation.after), where
            assert whole(network), where


def test_an_hour_of_outage(network: Network) -> None:
    """Who has set an hour as the deadline waits for it, and goes on as soon as it ends."""
    fill(network)
    client = network.client(deadline_s=2 * HOUR_S)
    end = network.hours.now + HOUR_S
    network.hours.after_sleep = lambda: (
        network.proxy.come_back() if network.hours.now > end else None
    )
    network.proxy.go_down()
    assert client.put_new("new", [NEW]) is True
    assert HOUR_S < network.hours.now - 1000 <= HOUR_S + 15
    assert 240 <= len(network.hours.sleeps) < 300
    assert listed(network.direct) == PUT


def test_a_storm_of_slow_downs_is_waited_for(network: Network) -> None:
    """The more often a client is turned away, the longer it stays away."""
    fill(network)
    rule = network.proxy.fail(faults.slow_down(), times=10)
    assert network.store.put_new("new", [NEW]) is True
    assert rule.met == 10
    assert network.hours.sleeps == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15, 15, 15]


REFUSALS = {
    "expired": (faults.expired_token(), "ExpiredToken", "Renew the credentials"),
    "clock": (faults.clock_skewed(), "RequestTimeTooSkewed", "Set this machine's clock"),
}


@pytest.mark.parametrize("reason", REFUSALS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_refusals_are_told_at_once(network: Network, name: str, reason: str) -> None:
    """Asking again would not help; once it is mended, the same client goes on."""
    fault, code, hint = REFUSALS[reason]
    operation = OPERATIONS[name]
    fill(network)
    network.proxy.forget()
    network.proxy.fail(fault, times=None)
    # A HEAD has no body that could name the code.
    heads = name in ("size", "settle")
    with pytest.raises(StoreUnavailable, match="403" if heads else code) as caught:
        operation.call(network.store)
    if not heads:
        assert hint in caught.value.hint
    assert network.hours.sleeps == []
    network.proxy.heal()
    assert operation.call(network.store) in operation.results
    assert listed(network.direct) in operation.after


def test_a_server_of_another_time(network: Network) -> None:
    """Its replies tell a wrong time, which nothing here goes by."""
    for operation in OPERATIONS.values():
        fill(network)
        network.proxy.fail(faults.skewed_date(86_400), times=None)
        assert operation.call(network.client()) in operation.results
        assert listed(network.direct) in operation.after
    assert network.hours.sleeps == []


@ONE_NETWORK
@pytest.mark.parametrize(
    "fault", [faults.delayed(1), faults.trickled(20)], ids=["silence", "trickle"]
)
@pytest.mark.parametrize("name", ["put_new", "get", "read_into", "list"])
def test_replies_that_take_too_long_are_given_up(
    network: Network, name: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_clients, "_SMALL_S", 0.3)
    monkeypatch.setattr(object_clients, "_LARGE_S", 0.3)
    operation = OPERATIONS[name]
    fill(network)
    client = ObjectStore(network.behind.address, retry=network.hours.retry())
    rule = network.proxy.fail(fault)
    assert operation.call(client) in operation.results
    assert rule.met == 1
    silent = fault.delay_s > 0
    if silent or name in ("get", "read_into", "list"):
        assert network.hours.sleeps
    assert whole(network)


# -- wrong bytes -------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 300, len(NEW) - 1])
@pytest.mark.parametrize("put", ["put_new", "publish"])
@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_an_upload_that_arrives_changed_is_noticed(
    request: pytest.FixtureRequest, faulty: Faulty, kind: str, put: str, at: int
) -> None:
    """Also where it is the first, and nobody knows yet what the server's tags are."""
    place = request.getfixturevalue(kind)
    network = Network(place, *faulty(place))
    network.proxy.fail(faults.wrong_upload(at), method="PUT", target="new")
    with pytest.raises(StoredWrong, match="is not what was sent") as caught:
        OPERATIONS[put].call(network.store)
    assert "next save" in caught.value.hint
    # And so is the next, by its tag alone.
    network.proxy.forget()
    network.proxy.fail(faults.wrong_upload(at), method="PUT", target="other")
    with pytest.raises(StoredWrong, match="is not what was sent"):
        network.store.put_new("other", [NEW])
    assert network.store.put_new("third", [NEW])
    assert network.proxy.count(target="third") == 1


def test_whose_wrong_upload_it_is_must_be_known(network: Network) -> None:
    """Where the reply was lost it may be another's: unknown, and not ours that arrived wrong."""
    wrong = faults.wrong_upload(9)
    network.proxy.fail(replace(wrong, drop=Drop.AFTER), method="PUT", target="new")
    with pytest.raises(StoreUnavailable, match="is there with other bytes") as caught:
        network.store.put_new("new", [NEW])
    assert not isinstance(caught.value, StoredWrong)
    assert network.direct.get("new", max_bytes=ANY) != NEW


def test_what_was_stored_is_compared_without_a_request(network: Network) -> None:
    """The server's entity tag comes with its reply; Azure's is no digest, and costs a request."""
    network.proxy.forget()
    assert network.store.put_new("new", [NEW])
    assert network.proxy.count() == (2 if network.place.service.scheme == "az" else 1)


def test_a_lost_reply_costs_three_requests(network: Network) -> None:
    """Sent again it is there, and it has the same bytes."""
    network.proxy.forget()
    network.proxy.fail(faults.lost_reply(), method="PUT", target="new")
    assert network.store.put_new("new", [NEW])
    methods = [exchange.method for exchange in network.proxy.exchanges()]
    assert methods == ["PUT", "PUT", "GET"]


@pytest.mark.parametrize("tag", [f'"{7:032x}"', '"7-1"', None])
def test_tags_that_are_no_digests_are_found_out(s3: Place, faulty: Faulty, tag: str | None) -> None:
    """Of what S3 encrypts with a user's key: the first is read back, and then they count
    for nothing."""
    place, proxy = faulty(s3)

    class Encrypting:
        def __getattr__(self, name: str) -> Any:
            return getattr(clients.api, name)

        def put(self, *args: Any, **named: Any) -> dict[str, Any]:
            return {**clients.api.put(*args, **named), "e_tag": tag}

    clients = ObjectStore(place.address)._connect()
    store = ObjectStore(place.address, clients=clients._replace(api=Encrypting()))
    large = bytes(MiB)
    assert store.put_new("a", [large[:100], large[100:]])
    assert [e.method for e in proxy.exchanges(target="/a$")] == ["PUT", "HEAD", "GET", "GET"]
    assert store.put_new("b", [large])
    assert [e.method for e in proxy.exchanges(target="/b$")] == ["PUT", "HEAD"]
    assert store.put_new("c", [OLD])
    assert store.get("c", max_bytes=ANY) == OLD
    # What the tag does not say, the server finds with the signature.
    assert [signed(e) for e in proxy.exchanges(method="PUT")] == [
        "UNSIGNED-PAYLOAD",
        hashlib.sha256(large).hexdigest(),
        hashlib.sha256(OLD).hexdigest(),
    ]


def signed(exchange: Exchange) -> str:
    """The digest of the request's bytes that the signature covers, or that there is none."""
    return exchange.headers["x-amz-content-sha256"]


@pytest.mark.parametrize("chosen", ["true", "false"])
def test_what_is_signed_can_be_chosen(
    s3: Place, faulty: Faulty, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    """A bucket may refuse what is not signed."""
    monkeypatch.setenv("AWS_UNSIGNED_PAYLOAD", chosen)
    place, proxy = faulty(s3)
    assert ObjectStore(place.address).put_new("a", [bytes(MiB)])
    (exchange,) = proxy.exchanges(method="PUT")
    assert (signed(exchange) == "UNSIGNED-PAYLOAD") is (chosen == "true")


def test_wrong_bytes_in_a_reply_are_left_to_the_digests(network: Network) -> None:
    """A store cannot know; see the tests of runs on buckets."""
    fill(network)
    network.proxy.fail(faults.wrong_reply(5), method="GET", target="/a")
    found = network.store.get("a", max_bytes=ANY)
    assert found != OLD
    assert len(found) == len(OLD)
    assert network.store.get("a", max_bytes=ANY) == OLD


def test_a_listing_that_arrives_changed_harms_nobody(network: Network) -> None:
    """It cannot be read and is asked for again, or it names what may be a key."""
    fill(network)
    for at in range(0, 700, 25):
        network.proxy.fail(faults.wrong_reply(at), method="GET")
        try:
            for info in network.store.list(""):
                assert info.size_bytes >= 0
        except HoldfastError:
            pass
        network.proxy.heal()
        assert listed(network.store) == BEFORE
