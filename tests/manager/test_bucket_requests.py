"""What runs on buckets ask for: each request costs money, and what it takes to answer."""

from __future__ import annotations

import threading
from collections import Counter
from itertools import groupby

import numpy as np
import pytest

from tests.manager.faulty_bucket import Bucket, asked, state
from tests.support.servers import faults

# A pack and a manifest at the same time.
DATA = ["PUT packs", "PUT manifests"]
# A log entry, and what shows that it is the newest: that its parent is there, and nothing above.
SAVE = [*DATA, "PUT log", "GET own log", "GET list log"]
READ = ["GET list log", "GET log", "GET log", "GET list log"]
"""The newest entry and its parent, and that none is above."""
PROBE = ["PUT probe-", "PUT probe-", "DELETE probe-"]
"""What the server can do."""
NEWER = ["PUT log", "GET log", "GET list log"]
"""One more entry, on top of another process's."""
LEFT = ["packs", "segments", "fragments", "manifests"]
"""Where dead processes may have left something."""


def as_asked(bucket: Bucket, requests: list[str]) -> list[str]:
    """The requests as the server at hand gets them."""
    scheme = bucket.place.service.scheme
    found: list[str] = []
    for request in requests:
        if request == "GET own log":  # the listing says it where it tells MD5 digests
            if scheme == "az":
                found.append("GET log")
            continue
        if request.startswith("DELETE") and scheme != "gs":
            request = "POST"
        refused = request == "PUT probe-" and "GET probe-" in found
        found.append(request)
        # Azure's entity tags are no digests: what was put is read again.
        if request.startswith("PUT") and scheme == "az" and not refused:
            found.append(request.replace("PUT", "GET"))
    return in_order(found)


def in_order(found: list[str]) -> list[str]:
    """With those sorted that are on their way at the same time."""
    groups = groupby(found, lambda request: request[4:] in ("packs", "manifests"))
    return [each for together, some in groups for each in (sorted(some) if together else some)]


def test_a_save_asks_for_four_things(bucket: Bucket) -> None:
    with bucket.manager(keep=None) as ckpts:
        ckpts.save(1, state(1), block=True)
        ckpts.wait()  # it has begun its history, too
        for step in range(2, 9):  # the servers list nine entries on one page
            bucket.proxy.forget()
            ckpts.save(step, state(step), block=True)
            assert in_order(asked(bucket.proxy)) == as_asked(bucket, SAVE)


def test_the_first_save_begins_the_run_with_nine_more(bucket: Bucket) -> None:
    """What the server can do; that there is no run; which one it is; its first entry."""
    with bucket.manager(keep=None) as ckpts:
        ckpts.save(1, state(1), block=True)
        ckpts.wait()
        begun = ["GET holdfast.json", "GET list log", "GET list manifests", "PUT holdfast.json"]
        first = [*PROBE, *begun, "PUT log", "GET list log", *SAVE, "GET events"]
        assert in_order(asked(bucket.proxy)) == as_asked(bucket, first)


@pytest.mark.parametrize("restores", [True, False])
def test_what_a_process_asks_for_that_goes_on(bucket: Bucket, restores: bool) -> None:
    """A restore reads the log once. The first save opens the run, and looks once for what dead
    processes have left; nothing that is known is asked for again."""
    with bucket.manager(keep=None) as ckpts:
        ckpts.save(1, state(1), block=True)
    bucket.proxy.forget()
    with bucket.manager(keep=None) as ckpts:
        if restores:
            ckpts.restore(state(0))
            packs = ["HEAD packs", "GET packs"]
            assert asked(bucket.proxy) == ["GET holdfast.json", *READ, "GET manifests", *packs]
            bucket.proxy.forget()
        ckpts.save(2, state(2), block=True)
        ckpts.wait()
        # Where the newest entry was is known after a restore; what it says is read anew.
        before = READ[1:] if restores else ["GET holdfast.json", *READ]
        left = [*(f"GET list {kind}" for kind in LEFT), *READ[1:]]
        opening = [*PROBE, *before, "HEAD log", *NEWER]
        if restores:
            first = [*opening, "GET events", *left, *SAVE]
        else:
            first = [*opening, *left, "GET manifests", *SAVE, "GET events"]
        assert in_order(asked(bucket.proxy)) == as_asked(bucket, first)


def test_retention_deletes_in_one_request_where_there_is_one(bucket: Bucket) -> None:
    """S3 and Azure take a list of what is to be deleted; GCS is asked for each object."""
    together = bucket.place.service.scheme != "gs"
    deletions = ["POST"] if together else ["DELETE manifests", "DELETE packs"]
    with bucket.manager(keep="last=2") as ckpts:
        for step in range(1, 5):
            ckpts.save(step, state(step), block=True)
            ckpts.wait()
        for step in range(5, 9):
            bucket.proxy.forget()
            ckpts.save(step, state(step), block=True)
            ckpts.wait()
            found = asked(bucket.proxy)
            at = len(found) - len(deletions)
            assert in_order(found[:at]) == as_asked(bucket, SAVE)
            assert sorted(found[at:]) == deletions


def test_who_waits_for_a_save_does_not_wait_for_retention(bucket: Bucket) -> None:
    method = "DELETE" if bucket.place.service.scheme == "gs" else "POST"
    with bucket.manager(keep="last=1") as ckpts:
        ckpts.save(1, state(1), block=True)
        bucket.proxy.forget()
        goes_on = threading.Event()
        rule = bucket.proxy.fail(faults.held(goes_on), method=method)
        ckpts.save(2, state(2), block=True)
        rule.wait()
        assert all(each.status is None for each in bucket.proxy.exchanges(method=method))
        goes_on.set()
    assert bucket.proxy.exchanges(method=method)[0].status in (200, 202, 204)


def test_large_states_need_a_request_for_each_pack(bucket: Bucket) -> None:
    mib = 1 << 20
    with bucket.manager(keep=None) as ckpts:
        ckpts.save(1, {"x": np.zeros(1)}, block=True)
        ckpts.wait()
        bucket.proxy.forget()
        big = {f"x{n}": np.random.default_rng(n).bytes(12 * mib) for n in range(7)}
        ckpts.save(2, big, block=True)
        counted = Counter(asked(bucket.proxy))
        packs = counted.pop("PUT packs")
        sent = [each.sent_bytes for each in bucket.proxy.exchanges(method="PUT", target="/packs/")]
        assert counted.pop("HEAD packs", 0) in (0, packs)
        assert 3 <= packs <= 4
        assert max(sent) <= 33 * mib
        assert sum(sent) == pytest.approx(84 * mib, rel=0.01)
        counted.pop("GET manifests", None)  # Azure
        counted.pop("GET log", None)
        assert sorted(counted) == ["GET list log", "PUT log", "PUT manifests"]
