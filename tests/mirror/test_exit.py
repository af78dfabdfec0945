"""A process ends in time, whatever its mirror does."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.core.threads import share_out
from holdfast.repo.repo import Repo
from holdfast.stores.open import open_store
from tests.mirror.support import WAIT_S
from tests.support.servers.faults import delayed
from tests.support.servers.proxy import FaultProxy
from tests.support.servers.service import Place

GRACE_S = 1.0
Faulty = Callable[[Place], tuple[Place, FaultProxy]]

# Four packs are on their way to a bucket when it ends.
JOB = """
import sys, threading
import numpy as np
import holdfast
from holdfast.manager import mirror, packer

packer.MIRRORED_PACK_BYTES = 100_000
mirror.GRACE_S = float(sys.argv[4])
run = holdfast.CheckpointManager(sys.argv[1], mirror=sys.argv[2], mirror_wait=0.5)
run.save(1, {str(n): np.random.default_rng(n).bytes(90_000) for n in range(8)}).result()
sys.stdin.readline()
names = [thread.name for thread in threading.enumerate()]
assert names.count("holdfast-copy") == 3, names
if sys.argv[3] == "closed":
    run.close()
elif sys.argv[3] == "raises":
    raise SystemExit(3)
"""


@pytest.mark.parametrize("end", ["closed", "left open", "raises"])
def test_a_server_that_accepts_and_never_answers(
    tmp_path: Path, s3: Place, faulty: Faulty, end: str
) -> None:
    place, proxy = faulty(s3)
    rule = proxy.fail(delayed(3600), method="PUT", target="packs/", times=None)
    with subprocess.Popen(
        [sys.executable, "-c", JOB, tmp_path / "run", place.address, end, str(GRACE_S)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        deadline = time.monotonic() + WAIT_S
        while rule.met < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        begun = time.monotonic()
        _, said = job.communicate("go\n", timeout=WAIT_S)
        took_s = time.monotonic() - begun
    assert job.returncode == (3 if end == "raises" else 0), said
    # Requests may last for five minutes each. The rest is for the interpreter's own end.
    assert took_s < (0.5 + GRACE_S if end == "closed" else 0) + 5
    assert ("step 1: only here" in said) == (end == "closed")
    assert [record.step for record in Repo(open_store(str(tmp_path / "run"))).records()] == [1]


def test_threads_that_share_work_keep_no_process_from_its_end() -> None:

    both, found = threading.Barrier(2), dict[str, bool]()

    def work(items: object) -> None:
        both.wait(WAIT_S)
        thread = threading.current_thread()
        found[thread.name] = thread.daemon

    caller = threading.Thread(
        target=share_out,
        args=([1, 2], work),
        kwargs={"threads": 2, "name": "helper"},
        name="caller",
    )
    caller.start()
    caller.join(WAIT_S)
    assert found == {"caller": False, "helper": True}
