"""Buckets keep what every store promises, and those that cannot are not written to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

import holdfast
from holdfast.errors import StoreError, StoreUnfit
from holdfast.repo.orphans import collect_orphans
from holdfast.repo.repo import Repo
from holdfast.stores.base import Store
from holdfast.stores.object import ObjectStore
from holdfast.stores.open import open_store
from holdfast.stores.retrying import Retry
from tests.stores.contract import ANY, StoreContract, listed
from tests.support.servers.service import Place


class BucketContract(StoreContract):
    """A subclass gives the place."""

    @pytest.fixture
    def place(self) -> Place:
        raise NotImplementedError("a subclass gives the place")

    @pytest.fixture
    def store(self, place: Place) -> Iterator[Store]:
        store = open_store(place.address)
        yield store
        store.close()

    def reopen(self, store: Store) -> Store:
        return open_store(store.address)

    def test_what_lies_beside_is_not_seen(self, place: Place) -> None:
        def at(name: str) -> Store:
            return open_store(place.address.replace(place.prefix, f"{place.prefix}/{name}", 1))

        for name in ["runs", "ru", "run/below"]:
            assert at(name).put_new("a", [b"x"])
        assert listed(at("run")) == {"below/a": 1}

    def test_names_that_no_store_accepts_are_left_out(self, store: Store, place: Place) -> None:
        for name in ["a b", ".hidden", "a/.hidden", "ü"]:
            place.client().put(name, b"x")
        assert listed(store) == {}


class TestS3(BucketContract):
    @pytest.fixture
    def place(self, s3: Place) -> Place:
        return s3


class TestGcs(BucketContract):
    @pytest.fixture
    def place(self, gcs: Place) -> Place:
        return gcs


@pytest.mark.slow
class TestAzure(BucketContract):
    @pytest.fixture
    def place(self, azure: Place) -> Place:
        return azure


@pytest.mark.ceph
class TestCeph(BucketContract):
    @pytest.fixture
    def place(self, ceph: Place) -> Place:
        return ceph


# -- servers that cannot keep the promise ------------------------------------------------


@pytest.fixture(params=["careless_gcs", pytest.param("careless_s3", marks=pytest.mark.slow)])
def careless(request: pytest.FixtureRequest) -> Place:
    """A place on a server that ignores conditions."""
    return request.getfixturevalue(request.param)


def test_a_server_that_ignores_conditions_is_not_written_to(careless: Place) -> None:
    store = open_store(careless.address)
    with pytest.raises(StoreUnfit, match="replaces an object") as caught:
        store.prepare_writing()
    assert "Reading works" in caught.value.hint
    assert listed(store) == {}


def test_no_run_begins_there(careless: Place) -> None:
    with (
        pytest.raises(StoreUnfit, match="replaces an object"),
        holdfast.CheckpointManager(careless.address) as checkpoints,
    ):
        checkpoints.save(1, {"answer": 42}).result()
    assert listed(open_store(careless.address)) == {}


def test_what_is_there_can_be_read(careless: Place) -> None:
    careless.client().put("log/1", b"x")
    store = open_store(careless.address)
    assert store.get("log/1", max_bytes=ANY) == b"x"


def test_a_server_whose_replies_are_wrong_is_not_written_to(gcp_emulator: Place) -> None:
    """It stores what it is sent, replaces it too, and tells so in a way that nobody understands."""
    impatient = Retry(deadline_s=0)
    store = ObjectStore(gcp_emulator.address, retry=impatient)
    with pytest.raises(StoreError):
        store.prepare_writing()
    with pytest.raises(StoreError):
        store.put_new("log/1", [b"x"])


# -- scratch objects ---------------------------------------------------------------------

DAY_S = 86_400.0


@pytest.fixture(params=["s3", "gcs", pytest.param("azure", marks=pytest.mark.slow)])
def good(request: pytest.FixtureRequest) -> Place:
    """A place on a server that honours conditions."""
    return request.getfixturevalue(request.param)


class Disturbed(ObjectStore):
    """Another process deletes the scratch object after the `at`th request that writes it."""

    at = 0

    def _put(self, *about: Any, **named: Any) -> Any:
        reply = super()._put(*about, **named)
        self.at -= 1
        if self.at == 0:
            ObjectStore(self.address).delete([about[0]])
        return reply


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_scratch_object_may_be_deleted_while_it_is_of_use(good: Place, at: int) -> None:
    """What the server can do is found out all the same."""
    store = Disturbed(good.address)
    store.at = at
    store.prepare_writing()
    assert listed(store) == {}


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_careless_server_is_found_out_all_the_same(careless: Place, at: int) -> None:
    store = Disturbed(careless.address)
    store.at = at
    with pytest.raises(StoreUnfit, match="replaces an object"):
        store.prepare_writing()
    assert listed(store) == {}


@pytest.mark.parametrize(
    "server",
    [
        *("s3", "gcs", "careless_gcs"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("azure", "careless_s3")),
    ],
)
def test_scratch_objects_that_were_left_are_removed(
    request: pytest.FixtureRequest, server: str
) -> None:
    """Old ones, and nothing that only looks like one."""
    place: Place = request.getfixturevalue(server)
    ours = ["probe-0123456789abcdef", "probe-fedcba9876543210"]
    others = ["probe-1", "probe-0123456789abcdef0", "probe-0123456789abcdex", "my-probe"]
    below = ["log/probe-0123456789abcdef"]
    store = ObjectStore(place.address)
    for key in [*ours, *others, *below]:
        place.client().put(key, b"x")
    assert store.remove_debris() == 0
    assert store.remove_debris(thorough=True) == 0  # they may be of use to somebody
    tomorrow = ObjectStore(place.address, clock=lambda: time.time() + DAY_S)
    assert tomorrow.remove_debris() == 0
    assert tomorrow.remove_debris(thorough=True) == 2
    assert set(listed(store)) == {*others, *below}
    assert tomorrow.remove_debris(thorough=True) == 0


def test_gc_removes_them(good: Place) -> None:
    """Whether the run has this process as its writer, or `holdfast gc` comes for it alone."""
    with holdfast.CheckpointManager(good.address) as checkpoints:
        checkpoints.save(1, {"answer": 42}, block=True)
    tomorrow = ObjectStore(good.address, clock=lambda: time.time() + DAY_S)
    for collect in (
        lambda: holdfast.CheckpointManager(good.address, store=tomorrow).gc(),
        lambda: collect_orphans(Repo(tomorrow), take_over=True),
    ):
        good.client().put("probe-0123456789abcdef", b"x")
        assert collect() == []
        assert not any(key.startswith("probe-") for key in listed(tomorrow))
