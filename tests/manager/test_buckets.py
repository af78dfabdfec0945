"""Runs on buckets: what a save asks for, requests that fail, damage, outages."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from itertools import groupby, product
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.errors import Fenced, HoldfastError, SaveFailed, StoreUnavailable
from holdfast.repo import log
from holdfast.stores.object import ObjectStore
from tests.kill.driver import wait_until
from tests.repo.support import check
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.hours import Hours
from tests.support.servers import faults
from tests.support.servers.proxy import FaultProxy
from tests.support.servers.service import Place

Faulty = Callable[[Place], tuple[Place, FaultProxy]]


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_CREATE_BACKOFF_S", 0.0)


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
def bucket(request: pytest.FixtureRequest, faulty: Faulty) -> Iterator[Bucket]:
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


# -- what a save asks for ------------------------------------------------------------------

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


# -- requests that fail --------------------------------------------------------------------

FAULTS = {
    "dropped": faults.dropped(),
    "lost reply": faults.lost_reply(),
    "503": faults.slow_down(),
    "500": faults.internal_error(),
    "truncated": faults.truncated(20),
    "refused": faults.expired_token(),
}


def save(ckpts: holdfast.CheckpointManager, step: int) -> bool:
    """Whether it was reported durable."""
    try:
        ckpts.save(step, state(step)).result()
    except HoldfastError:
        return False
    finally:
        ckpts.wait()
    return True


QUICK = [("lost reply", False), ("503", True)]
SERVERS = ["s3", "gcs", "azure", "ceph"]


def cases(names: Collection[Any], quick: Collection[Any] = ()) -> list[Any]:
    """On each server each of `names`, patient or impatient; both in `make exhaustive`."""
    found: list[Any] = []
    for (at, server), (number, name) in product(enumerate(SERVERS), enumerate(names)):
        slow = pytest.mark.ceph if server == "ceph" else pytest.mark.slow
        for patient, word in ((True, "patient"), (False, "impatient")):
            is_quick = server in ("s3", "gcs") and (name, patient) in quick
            if is_quick or EXHAUSTIVE or server == "ceph" or (at + number) % 2 == patient:
                marks = [] if is_quick else slow
                id = f"{server}-{name}-{word}"
                found.append(pytest.param(server, name, patient, id=id, marks=marks))
    return found


@pytest.mark.parametrize(("bucket", "fault", "patient"), cases(FAULTS, QUICK), indirect=["bucket"])
def test_any_request_of_a_save_may_fail(bucket: Bucket, fault: str, patient: bool) -> None:
    """What was reported saved is, whole; what was not is whole or absent; the next works."""
    with bucket.manager(deadline_s=120 if patient else 0) as ckpts:
        for step in (1, 2, 3):
            assert save(ckpts, step)
        bucket.proxy.forget()
        assert save(ckpts, 4)
        requests = bucket.proxy.count()
        assert requests >= 5
        step = 4
        for number in range(requests):
            step += 2
            rule = bucket.proxy.fail(FAULTS[fault], skip=number)
            done = save(ckpts, step - 1)
            bucket.proxy.heal()
            found = bucket.steps()
            where = f"request {number}: {fault}"
            assert rule.met == 1, where
            if done:
                assert found[-1] == step - 1, where
            else:
                assert found[-1] in (step - 2, step - 1), where
            if patient and fault != "refused":
                assert done, where
            assert save(ckpts, step), where
            assert bucket.steps()[-1] == step, where
        ckpts.gc()
        assert leftovers(bucket) == []


@pytest.mark.parametrize(("bucket", "first", "patient"), cases([0, 1, 2]), indirect=["bucket"])
def test_any_request_of_the_first_save_may_fail(bucket: Bucket, patient: bool, first: int) -> None:
    """The run begins, or does not, and can be begun again. A third of the requests each."""
    fault = FAULTS[["dropped", "lost reply", "500"][first]]
    number = first
    met = 1
    while met:
        clear(bucket)
        rule = bucket.proxy.fail(fault, skip=number)
        where = f"request {number}: {fault}"
        try:
            with bucket.manager(deadline_s=120 if patient else 0) as ckpts:
                done = save(ckpts, 1)
        except HoldfastError:
            done = False
        bucket.proxy.heal()
        if patient:
            assert done, where
        with bucket.manager() as ckpts:
            assert save(ckpts, 2), where
            ckpts.gc()
        assert bucket.steps() in ([1, 2], [1, 2] if done else [2]), where
        assert leftovers(bucket) == [], where
        met = rule.met
        number += 3
    assert number > 15


@pytest.mark.slow
@pytest.mark.parametrize("waits", [True, False], ids=["landed", "on its way"])
def test_an_entry_may_land_long_after_it_was_given_up(bucket: Bucket, waits: bool) -> None:
    """The next save finds it, or takes its number first; nothing is lost or half there."""
    lands = threading.Event()
    with bucket.manager(deadline_s=0, keep=None) as ckpts:
        for step in (1, 2):
            assert save(ckpts, step)
        tries = bucket.proxy.count(method="PUT", target="/log/")
        late = bucket.proxy.fail(faults.given_up(lands), method="PUT", target="/log/", times=4)
        assert not save(ckpts, 3)
        assert late.met
        assert bucket.steps() == [1, 2]
        bucket.proxy.heal()

        def landed() -> bool:
            sent = bucket.proxy.exchanges(method="PUT", target="/log/")[tries : tries + late.met]
            return all(exchange.server_status is not None for exchange in sent)

        if waits:
            lands.set()
            wait_until(landed)
            assert bucket.steps() == [1, 2, 3]
        assert save(ckpts, 4)
        lands.set()
        wait_until(landed)
        assert bucket.steps() in ([1, 2, 4], [1, 2, 3, 4])
        assert save(ckpts, 5)
        assert bucket.steps() in ([1, 2, 4, 5], [1, 2, 3, 4, 5])
        ckpts.gc()
    assert leftovers(bucket) == []
    assert bucket.steps()[-1] == 5


@pytest.mark.parametrize("target", ["/packs/", "/manifests/"])
def test_what_arrives_changed_is_sent_again(
    bucket: Bucket, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By the store if the server says so, else by the save, which gives it another name."""
    with bucket.manager() as ckpts:
        for step, at in enumerate((0, 100, 400)):
            rule = bucket.proxy.fail(faults.wrong_upload(at), method="PUT", target=target)
            assert save(ckpts, step)
            assert rule.met == 1
            assert bucket.steps()[-1] == step
        ckpts.gc()
    refused = bucket.place.service.checks_digests
    assert caplog.text.count("once more") == (0 if refused else 3)
    assert leftovers(bucket) == []


