"""Buckets keep what every store promises, and those that cannot are not written to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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

    def test_what_lies_beside_is_not_seen(self, store: Store, place: Place) -> None:
        for prefix in [place.prefix + "x", place.prefix[:-1], place.prefix + "/below"]:
            beside = open_store(place.address.replace(place.prefix, prefix))
            assert beside.put_new("a", [b"x"])
        assert listed(store) == {"below/a": 1}

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
