"""Jobs whose run is in a bucket, killed with SIGKILL: the server lives on, and so does the run."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from holdfast import CheckpointManager
from holdfast.stores.object import ObjectStore
from tests.kill.driver import (
    OVERLAP,
    PLACES,
    Script,
    differing,
    reference,
)
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.servers.service import Place

# "fsync" is a matter of folders.
SAVING = ("capture", "pack", "manifest", "log", "retention", "restore")


def script_on(place: Place, name: str, folder: Path, *args: str) -> Script:
    address = place.address.replace(place.prefix, f"{place.prefix}/{folder.name}")
    return Script(name, folder, args, address)


def counts_of(place: Place, name: str, folder: Path, *args: str) -> Counter[str]:
    """How often the job passes each point when its run is in a bucket."""
    script = script_on(place, name, folder / "counted", *args)
    script.finish()
    return script.passed()


def check_leftovers(script: Script) -> None:
    """What the killed ones left behind is collected, and nothing else."""
    with CheckpointManager(script.address) as ckpts:
        ckpts.gc()
        infos = ckpts.checkpoints()
        assert infos
        assert all(found.ok for found in ckpts.verify())
        packs = {pack.name for info in infos for pack in ckpts.manifest(info.step).packs}
    store = ObjectStore(script.address)
    found = {info.key for info in store.list("packs/")}
    assert found == {f"packs/{name}.safetensors" for name in packs}
    found = {info.key for info in store.list("manifests/")}
    assert found == {f"manifests/{info.id}.json" for info in infos}
    assert list(store.list("segments/")) == []


def kill_often(
    script: Script, points: tuple[str, ...], counts: Counter[str], chance: random.Random
) -> None:
    """At an early passing of each point, in random order, and once at any moment; at the end
    after the last save."""
    early = [point for point in points if point != "after"]
    for point in chance.sample(early, len(early)):
        assert counts[point] or point == "restore", f"never passed: {point}"
        script.run(f"{point}:{chance.randint(1, max(3, counts[point] // 12))}")
    script.run(kill_after_s=chance.uniform(0.3, 1.0))
    if "after" in points:
        script.run("after:1")


def test_a_job_on_s3_killed_in_every_phase(tmp_path: Path, s3: Place) -> None:
    """It ends with the bits of one in a folder that was left alone."""
    wanted, _ = reference("generic", tmp_path)
    counts = counts_of(s3, "generic", tmp_path)
    script = script_on(s3, "generic", tmp_path / "killed")
    kill_often(script, (*SAVING, "body", "after", "pack", "log"), counts, random.Random(0))
    assert differing(script.finish(), wanted) == []
    assert script.kills.total() >= 8, script.kills
    check_leftovers(script)


SLOW = pytest.mark.slow
ON_S3, ELSEWHERE = (84, 20) if EXHAUSTIVE else (20, 10)
CEPH = pytest.mark.ceph


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("server", "name", "args", "points", "total"),
    [
        pytest.param("s3", "generic", (), (*SAVING, *SAVING, "body", "after"), ON_S3, marks=SLOW),
        pytest.param(
            "s3", "torch_train", ("0",), ("log", "restore", *OVERLAP, *PLACES), 9, marks=SLOW
        ),
        pytest.param("gcs", "generic", (), (*SAVING, "body"), ELSEWHERE, marks=SLOW),
        pytest.param("azure", "generic", (), (*SAVING, "body"), ELSEWHERE, marks=SLOW),
        pytest.param("ceph", "generic", (), (*SAVING, "body"), ELSEWHERE, marks=CEPH),
    ],
    ids=["s3", "s3, torch", "gcs", "azure", "ceph"],
)
def test_a_hundred_kills_on_buckets(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    server: str,
    name: str,
    args: tuple[str, ...],
    points: tuple[str, ...],
    total: int,
) -> None:
    """With those of the quick test, 100 on S3 in `make exhaustive`."""
    place = request.getfixturevalue(server)
    wanted, _ = reference(name, tmp_path, *args)
    counts = counts_of(place, name, tmp_path, *args)
    kills: Counter[str] = Counter()
    for round_ in range(total):
        if kills.total() >= total:
            break
        script = script_on(place, name, tmp_path / f"round{round_}", *args)
        kill_often(script, points, counts, random.Random(round_))
        assert differing(script.finish(), wanted) == [], f"round {round_}: {script.kills}"
        check_leftovers(script)
        kills += script.kills
    assert kills.total() >= total
    assert all(kills[point] for point in points), kills
