"""Looking at real processes: what `/proc` says of them, and what is made of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import which

import pytest

import holdfast
from holdfast.jobs import gather
from holdfast.jobs.facts import Facts
from holdfast.jobs.findings import findings
from holdfast.manager.listing import Listing

PROGRAM = """
import json, os
from holdfast.jobs.gather import gather
facts = gather({"PATH": os.environ["PATH"]})
print(json.dumps([[sorted(p.ignored), sorted(p.blocked), list(p.argv), p.script, p.pid]
                  for p in facts.ancestors]))
"""


def ancestors(*command: str, **options: object) -> list[list[object]]:
    import json

    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_a_shell_and_nohup_leave_behind(tmp_path: Path) -> None:
    (tmp_path / "look.py").write_text(PROGRAM)
    text = f"trap '' TERM USR1\n{sys.executable} look.py\ntrue\n"
    (tmp_path / "job.sh").write_text(text)
    me, shell, *_ = ancestors("nohup", "bash", "job.sh", cwd=tmp_path)
    assert {"SIGTERM", "SIGUSR1", "SIGHUP"} <= set(me[0])  # type: ignore[arg-type]
    assert (shell[2], shell[3]) == (["bash", "job.sh"], text)


def test_blocked_signals_are_seen(tmp_path: Path) -> None:
    (tmp_path / "look.py").write_text(PROGRAM)
    block = "import os,signal,sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]);"
    me, *_ = ancestors(
        sys.executable, "-c", f"{block} os.execv(sys.executable, [sys.executable, 'look.py'])",
        cwd=tmp_path,
    )  # fmt: skip
    assert me[1] == ["SIGTERM"]


# Not everybody may make namespaces: there is no such test where the kernel says no.
_SPACES = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
if which("unshare") and not subprocess.run([*_SPACES, "true"], capture_output=True).returncode:

    def test_the_first_process_of_a_container(tmp_path: Path) -> None:
        """In a PID namespace of its own, as in a container."""
        (tmp_path / "look.py").write_text(PROGRAM)
        program = f"{sys.executable} look.py"
        me, shell = ancestors(*_SPACES, "sh", "-c", f"{program}; true", cwd=tmp_path)
        assert (shell[4], str(shell[3]).endswith("look.py; true")) == (1, True)
        [me] = ancestors(*_SPACES, "sh", "-c", f"exec {program}", cwd=tmp_path)
        assert me[4] == 1


def test_a_script_that_is_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert gather._regular(str(tmp_path / "pipe")) == ""
    assert gather._regular("/dev/stdin") == ""


def fake(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_slurm_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    fake(tmp_path, "scontrol", "echo 'KeepAliveTime = 9'; echo 'KillWait                = 45 sec'")
    found = gather.gather({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "0"}).slurm
    assert found is not None
    assert (found.job, found.step, found.kill_wait_s) == ("7", False, 45.0)
    assert found.left_s is not None
    assert found.left_s < 0
    fake(tmp_path, "scontrol", "exit 1")
    found = gather.gather({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}).slurm
    assert found is not None
    assert (found.step, found.left_s, found.kill_wait_s) == (True, None, None)


def test_a_program_that_does_not_answer_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gather, "_TIMEOUT_S", 0.05)
    fake(tmp_path, "scontrol", "exec sleep 60")
    assert gather._output("scontrol") == ""
    assert gather._output("no-such-program-here") == ""


def test_kubernetes_and_a_machine_without_proc(tmp_path: Path) -> None:
    variables = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    facts = gather.gather(variables, proc=tmp_path, dmi=tmp_path)
    assert facts == Facts((), container="Kubernetes", kubernetes=True)
    for text, grace_s in (("45s", 45.0), ("80", 80.0), ("x", None), (" ", None)):
        assert gather.gather({"HOLDFAST_GRACE": text}, dmi=tmp_path).grace_s == grace_s


def test_systemds_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    fake(tmp_path, "systemctl", "echo TimeoutStopUSec=1min 30s; echo KillMode=mixed")
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("0::/system.slice/train.service\n")
    unit = gather.gather({}, proc=tmp_path, dmi=tmp_path).unit
    assert unit is not None
    assert (unit.name, unit.stop_s, unit.kill_mode) == ("train.service", 90.0, "mixed")


def test_metadata_services_are_asked_once(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    class Service(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            asked.append((self.command, self.path))
            self.send_response(403 if self.command == "PUT" else 200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"127.0.0.1:{server.server_address[1]}"
        variables = {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{where}",
            "GCE_METADATA_HOST": where,
            "HOLDFAST_NOTICE_FILE": "/run/notice",
            "http_proxy": "http://127.0.0.1:1",
        }
        aws, gcp, file = gather.gather(variables, dmi=tmp_path).sources
        server.shutdown()
    assert aws.error == f"http://{where}: HTTP 403"
    assert (gcp.error, file.error) == ("", "")
    assert asked == [
        ("PUT", "/latest/api/token"),
        ("GET", "/computeMetadata/v1/instance/preempted"),
    ]
    [gone] = gather.gather({"GCE_METADATA_HOST": where}, dmi=tmp_path).sources
    assert "refused" in gone.error


def test_a_token_that_does_not_come_through_to_a_container(tmp_path: Path) -> None:
    """Connected, and then nothing: so it looks where the answer may take one hop only."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"http://127.0.0.1:{silent.getsockname()[1]}"
        facts = gather.gather({"AWS_EC2_METADATA_SERVICE_ENDPOINT": where}, dmi=tmp_path)
    container = replace(facts, container="/.dockerenv")
    [found] = [one for one in findings(container) if one.check == "notices"]
    assert found.state == "warning"
    assert "--http-put-response-hop-limit 2" in found.do


def test_every_signal_has_its_bit() -> None:
    for one in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR2):
        assert gather.signals_in(f"{1 << (one - 1):016x}") == {one.name}


def test_a_run_and_its_disk(tmp_path: Path) -> None:
    with holdfast.CheckpointManager(tmp_path / "run", keep="last=2") as manager:
        for step in (1, 2, 3):
            manager.save(step, {"x": bytes(5000 + step)}, block=True)
        manager.tag(3, "gold")
    with Listing(tmp_path / "run") as run:
        saves, space = gather.of_run(run)
        assert saves.p95_s is not None
        assert 0 < saves.p95_s < 60
        assert space is not None
        assert (space.keep, space.protected) == ("last=2", 1)
        assert 5000 < space.state_bytes < 20_000  # with the random state of PyTorch, if loaded
        assert space.stored_bytes >= 2 * 5000
        assert space.free_bytes > 0
        _, other = gather.of_run(run, keep="last=9")
        assert other is not None
        assert other.keep == "last=9"


def test_a_run_that_is_in_no_folder() -> None:
    with holdfast.CheckpointManager("memory://doctor-gather") as manager:
        manager.save(1, {"x": 1}, block=True)
        with Listing("memory://doctor-gather") as run:
            assert gather.of_run(run)[1] is None
