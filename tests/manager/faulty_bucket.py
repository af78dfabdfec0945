"""A run on a bucket, behind a network that can be made to fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.repo import log
from holdfast.stores.object import ObjectStore
from tests.repo.support import check
from tests.support.hours import Hours
from tests.support.servers.proxy import FaultProxy
from tests.support.servers.service import Place

Faulty = Callable[[Place], tuple[Place, FaultProxy]]


class Bucket:
    """A run on a bucket behind a network that fails."""

    def __init__(self, place: Place, behind: Place, proxy: FaultProxy) -> None:
        self.place = place
        self.behind = behind
        self.proxy = proxy
        self.hours = Hours()

    def manager(self, *, deadline_s: float = 120.0, **options: Any) -> holdfast.CheckpointManager:
        store = ObjectStore(self.behind.address, retry=self.hours.retry(deadline_s=deadline_s))
        return holdfast.CheckpointManager(
            store.address, store=store, **{"keep": "last=2", **options}
        )

    def direct(self, **options: Any) -> holdfast.CheckpointManager:
        return holdfast.CheckpointManager(self.place.address, **{"keep": None, **options})

    def steps(self) -> list[int]:
        """Of the checkpoints that anybody sees. Fails unless every byte is right."""
        steps = check(ObjectStore(self.place.address))
        with self.direct() as ckpts:
            for step in steps:
                assert equal(ckpts.load(step), state(step)), step
        return steps


AZURE = pytest.param("azure", marks=pytest.mark.slow)
CEPH = pytest.param("ceph", marks=pytest.mark.ceph)


@pytest.fixture(params=["s3", "gcs", AZURE, CEPH])
def bucket(
    request: pytest.FixtureRequest, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bucket]:
    monkeypatch.setattr(log, "_CREATE_BACKOFF_S", 0.0)
    place = request.getfixturevalue(request.param)
    bucket = Bucket(place, *faulty(place))
    yield bucket
    bucket.proxy.heal()


def state(step: int) -> dict[str, Any]:
    return {
        "weights": np.random.default_rng(step).integers(0, 255, 5000, np.uint8),
        "frozen": np.arange(3000),
        "step": step,
    }


def equal(found: Any, expected: dict[str, Any]) -> bool:
    return all(np.array_equal(found[name], value) for name, value in expected.items())


def asked(proxy: FaultProxy) -> list[str]:
    """The requests, as method and kind of object."""
    found: list[str] = []
    for exchange in proxy.exchanges():
        kinds = ["packs", "manifests", "log", "events", "segments", "fragments"]
        kinds += ["probe-", "holdfast.json"]
        kind = next((kind for kind in kinds if f"/{kind}" in exchange.target), "")
        if exchange.method == "GET" and "prefix=" in exchange.target:
            kind = f"list {kind or exchange.target}"
        found.append(f"{exchange.method} {kind}".strip())
    return found
