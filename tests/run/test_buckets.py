"""Jobs whose run is in a bucket: damage in it, outages, forked children."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import obstore
import pytest
import torch

import holdfast
from holdfast.cli import main
from holdfast.errors import CorruptionError, HoldfastError, NoIntactCheckpoint, SaveFailed
from holdfast.manager import packer, snapshot, staging
from holdfast.stores.object import ObjectStore
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.hours import Hours
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
    """Of every pack, every manifest and the two entries that count; each kind of file in every
    way, one file in every other (in `make exhaustive`, in every one)."""
    interrupted(s3)
    keys = [*objects(s3, "packs/"), *objects(s3, "manifests/"), *objects(s3, "log/")[-2:]]
    assert len(keys) >= 8
    with holdfast.CheckpointManager(s3.address) as ckpts:
        right = {info.step: ckpts.load(info.step)["losses"] for info in ckpts.checkpoints()}
    assert list(right) == [2, 4, 6]
    assert main(["verify", s3.address]) == 0
    for number, key in enumerate(keys):
        for kind in DAMAGE if EXHAUSTIVE else list(DAMAGE)[number % 2 :: 2]:
            data = damage(s3, key, kind)
            where = f"{key}: {kind}"
            if key.startswith("log/"):
                # Without its newest entry it is an older log, and whole.
                whole = (key, kind) == (keys[-1], "deleted")
                # 6: nothing is wrong but with where the tests run, such as in the background.
                assert main(["doctor", s3.address]) in ((0, 6) if whole else (4,)), where
            else:
                assert main(["verify", s3.address]) == 4, where
            with holdfast.CheckpointManager(s3.address) as ckpts:
                loaded = {"weights": np.zeros(2000), "frozen": np.zeros(1000), "losses": []}
                ckpts.restore(loaded)
                assert loaded["losses"] in (right[4], right[6]), where
            obstore.put(s3.client(), key, data, use_multipart=False)
    assert main(["verify", s3.address]) == 0


@pytest.mark.parametrize("server", ["s3", pytest.param("gcs", marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("kind", ["middle bit", "deleted"])
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


# -- outages -----------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "BLOCK_BYTES", 8192)
    monkeypatch.setattr(packer, "OWN_PACK_BYTES", 2 * 8192)
    monkeypatch.setattr(snapshot, "SMALL_BYTES", 4096)


def blocks_are_back(run: holdfast.Run) -> bool:
    memory = run.manager._staging
    return len(memory._free) * staging.BLOCK_BYTES == memory.nbytes


def behind_a_network(
    place: Place, faulty: Faulty, **settings: Any
) -> tuple[holdfast.Run, FaultProxy, Hours]:
    behind, proxy = faulty(place)
    hours = Hours()
    store = ObjectStore(behind.address, retry=hours.retry())
    run = holdfast.Run(
        behind.address, store=store, every=1, **{"keep": None, "quiet": True, **settings}
    )
    return run, proxy, hours


@pytest.mark.parametrize("server", ["s3", "gcs"])
def test_training_goes_on_through_an_hour_of_outage(
    request: pytest.FixtureRequest, faulty: Faulty, server: str, small_blocks: None, caplog: Any
) -> None:
    place = request.getfixturevalue(server)
    run, proxy, hours = behind_a_network(place, faulty, max_save_failures=100)
    steps = 45
    whole = train(holdfast.Run("memory://whole-hour", every=None, quiet=True), steps)
    down: list[float] = []
    lost: list[int] = []
    memory: set[int] = set()
    memory_before: list[int] = []

    def at_step(step: int) -> None:
        run.manager.wait()
        assert blocks_are_back(run)
        memory.add(run.manager._staging.nbytes)
        if step == 4:
            memory_before.append(run.manager._staging.nbytes)
            down.append(hours.now)
            proxy.go_down()
        elif not proxy.is_up:
            lost.append(step)
            if hours.now - down[0] > 3600:
                proxy.come_back()

    with run:
        assert train(run, steps, at_step=at_step) == whole
    assert hours.now - down[0] > 3600
    assert 15 < len(lost) < 35
    assert max(memory) <= memory_before[0] + staging.BLOCK_BYTES
    with holdfast.CheckpointManager(place.address) as ckpts:
        found = [info.step for info in ckpts.checkpoints()]
        assert found == [step for step in range(1, steps + 1) if step not in lost]
        assert all(result.ok for result in ckpts.verify())
        assert ckpts.load()["losses"] == whole
    assert sum("the save of step" in record.getMessage() for record in caplog.records) == len(lost)


def test_too_many_saves_in_a_row_that_fail_stop_the_job(s3: Place, faulty: Faulty, caplog) -> None:
    run, proxy, _ = behind_a_network(s3, faulty, max_save_failures=3)

    def at_step(step: int) -> None:
        run.manager.wait()
        if step == 4:
            proxy.go_down()

    with pytest.raises(SaveFailed, match=r"3 saves of s3://.* in a row have failed") as caught, run:
        train(run, 20, at_step=at_step)
    assert re.search("cannot write '(packs|manifests)/", caught.value.message)
    assert "error sending request" in caught.value.message
    proxy.come_back()
    with holdfast.CheckpointManager(s3.address) as ckpts:
        assert [info.step for info in ckpts.checkpoints()] == [1, 2, 3, 4]
        assert all(result.ok for result in ckpts.verify())


def test_credentials_that_expire_are_told_and_renewed(s3: Place, faulty: Faulty, caplog) -> None:
    run, proxy, hours = behind_a_network(s3, faulty, max_save_failures=5)

    def at_step(step: int) -> None:
        run.manager.wait()
        if step == 3:
            proxy.fail(faults.expired_token(), times=None)
        if step == 5:
            proxy.heal()

    with run:
        train(run, 8, at_step=at_step)
    assert hours.sleeps == []
    assert "ExpiredToken" in caplog.text
    with holdfast.CheckpointManager(s3.address) as ckpts:
        assert [info.step for info in ckpts.checkpoints()] == [1, 2, 3, 6, 7, 8]


# -- forks -------------------------------------------------------------------------------


def in_a_fork(work: Callable[[], str]) -> str:
    """What `work` returns in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            os.write(writer, work().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        ready, _, _ = select.select([pipe], [], [], 30)
        if not ready:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert ready, "the child hangs"
        return pipe.read().decode()


def refused(work: Callable[[], object]) -> str:
    try:
        work()
    except HoldfastError as error:
        return f"{type(error).__name__}: {error.message} {error.hint}"
    return "it worked"


def test_a_forked_child_is_told_that_it_cannot(s3: Place) -> None:
    """Its parent's connections are driven by threads that it has not: it would wait for ever."""
    parents = ObjectStore(s3.address)
    parents.put_new("a", [b"x"])
    for work in (
        lambda: ObjectStore(s3.address).size("a"),
        lambda: parents.size("a"),
        lambda: parents.put_new("b", [b"x"]),
        lambda: list(parents.list("")),
        lambda: holdfast.CheckpointManager(s3.address).checkpoints(),
        lambda: holdfast.open(s3.address),
    ):
        told = in_a_fork(lambda work=work: refused(work))
        assert told.startswith("StoreUnavailable"), told
        assert "forked" in told
        assert '"spawn"' in told
    assert parents.size("a") == 1


FORKS = """
import gc, os, sys
from holdfast.stores.object import ObjectStore
store = ObjectStore(sys.argv[1])
store.put_new("a", [b"x"])
for _ in range(3):
    child = os.fork()
    if child == 0:
        del store
        gc.collect()
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert store.size("a") == 1
print("well")
"""


def test_children_that_only_end_harm_nobody(s3: Place) -> None:
    """They have copies of their parent's connections, and finalize them."""
    command = [sys.executable, "-c", FORKS, s3.address]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.returncode) == ("well\n", 0), done.stderr


def test_loader_workers_disturb_nothing(s3: Place) -> None:
    """They are forked in the middle of a save, epoch after epoch."""

    def job(address: str) -> list[float]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        data = torch.utils.data.TensorDataset(torch.arange(48.0).reshape(12, 4))
        loader = torch.utils.data.DataLoader(
            data, batch_size=3, shuffle=True, num_workers=2, multiprocessing_context="fork"
        )
        losses: list[float] = []
        with holdfast.Run(address, every=1, keep="last=2", quiet=True) as run:
            run.track(model=model, optimizer=optimizer, data=loader)
            for _ in run.epochs(3):
                for (batch,) in run.batches(loader):
                    loss = model(batch).square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.item())
        return losses

    whole = job("memory://whole-with-workers")
    assert job(s3.address) == whole
    with holdfast.CheckpointManager(s3.address) as ckpts:
        assert ckpts.info().step == 12
        assert all(result.ok for result in ckpts.verify())
