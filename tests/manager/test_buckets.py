"""Runs on buckets: requests that fail, damage, outages."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.errors import Fenced, HoldfastError, SaveFailed, StoreUnavailable
from holdfast.stores.object import ObjectStore
from tests.kill.driver import wait_until
from tests.manager.faulty_bucket import Bucket, state
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.servers import faults

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
