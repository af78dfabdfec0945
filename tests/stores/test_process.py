"""Who this process is, and whether others still live."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from holdfast.core import process
from holdfast.core.records import Holder

SAY_WHO = (
    "import sys, json, msgspec; from holdfast.core import process; "
    "print(msgspec.json.encode(process.current()).decode(), flush=True); sys.stdin.read()"
)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """A process that says who it is and waits."""
    started = subprocess.Popen(
        [sys.executable, "-c", SAY_WHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with started:
        yield started
        started.kill()


def holder_of(child: subprocess.Popen[str]) -> Holder:
    assert child.stdout
    return msgspec.json.decode(child.stdout.readline(), type=Holder)


def test_this_process() -> None:
    me = process.current()
    assert me.pid == os.getpid()
    assert me.host == socket.gethostname()
    assert me.boot
    assert me.started
    assert process.is_alive(me) is True
    assert process.current() is me


def test_a_pid_that_was_given_to_another_process() -> None:
    me = process.current()
    assert process.is_alive(msgspec.structs.replace(me, started="1")) is False
    parent = msgspec.structs.replace(me, pid=os.getppid(), started="1")
    assert process.is_alive(parent) is False


def test_other_machines() -> None:
    me = process.current()
    replace = msgspec.structs.replace
    assert process.is_alive(replace(me, host="elsewhere")) is None
    assert process.is_alive(replace(me, host="elsewhere", boot="other")) is None
    assert process.is_alive(replace(me, boot="before the machine was booted")) is False
    assert process.is_alive(replace(me, namespace="1")) is None


def test_a_child_through_its_life(child: subprocess.Popen[str]) -> None:
    holder = holder_of(child)
    assert holder.pid == child.pid
    assert process.is_alive(holder) is True
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert process.is_alive(holder) is True  # it can be continued
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.is_alive(holder) is False  # a zombie: nobody has waited for it yet
    child.wait()
    assert process.is_alive(holder) is False


def test_a_forked_child_is_another_process() -> None:
    script = (
        "import os\n"
        "from holdfast.core import process\n"
        "before = process.current()\n"
        "pid = os.fork()\n"
        "me = process.current()\n"
        "if pid == 0:\n"
        "    assert me.pid == os.getpid() != before.pid, me\n"
        "    assert process.is_alive(before) is True\n"
        "    os._exit(0)\n"
        "assert me == before\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_name_may_hold_anything(tmp_path: Path) -> None:
    """`/proc/<pid>/stat` has the program's name in the middle, unescaped."""
    stat = tmp_path / "stat"
    fields = " ".join(str(n) for n in range(4, 53))
    stat.write_bytes(f"7 (a) R 1 (b\n) S {fields}\n".encode())
    assert process._read_stat(stat) == ("S", "22")
    stat.write_bytes(b"7 (a")
    assert process._read_stat(stat) is None
    assert process._read_stat(tmp_path / "absent") is None


@pytest.mark.parametrize(("second", "alive"), [("S", True), ("D", True), ("Z", False)])
def test_a_group_lives_as_long_as_its_last_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str, alive: bool
) -> None:
    """A leader that is gone is a zombie while another thread is still in a write."""
    me = process.current()
    fields = " ".join(str(n) for n in range(4, 53))
    for path, state in [("77", "Z"), ("77/task/77", "Z"), ("77/task/78", second)]:
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "stat").write_text(f"77 (python) {state} {fields}\n")
    (tmp_path / "self").symlink_to(str(os.getpid()))
    monkeypatch.setattr(process, "_PROC", tmp_path)
    holder = msgspec.structs.replace(me, pid=77, started="22")
    assert process.is_alive(holder) is alive


@pytest.fixture
def ps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A `ps` as on macOS, which knows this process and says what it was asked."""
    program = tmp_path / "ps"
    program.write_text(
        "#!/bin/sh\n"
        f'echo "$LC_ALL $TZ $*" >> {tmp_path}/asked\n'
        f'[ "$6" = {os.getpid()} ] && echo "Ss+  Fri Nov  1 06:30:07 2026"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(process, "_has_proc", lambda: False)
    monkeypatch.setattr(process, "_namespace", lambda: "")
    process._identify.cache_clear()
    yield tmp_path
    process._identify.cache_clear()


def test_without_proc_ps_is_asked(ps: Path) -> None:
    me = process.current()
    assert me.started == "Fri_Nov_1_06:30:07_2026"
    # The same words in every language and time zone.
    asked = f"C UTC -o stat= -o lstart= -p {os.getpid()}\n"
    assert (ps / "asked").read_text() == asked
    assert process.is_alive(me) is True
    assert process.is_alive(msgspec.structs.replace(me, started="Fri_Nov_2")) is False
    assert process._look(os.getppid()) is None


def test_a_process_that_is_there_but_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """`/proc` can hide other users' processes: that is no proof of death."""
    parent = msgspec.structs.replace(process.current(), pid=os.getppid())
    monkeypatch.setattr(process, "_look", lambda pid: None)
    assert process.is_alive(parent) is None
    gone = msgspec.structs.replace(parent, pid=2**22 + 1)  # above the kernel's largest
    assert process.is_alive(gone) is False
