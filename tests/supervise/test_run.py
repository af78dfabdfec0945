"""Real processes under `holdfast run`: restarts, signals, hangs, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from holdfast import CheckpointManager
from holdfast.manager.history import EndEvent, StartEvent
from tests.supervise.programs import Supervised, exists, wait_for


def test_it_is_started_again_until_it_is_done(tmp_path: Path) -> None:
    job = Supervised(tmp_path, "sys.exit(0 if attempt() == 3 else 4)", "--json")
    assert job.run() == 0
    assert job.starts == 3
    assert "attempt 1 ended with status 4" in job.said
    assert "attempt 3 began (pid " in job.said
    assert json.loads(job.out) == {
        "ok": True,
        "status": 0,
        "attempts": 3,
        "hangs": 0,
        "stacks": "",
        "checkpoints": {},
    }
    assert list(job.temporary.iterdir()) == []


def test_a_crash_loop_ends_and_one_with_progress_does_not(tmp_path: Path) -> None:
    body = """
    n = attempt()
    beat(n, checkpoint=min(n, 6))
    os._exit(9)
    """
    job = Supervised(tmp_path, body, "--max-stuck", "1")
    assert job.run() == 9
    assert job.starts == 8  # six new checkpoints, then one restart in vain
    assert "goes on from step 6" in job.said
    assert "no new checkpoint in 1 restart: giving up" in job.said


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("sys.exit(3)", 3),
        ("sys.exit(2)", 2),
    ],
)
def test_the_exit_status_is_passed_through(tmp_path: Path, body: str, status: int) -> None:
    job = Supervised(tmp_path, f"attempt()\n{body}", "--max-stuck", "0")
    assert job.run() == status
    assert job.starts == 1


def test_rules_for_exit_codes(tmp_path: Path) -> None:
    rules = ("--on-exit-code", "5=stop", "--on-exit-code", "0=restart")
    job = Supervised(tmp_path, "sys.exit(0 if attempt() < 3 else 5)", *rules)
    assert job.run() == 5
    assert job.starts == 3


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "holdfast", "run", "--", str(tmp_path / "nothing")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 127
    assert "nothing: No such file or directory" in done.stderr
    assert "attempt 2" not in done.stderr


def test_signals_are_passed_on_and_the_answer_passed_back(tmp_path: Path) -> None:
    body = """
    attempt()
    def answer(number, frame):
        (here / signal.Signals(number).name).touch()
        if number == signal.SIGTERM:
            sys.exit(75)
    for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGINT", "SIGTERM"):
        signal.signal(signal.Signals[name], answer)
    (here / "ready").touch()
    while True:
        time.sleep(60)
    """
    job = Supervised(tmp_path, body)
    process = job.start(until="ready")
    for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGINT", "SIGTERM"):
        process.send_signal(signal.Signals[name])
        wait_for(lambda name=name: job.made(name))  # type: ignore[misc]
        assert f"received {name}: passed on" in job.said
    assert job.end() == 75
    assert job.starts == 1


def test_a_signal_that_the_command_does_not_know_goes_to_those_that_train(tmp_path: Path) -> None:
    """As `torchrun`, which SIGUSR1 would end, and which makes 1 of their status."""
    body = """
    child = '''
    import os, signal, sys, time
    from pathlib import Path
    from holdfast.manager import heartbeat
    def answer(*_):
        heartbeat.leaving(75)
        os._exit(75)
    signal.signal(signal.SIGUSR1, answer)
    heartbeat.beat("run", "training", 1)
    Path(sys.argv[1], "ready").touch()
    time.sleep(60)
    '''
    import textwrap
    subprocess.call([sys.executable, "-c", textwrap.dedent(child), str(here)])
    sys.exit(1)
    """
    job = Supervised(tmp_path, body)
    job.start(until="ready").send_signal(signal.SIGUSR1)
    assert job.end() == 75


def test_a_warning_that_comes_while_the_program_still_imports_waits_for_it(tmp_path: Path) -> None:
    body = """
    (here / "ready").touch()
    while not (here / "imported").exists():
        time.sleep(0.01)
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    time.sleep(60)
    """
    job = Supervised(tmp_path, body)
    job.start(until="ready").send_signal(signal.SIGUSR1)
    wait_for(lambda: "nothing handles SIGUSR1 yet: kept back" in job.said)
    (tmp_path / "imported").touch()
    assert job.end() == 75
    assert "SIGUSR1 is handled now: passed on" in job.said


def test_a_warning_that_the_program_did_not_live_to_hear_goes_to_the_next_one(
    tmp_path: Path,
) -> None:
    body = """
    if attempt() == 1:
        (here / "ready").touch()
        while not (here / "over").exists():
            time.sleep(0.01)
        os._exit(9)
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    time.sleep(60)
    """
    job = Supervised(tmp_path, body)
    job.start(until="ready").send_signal(signal.SIGUSR1)
    wait_for(lambda: "nothing handles SIGUSR1 yet: kept back" in job.said)
    (tmp_path / "over").touch()
    assert job.end() == 75
    assert job.starts == 2
    assert "SIGUSR1 is handled now: passed on" in job.said


def test_the_status_of_the_training_counts_and_not_that_of_its_launcher(tmp_path: Path) -> None:
    """As of `torchrun`, which ends with 1 when a process of its ends with 75."""
    body = """
    child = '''
    import os, signal, sys
    import holdfast
    with holdfast.Run(sys.argv[1] + "/run") as run:
        for step in run.range(1000):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
    '''
    import textwrap
    attempt()
    sys.exit(bool(subprocess.call([sys.executable, "-c", textwrap.dedent(child), str(here)])))
    """
    job = Supervised(tmp_path, body, "--on-exit-code", "75=stop")
    job.start()
    assert job.end() == 75
    assert job.starts == 1


def test_a_second_sigint_kills(tmp_path: Path) -> None:
    body = """
    signal.signal(signal.SIGINT, lambda *_: (here / "heard").touch())
    (here / "ready").touch()
    while True:
        time.sleep(60)
    """
    job = Supervised(tmp_path, body)
    process = job.start(until="ready")
    process.send_signal(signal.SIGINT)
    wait_for(lambda: job.made("heard"))
    process.send_signal(signal.SIGINT)
    assert job.end() == 137


HIDING = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(99)"
child = f'''
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", {grandchild!r}, sys.argv[1] + "/grandchild"],
                 start_new_session=True)
'''
subprocess.run([sys.executable, "-c", child, str(here)], start_new_session=True)
while not (here / "grandchild").exists() or not (here / "grandchild").read_text():
    time.sleep(0.01)
"""


