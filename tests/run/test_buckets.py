"""Jobs whose run is in a bucket: damage in it, outages, forked children."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import obstore
import pytest

import holdfast
from holdfast.cli import main
from holdfast.errors import (
    CorruptionError,
    NoIntactCheckpoint,
)
from holdfast.stores.object import ObjectStore
from tests.support.jobs import Killed, process
from tests.support.servers import faults
from tests.support.servers.proxy import FaultProxy
from tests.support.servers.service import Place

Faulty = Callable[[Place], tuple[Place, FaultProxy]]


def train(
    run: holdfast.Run, steps: int, *, stop: int = -1, at_step: Callable[[int], None] | None = None
) -> list[float]:
    """Losses that depend on every step before, and on random numbers."""
    weights, frozen, losses = np.zeros(2000), np.arange(1000.0), []
    run.track(weights=weights, frozen=frozen, losses=losses)
    np.random.seed(4)
    for step in run.range(steps):
        if at_step is not None:
            at_step(step)
        weights += np.random.rand(2000)
        losses.append(float(weights.sum()))
        run.log(loss=losses[-1])
        if run.step == stop:
            run.manager.wait()
            raise Killed
    return losses


@pytest.fixture
def whole() -> list[float]:
    """The losses of a run that nothing disturbed."""
    return train(holdfast.Run("memory://whole-run-of-buckets", every=None, quiet=True), 8)


# -- damage ------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "first byte": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "middle bit": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0x40]) + data[len(data) // 2 + 1 :]
    ),
    "last byte": lambda data: data[:-1] + bytes([data[-1] ^ 0x80]),
    "truncated": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "deleted": lambda data: None,
}


def damage(place: Place, key: str, kind: str) -> bytes:
    """Damage an object behind everybody's back; its right bytes."""
    client = place.client()
    data = bytes(memoryview(obstore.get(client, key).bytes()))
    wrong = DAMAGE[kind](data)
    if wrong is None:
        obstore.delete(client, key)
    else:
        obstore.put(client, key, wrong, use_multipart=False)
    return data


def interrupted(place: Place) -> None:
    """A job that saved steps 2, 4 and 6 of 8, and was killed."""
    with process():
        run = holdfast.Run(place.address, every=2, keep=None, quiet=True)
        train(run, 8, stop=6)
    run.close()


def objects(place: Place, prefix: str) -> list[str]:
    return sorted(info.key for info in ObjectStore(place.address).list(prefix))


def newest_of(place: Place) -> dict[str, str]:
    """The newest checkpoint's objects, and the newest entry of the log."""
    with holdfast.CheckpointManager(place.address) as ckpts:
        manifest = ckpts.manifest()
        return {
            "pack": f"packs/{manifest.packs[-1].name}.safetensors",
            "manifest": f"manifests/{ckpts.info().id}.json",
            "entry": objects(place, "log/")[-1],
        }


def test_all_damage_in_a_bucket_is_noticed(s3: Place, capfd: Any) -> None:
    """Of every pack, every manifest and the two entries that count, in every way."""
    interrupted(s3)
    keys = [*objects(s3, "packs/"), *objects(s3, "manifests/"), *objects(s3, "log/")[-2:]]
    assert len(keys) >= 8
    with holdfast.CheckpointManager(s3.address) as ckpts:
        right = {info.step: ckpts.load(info.step)["losses"] for info in ckpts.checkpoints()}
    assert list(right) == [2, 4, 6]
    assert main(["verify", s3.address]) == 0
    for key in keys:
        for kind in DAMAGE:
            data = damage(s3, key, kind)
            where = f"{key}: {kind}"
            if key.startswith("log/"):
                # Without its newest entry it is an older log, and whole.
                expected = 0 if (key, kind) == (keys[-1], "deleted") else 4
                assert main(["doctor", s3.address]) == expected, where
            else:
                assert main(["verify", s3.address]) == 4, where
            with holdfast.CheckpointManager(s3.address) as ckpts:
                loaded = {"weights": np.zeros(2000), "frozen": np.zeros(1000), "losses": []}
                ckpts.restore(loaded)
                assert loaded["losses"] in (right[4], right[6]), where
            obstore.put(s3.client(), key, data, use_multipart=False)
    assert main(["verify", s3.address]) == 0


@pytest.mark.parametrize("server", ["s3", "gcs"])
@pytest.mark.parametrize("kind", ["middle bit", "truncated", "deleted"])
@pytest.mark.parametrize("part", ["pack", "manifest", "entry"])
def test_a_damaged_run_goes_on_from_what_is_whole(
    request: pytest.FixtureRequest,
    server: str,
    part: str,
    kind: str,
    whole: list[float],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    place = request.getfixturevalue(server)
    interrupted(place)
    damage(place, newest_of(place)[part], kind)
    np.random.seed(99)
    run = holdfast.Run(place.address, every=2, keep=None)
    assert train(run, 8) == whole
    assert run.resumed is not None
    # What an entry listed is whole, and found again.
    assert run.resumed.step == (6 if part == "entry" else 4)
    assert "resumed" in capfd.readouterr().err
    if (part, kind) != ("entry", "deleted"):
        assert "damaged" in caplog.text
    run.close()


@pytest.mark.parametrize("prefix", ["packs/", "manifests/"])
@pytest.mark.parametrize("kind", ["middle bit", "deleted"])
def test_a_run_without_a_whole_checkpoint_does_not_start_from_zero(
    s3: Place, prefix: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(s3)
    for key in objects(s3, prefix):
        damage(s3, key, kind)
    assert main(["verify", s3.address]) == 4
    run = holdfast.Run(s3.address, quiet=True)
    with pytest.raises(NoIntactCheckpoint):
        train(run, 8)
    assert caplog.text


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_run_whose_log_is_damaged_does_not_start_from_zero(
    s3: Place, kind: str, whole: list[float]
) -> None:
    """Its list is made anew from the checkpoints."""
    interrupted(s3)
    for key in objects(s3, "log/"):
        damage(s3, key, kind)
    with pytest.raises(CorruptionError), holdfast.CheckpointManager(s3.address) as ckpts:
        ckpts.load()
    run = holdfast.Run(s3.address, every=2, keep=None, quiet=True)
    assert train(run, 8) == whole
    assert run.resumed is not None
    assert run.resumed.step == 6
    run.close()


@pytest.mark.parametrize(
    ("target", "byte"),
    [
        ("/packs/", 60),
        ("/packs/", 12_000),
        ("/manifests/", 60),
        ("/manifests/", 900),
        ("/log/", 90),
    ],
)
def test_wrong_bytes_in_transit_never_reach_a_job(
    s3: Place, faulty: Faulty, target: str, byte: int, whole: list[float]
) -> None:
    """Each reply in turn is damaged on its way; what is stored is whole."""
    interrupted(s3)
    behind, proxy = faulty(s3)
    rule = proxy.fail(faults.wrong_reply(byte), method="GET", target=target)
    with holdfast.Run(behind.address, every=2, keep=None, quiet=True) as run:
        assert train(run, 8) == whole
        assert run.resumed is not None
        assert run.resumed.step == 6  # it was read again, and was right
    assert rule.met == 1
    assert main(["verify", s3.address]) == 0