@pytest.mark.parametrize("target", ["/packs/", "/manifests/"])
def test_a_save_that_arrives_changed_again_fails(bucket: Bucket, target: str) -> None:
    """And the next one is not the worse for it."""
    times = None if bucket.place.service.checks_digests else 2
    with bucket.manager(deadline_s=1) as ckpts:
        assert save(ckpts, 1)
        rule = bucket.proxy.fail(faults.wrong_upload(100), method="PUT", target=target, times=times)
        with pytest.raises(StoreUnavailable):
            ckpts.save(2, state(2)).result()
        assert rule.met >= 2
        bucket.proxy.heal()
        assert bucket.steps() == [1]
        assert save(ckpts, 3)
        assert bucket.steps() == [1, 3]
        ckpts.gc()
    assert leftovers(bucket) == []


def test_what_training_has_changed_is_not_sent_again(bucket: Bucket) -> None:
    """The bytes that a save has read in place are gone after the barrier: it fails, and what
    is stored is of one moment."""
    values = np.arange(100_000.0)
    times = None if bucket.place.service.checks_digests else 1
    with bucket.manager(deadline_s=2) as ckpts:
        ckpts.save(1, {"values": values}, block=True)
        values += 1
        wrong = replace(faults.wrong_upload(100), delay_s=1)
        bucket.proxy.fail(wrong, method="PUT", target="/packs/", times=times)
        pending = ckpts.save(2, {"values": values}, in_place=lambda source, path: True)
        ckpts.drain()
        values += 1
        with pytest.raises(StoreUnavailable):
            pending.result()
        bucket.proxy.heal()
        ckpts.save(3, {"values": values}, block=True)
        assert np.array_equal(ckpts.load(1)["values"], values - 2)
        assert np.array_equal(ckpts.load(3)["values"], values)


