"""A real Slurm of two nodes on this machine, by Debian's `slurmctld`, `slurmd`, `slurm-client`.

Their build may have several `slurmd` on one host. Who asks is not checked (`auth/none`): all of it
listens on this machine, for as long as a test lasts. Needs root, as `slurmd` does.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

WAIT_S = 180.0

_CONFIGURATION = """\
ClusterName=tests
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=30
SchedulerParameters=batch_sched_delay=0,sched_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@dataclass
class Slurm:
    """Commands of Slurm, and what its jobs wrote."""

    folder: Path
    environment: dict[str, str]

    def call(self, *command: str, must: bool = True) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0 or not must, done.stdout
        return done.stdout

    def submit(self, script: str) -> str:
        """The number of the job, whose files are in the folder."""
        (self.folder / "job.sh").write_text(script)
        return self.call("sbatch", "--parsable", "job.sh").strip()

    def state(self, job: str) -> str:
        """As Slurm calls it: PENDING, RUNNING, COMPLETED, …"""
        shown = dict(
            word.split("=", 1)
            for word in self.call("scontrol", "show", "job", job).split()
            if "=" in word
        )
        return shown["JobState"]

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.out")))

    def until(self, is_so: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT_S
        while not is_so():
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    def until_queued_again(self, job: str) -> None:
        """Slurm lets a job that was put back wait for two minutes; this does not."""
        self.until(lambda: self.state(job) == "PENDING")
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now")


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """The cluster, whose jobs start in `folder`, while the `with` lasts."""
    if not shutil.which("slurmctld"):
        raise RuntimeError("slurmctld is not there: see `make slurm`")
    with ExitStack() as stack:
        own = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="holdfast-slurm-")))
        taken = [stack.enter_context(socket.socket()) for _ in range(3)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in taken]
        for one in taken:
            one.close()
        configuration = own / "slurm.conf"
        configuration.write_text(_CONFIGURATION.format(folder=own, ports=ports))
        cluster = Slurm(
            folder,
            {
                **os.environ,
                "SLURM_CONF": str(configuration),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "OMP_NUM_THREADS": "1",
            },
        )
        # Ranks meet on the first node: its name is to be found by what runs there, and only there.
        names = Path("/etc/hosts").read_text() + "\n127.0.0.1 node1 node2\n"
        (own / "hosts").write_text(names)
        hosts = f'mount --bind {own}/hosts /etc/hosts && exec "$@"'
        for words in (["slurmctld"], ["slurmd", "-Nnode1"], ["slurmd", "-Nnode2"]):
            log = stack.enter_context((own / f"{words[-1]}.log").open("w"))
            daemon = subprocess.Popen(
                ["unshare", "-m", "sh", "-c", hosts, "sh", *words, "-D", "-f", str(configuration)],
                env=cluster.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            stack.callback(daemon.wait, 30)
            stack.callback(daemon.terminate)
        ready = ("sinfo", "-h", "-o", "%t %D")
        cluster.until(lambda: cluster.call(*ready, must=False).strip() == "idle 2")
        try:
            yield cluster
        finally:
            cluster.call("scancel", "--user", "root")
            cluster.until(lambda: not cluster.call("squeue", "-h").strip())