@pytest.mark.parametrize("end", ["sys.exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_nothing_is_left_behind(tmp_path: Path, end: str) -> None:
    """A process that is orphaned, in a session of its own, and ignores SIGTERM."""
    job = Supervised(tmp_path, HIDING + end, "--max-stuck", "0", "--grace", "0.2s")
    assert job.run() == (0 if "exit" in end else 137)
    assert not exists(job.pid("grandchild"))


def test_a_program_behind_a_shell_that_dies_of_sigterm_may_still_save(tmp_path: Path) -> None:
    body = """
    def answer(*_):
        time.sleep(0.3)
        (here / "saved").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, answer)
    (here / "ready").touch()
    time.sleep(60)
    """
    job = Supervised(tmp_path, body)
    command = " ".join(job.words[-3:])
    job.words[-3:] = ["sh", "-c", f"{command}; true"]
    job.start(until="ready").send_signal(signal.SIGTERM)
    assert job.end() == 143
    assert job.made("saved")


def test_a_supervisor_that_is_killed_takes_its_command_along(tmp_path: Path) -> None:
    body = """
    (here / "pid").write_text(str(os.getpid()))
    (here / "ready").touch()
    time.sleep(60)
    """
    job = Supervised(tmp_path, body)
    job.start(until="ready").kill()
    job.end()
    wait_for(lambda: not exists(job.pid("pid")) or _is_zombie(job.pid("pid")))
    # What it could not remove, the next one does.
    assert len(list(job.temporary.iterdir())) == 1
    job.script.write_text("")
    assert job.run() == 0
    assert list(job.temporary.iterdir()) == []


def _is_zombie(pid: int) -> bool:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_a_hang_is_found_and_its_stacks_are_kept(tmp_path: Path) -> None:
    """Also of children, forked and spawned; the program ignores SIGTERM."""
    body = """
    import threading
    def waits_in_vain():
        lock = threading.Lock()
        with lock:
            lock.acquire()
    import holdfast
    if attempt() == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        spawned = "import holdfast, time; open({!r}, 'w'); time.sleep(60)".format(str(here / "up"))
        subprocess.Popen([sys.executable, "-c", spawned])
        while not (here / "up").exists():
            time.sleep(0.01)
        if os.fork() == 0:
            def the_worker_waits():
                time.sleep(60)
            the_worker_waits()
        beat(1, checkpoint=1)  # from here on there is a second, however long the others took
        waits_in_vain()
    """
    job = Supervised(tmp_path, body, "--hang-timeout", "1s", "--grace", "0.3s")
    assert job.run() == 0
    assert job.starts == 2
    folder = tmp_path / "logs" / "hang-1"
    assert f"stacks in {folder}: sending SIGTERM" in job.said
    assert "not ended 300 ms after SIGTERM: killing it" in job.said
    texts = [path.read_text() for path in folder.iterdir()]
    assert len(texts) == 3
    assert sum("in waits_in_vain" in text for text in texts) >= 1
    [worker] = [text for text in texts if "in the_worker_waits" in text]
    [spawned] = [text for text in texts if "import holdfast, time" in text]
    assert 'File "<string>", line 1 in <module>' in spawned
    assert "cmdline: " in worker


def test_a_process_that_was_stopped_is_a_hang_without_stacks(tmp_path: Path) -> None:
    body = """
    n = attempt()
    beat(n, checkpoint=n)
    if n == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    """
    job = Supervised(tmp_path, body, "--hang-timeout", "1s", "--grace", "0.3s")
    assert job.run() == 0
    [path] = (tmp_path / "logs" / "hang-1").iterdir()
    assert "state T" in path.read_text()
    assert "it did not answer" in path.read_text()


def test_timeouts(tmp_path: Path) -> None:
    body = """
    n = attempt()
    beat(n, checkpoint=n)
    time.sleep(60)
    """
    # A machine may be too slow for one checkpoint, or one line of the program, in that time.
    options = ("--timeout", "0.5s", "--total-timeout", "2.5s", "--grace", "0.1s")
    job = Supervised(tmp_path, body, *options, "--max-stuck", "99")
    assert job.run() == 124
    assert "attempt 2 began" in job.said
    assert "attempt 1 took longer than 500 ms: sending SIGTERM" in job.said
    assert "--total-timeout is over" in job.said


def test_as_pid_1_it_reaps_and_hears_signals(tmp_path: Path) -> None:
    """In a PID namespace of its own, as in a container. Needs to be root."""
    body = (
        HIDING
        + """
def answer(*_):
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat")]
    zombies = [text for text in stats if text.rpartition(")")[2].split()[0] == "Z"]
    (here / "zombies").write_text(str(len(zombies)))
    os._exit(75)
signal.signal(signal.SIGTERM, answer)
(here / "parent").write_text(str(os.getppid()))
(here / "ready").touch()
while True:
    time.sleep(60)
"""
    )
    job = Supervised(tmp_path, body, "--grace", "0.2s")
    prefix = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    process = job.start(until="ready", prefix=prefix)
    assert job.pid("parent") == 1
    children = Path("/proc", str(process.pid), "task", str(process.pid), "children")
    os.kill(int(children.read_text()), signal.SIGTERM)
    assert job.end() == 75
    assert job.pid("zombies") == 0


def test_a_slurm_job_is_requeued(tmp_path: Path) -> None:
    body = """
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    (here / "ready").touch()
    time.sleep(60)
    """
    job = Supervised(tmp_path, body, "--requeue")
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    job.environment |= {
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "12",
        "SLURM_ARRAY_JOB_ID": "10",
        "SLURM_ARRAY_TASK_ID": "3",
    }
    job.start(until="ready").send_signal(signal.SIGUSR1)
    assert job.end() == 75
    assert (tmp_path / "asked").read_text() == "requeue 10_3\n"
    assert "job 10_3 is in the queue again" in job.said


def test_a_process_that_cannot_be_started_is_tried_again(tmp_path: Path) -> None:
    """No memory or no pids at that moment."""
    program = """
    import sys
    from holdfast.supervise import Settings, shell
    real, failed = shell.Command, []
    def command(*args, **options):
        if not failed:
            failed.append(1)
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real(*args, **options)
    shell.Command = command
    settings = Settings(longest_backoff_s=0.05)
    sys.exit(shell.supervise([sys.executable, "-c", "raise SystemExit(2)"], settings).status)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "could not start a process" in done.stderr
    assert "attempt 2 ended with status 2" in done.stderr


def test_kills_and_hangs_are_in_the_history_of_the_run(tmp_path: Path) -> None:
    body = """
    import holdfast
    n = attempt()
    state = [0]
    with holdfast.Run(here / "run", every=1, quiet=True) as run:
        run.track(state=state)
        for step in run.range(6):
            run.manager.wait()
            if n == 1 and step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            if n == 2 and step == 4:
                time.sleep(60)
    """
    job = Supervised(tmp_path, body, "--hang-timeout", "2s", "--grace", "0.1s")
    assert job.run() == 0
    with CheckpointManager(tmp_path / "run") as manager:
        events = manager.history.read()
    ends = [event for event in events if isinstance(event, EndEvent)]
    assert [(end.why, end.step, end.epoch) for end in ends] == [
        *(("killed", 2, 1), ("hang", 4, 2), ("finished", 6, 3)),
    ]
    assert ends[0].signal == signal.SIGKILL
    starts = [event.pid for event in events if isinstance(event, StartEvent)]
    assert [end.pid for end in ends] == starts
