"""A real S3 that is nobody's imitation: Ceph's gateway, its monitor and one OSD in memory.

From Debian's packages `radosgw`, `ceph-mon`, `ceph-osd` and `ceph-common`; `make ceph` runs what
is tested against it. It honours `If-None-Match: *` and checks signatures and digests.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

from tests.support.servers.process import DIES_WITH_ITS_STARTER, ServerFailed, running
from tests.support.servers.service import Service

_KEY, _SECRET = "TESTS", "not-a-secret"
_START_S = 60

# One copy of each object, no keys between the daemons (whose wire is then not to be secret), and
# no wish for more disk than tests have.
_CONFIGURATION = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon}]
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail warn = 2
mon data avail crit = 1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 4294967296
mon data = {folder}/mon
osd data = {folder}/osd
keyring = {folder}/keyring
run dir = {folder}
admin socket = {folder}/$name.$pid.asok
log file = {folder}/$name.log
rgw data = {folder}
rgw frontends = beast endpoint=127.0.0.1:{gateway}
"""


@contextmanager
def ceph() -> Iterator[Service]:
    """Ceph with a user and a bucket, while the `with` lasts. Starts in some fifteen seconds."""
    if not shutil.which("radosgw"):
        raise ServerFailed("radosgw is not there: see `make ceph`")
    with (
        tempfile.TemporaryDirectory(prefix="holdfast-ceph-") as folder,
        running(
            [sys.executable, "-m", __name__, folder],
            announces=r"listens on (\d+)",
            within_s=2 * _START_S,
        ) as url,
    ):
        service = Service(
            "s3",
            url,
            {"AWS_ACCESS_KEY_ID": _KEY, "AWS_SECRET_ACCESS_KEY": _SECRET},
            parameters={"region": "us-east-1"},
            checks_digests=True,
        )
        _create_bucket(service)
        yield service


def _create_bucket(service: Service) -> None:
    from botocore.session import Session

    client = Session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=service.endpoint,
        aws_access_key_id=_KEY,
        aws_secret_access_key=_SECRET,
    )
    client.create_bucket(Bucket=service.bucket)
    client.close()


# -- in the process that keeps the daemons -------------------------------------------------


def _free_port() -> int:
    """None of the daemons can be told to take any, and say which."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _run(command: str, *words: str) -> None:
    everything = [*command.split(), *words]
    subprocess.run(everything, check=True, timeout=_START_S, stdout=subprocess.DEVNULL)


def _start(command: str) -> subprocess.Popen[bytes]:
    """A daemon that dies with this process."""
    program, *words = command.split()
    starter = [sys.executable, "-c", DIES_WITH_ITS_STARTER, str(os.getpid())]
    return subprocess.Popen([*starter, shutil.which(program) or program, *words])


def _await_gateway(daemons: list[subprocess.Popen[bytes]], port: int) -> None:
    deadline = monotonic() + _START_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            return opener.open(f"http://127.0.0.1:{port}", timeout=5).close()
        except OSError as error:
            ended = [daemon.args for daemon in daemons if daemon.poll() is not None]
            if ended or monotonic() > deadline:
                raise ServerFailed(f"no gateway: {error}; ended: {ended}") from None
        sleep(0.1)


def main() -> None:
    folder = Path(sys.argv[1])
    port, gateway = _free_port(), _free_port()
    cluster, osd = uuid.uuid4(), uuid.uuid4()
    (folder / "ceph.conf").write_text(
        _CONFIGURATION.format(fsid=cluster, mon=port, gateway=gateway, folder=folder)
    )
    os.chdir(folder)  # which has a name of our own making: no words in it
    os.mkdir("mon")
    os.mkdir("osd")
    everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *")
    _run("ceph-authtool keyring --create-keyring --gen-key -n mon.", *everything[:3])
    _run("ceph-authtool keyring --gen-key -n client.admin", *everything)
    _run(f"monmaptool --create --addv a [v2:127.0.0.1:{port}] --fsid {cluster} monmap")
    _run("ceph-mon -c ceph.conf --mkfs -i a --monmap monmap --keyring keyring")
    daemons = [_start("ceph-mon -c ceph.conf -i a -f")]
    _run(f"ceph -c ceph.conf --connect-timeout {_START_S} osd new {osd}")
    _run(f"ceph-osd -c ceph.conf -i 0 --mkfs --osd-uuid {osd}")
    daemons.append(_start("ceph-osd -c ceph.conf -i 0 -f"))
    _run(
        "radosgw-admin -c ceph.conf user create --uid tests --display-name tests "
        f"--access-key {_KEY} --secret-key {_SECRET}"
    )
    daemons.append(_start("radosgw -c ceph.conf -n client.admin -f"))
    _await_gateway(daemons, gateway)
    print(f"listens on {gateway}", flush=True)
    daemons[-1].wait()


if __name__ == "__main__":
    main()