@pytest.mark.parametrize("at", [0, 300])
def test_a_log_entry_that_arrives_changed_is_left_out(
    bucket: Bucket, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    """And what it was to say is said by the next: the save is done, and the process goes on."""
    with bucket.manager(keep=None) as ckpts:
        for number in range(3):  # the opening, a save, a save; and the closing
            rule = bucket.proxy.fail(faults.wrong_upload(at), method="PUT", target="/log/")
            assert save(ckpts, number)
            assert rule.met == 1
            assert bucket.steps() == [*range(number + 1)]
        rule = bucket.proxy.fail(faults.wrong_upload(at), method="PUT", target="/log/", times=3)
    assert rule.met == 3
    refused = bucket.place.service.checks_digests  # by the server, and sent again
    assert caplog.text.count("did not arrive as it was sent") == (0 if refused else 6)
    caplog.clear()
    with bucket.manager(keep=None) as ckpts:
        assert save(ckpts, 3)
        ckpts.gc()
    assert caplog.text == ""
    assert bucket.steps() == [0, 1, 2, 3]
    assert leftovers(bucket) == []


def test_a_first_file_that_arrives_changed_is_put_right(
    bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    rule = bucket.proxy.fail(faults.wrong_upload(90), method="PUT", target="/holdfast.json")
    with bucket.manager() as ckpts:
        assert save(ckpts, 1)
        assert save(ckpts, 2)
    assert rule.met == 1
    with bucket.manager() as ckpts:
        assert save(ckpts, 3)
    assert bucket.steps() == [2, 3]
    assert caplog.text == ""


def test_an_entry_that_arrives_changed_while_another_process_takes_over(bucket: Bucket) -> None:
    """One of the two commits next to the wrong entry, and the other one hears of it."""

    def take_over() -> None:
        bucket.hours.after_sleep = lambda: None
        with bucket.direct(take_over=True) as other:
            other.save(3, state(3), block=True)
            assert [info.step for info in other.checkpoints()] == [1, 2, 3]

    with pytest.raises(SaveFailed), bucket.manager(keep=None) as ckpts:
        assert save(ckpts, 1)
        bucket.proxy.fail(faults.wrong_upload(99), method="PUT", target="/log/")
        bucket.proxy.fail(faults.dropped(), method="PUT", target="/log/")  # the next entry
        bucket.hours.after_sleep = take_over
        with pytest.raises(Fenced):
            ckpts.save(2, state(2)).result()
    assert bucket.steps() == [1, 2, 3]


def clear(bucket: Bucket) -> None:
    store = ObjectStore(bucket.place.address)
    store.delete([info.key for info in store.list("")])


def leftovers(bucket: Bucket) -> list[str]:
    """Objects that no checkpoint needs."""
    with bucket.direct() as ckpts:
        needed = {
            f"packs/{pack.name}.safetensors"
            for info in ckpts.checkpoints()
            for pack in ckpts.manifest(info.step).packs
        }
        needed |= {f"manifests/{info.id}.json" for info in ckpts.checkpoints()}
    found = {info.key for info in ObjectStore(bucket.place.address).list("")}
    others = ("log/", "events/", "holdfast.json", "probe-")
    return sorted(key for key in found - needed if not key.startswith(others))
