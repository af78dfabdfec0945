"""Buckets keep what every store promises, and those that cannot are not written to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import holdfast
from holdfast.errors import StoreError, StoreUnfit
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
