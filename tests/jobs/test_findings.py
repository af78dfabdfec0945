"""What `holdfast doctor` says of places that are written down here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from holdfast.jobs.facts import Facts, Process, Saves, Slurm, Source, Space, Unit
from holdfast.jobs.findings import findings, needed_s, space
from holdfast.jobs.shells import hands_over, passes_on, with_exec
from holdfast.manager.doctor import Finding

TERM = frozenset({"SIGTERM"})
ME = Process(40, ("holdfast", "doctor"), "holdfast")
LOGIN = Process(30, ("-bash",), "bash", terminal=True)
SSHD = Process(20, ("sshd: someone@pts/0",), "sshd")
INIT = Process(1, ("/sbin/init",), "systemd", caught=TERM)
SLURMSTEPD = Process(20, ("slurmstepd: [7.batch]",), "slurmstepd", caught=TERM)
TINI = Process(1, ("/usr/bin/tini", "--", "sh", "run.sh"), "tini", blocked=TERM)


def script(text: str, pid: int = 30, caught: frozenset[str] = frozenset()) -> Process:
    return Process(pid, ("/bin/bash", "/app/train.sh"), "train.sh", caught=caught, script=text)


def command(text: str, pid: int = 30) -> Process:
    return Process(pid, ("sh", "-c", text), "sh", script=text)


def of(check: str, facts: Facts) -> list[Finding]:
    return [finding for finding in findings(facts) if finding.check == check]


def one(check: str, facts: Facts) -> Finding:
    [finding] = of(check, facts)
    return finding


def states(check: str, facts: Facts) -> list[str]:
    return [finding.state for finding in of(check, facts)]


POD = {"container": "Kubernetes", "kubernetes": True}
BATCH = Slurm("7", step=False, left_s=3600.0, kill_wait_s=30.0)
STEP = replace(BATCH, step=True)


# -- signals ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ignored", "blocked", "slurm", "state", "says"),
    [
        ([], [], None, "ok", "SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 arrive"),
        (["SIGHUP"], [], None, "ok", "SIGHUP is ignored"),
        (["SIGTERM"], [], None, "problem", "SIGTERM is ignored here"),
        ([], ["SIGTERM", "SIGUSR1"], None, "problem", "SIGTERM is blocked here"),
        (["SIGINT"], [], None, "note", "SIGINT is ignored here"),
        (["SIGUSR1"], [], None, "note", "SIGUSR1 is ignored here"),
        (["SIGUSR1", "SIGUSR2"], [], BATCH, "warning", "SIGUSR1 and SIGUSR2 are ignored here"),
    ],
)
def test_signals(
    ignored: list[str], blocked: list[str], slurm: Slurm | None, state: str, says: str
) -> None:
    me = replace(ME, ignored=frozenset(ignored), blocked=frozenset(blocked))
    found = one("signals", Facts((me, LOGIN), slurm=slurm))
    assert (found.state, says in found.what) == (state, True)


def test_process_1_itself() -> None:
    found = one("signals", Facts((replace(ME, pid=1),), container="/.dockerenv"))
    assert (found.state, "process 1" in found.what) == ("note", True)


# -- parents ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "chain",
    [
        (LOGIN, SSHD, INIT),
        (Process(31, ("bash",), "bash", terminal=True), Process(25, ("tmux",), "tmux: server")),
        (Process(35, ("make", "train"), "make", caught=TERM), LOGIN, INIT),
        (Process(20, ("/usr/sbin/cron", "-f"), "cron"), INIT),
        (),
    ],
    ids=["terminal", "tmux", "make", "cron", "alone"],
)
def test_places_without_a_scheduler(chain: tuple[Process, ...]) -> None:
    assert states("parents", Facts((ME, *chain))) == ["ok"]


def test_a_script_in_a_terminal_is_worth_a_note() -> None:
    found = one("parents", Facts((ME, script("python train.py"), LOGIN, INIT)))
    assert found.state == "note"
    assert found.do == "End the script in: exec python train.py"


def test_the_shell_of_a_container() -> None:
    facts = Facts((ME, command("cd /app && python train.py --lr 1", pid=1)), **POD)
    found = one("parents", facts)
    assert found.state == "problem"
    assert found.what == ("sh -c (process 1) waits for its command and does not pass SIGTERM on")
    assert found.do == "Write: sh -c 'cd /app && exec python train.py --lr 1'"


def test_a_script_below_tini_still_keeps_it() -> None:
    facts = Facts((ME, script("python train.py\n"), TINI), container="/.dockerenv")
    assert states("parents", facts) == ["problem"]


@pytest.mark.parametrize(
    "first",
    [
        TINI,
        Process(1, ("python", "/venv/bin/holdfast", "run"), "holdfast", caught=TERM),
        script("holdfast doctor\nexec python train.py\n", pid=1),
    ],
    ids=["tini", "holdfast-run", "exec"],
)
def test_first_processes_that_are_fine(first: Process) -> None:
    assert states("parents", Facts((ME, first), **POD)) == ["ok"]


def test_a_first_process_that_handles_nothing() -> None:
    first = Process(1, ("python", "launch.py"), "python")
    found = one("parents", Facts((ME, first), container="/.dockerenv"))
    assert (found.state, "does not handle SIGTERM" in found.what) == ("problem", True)


def test_a_shell_that_passes_it_on_and_one_whose_trap_waits() -> None:
    good = "trap 'kill -TERM $child' TERM\npython train.py &\nchild=$!\nwait $child\n"
    bad = "trap 'echo stop' TERM\npython train.py\n"
    assert states("parents", Facts((ME, script(good, 1, TERM)), **POD)) == ["ok"]
    assert states("parents", Facts((ME, script(bad, 1, TERM)), **POD)) == ["problem"]
    unseen = Facts((ME, script("", 1, TERM)), **POD)
    assert states("parents", unseen) == ["note"], "it may or may not"


def test_a_shell_entered_from_outside_is_no_part_of_the_job() -> None:
    entered = Process(77, ("bash",), "bash", terminal=True)  # docker exec -it
    assert states("parents", Facts((ME, entered), **POD)) == ["ok"]
    assert states("parents", Facts((ME, script("python x.py"), entered), **POD)) == ["note"]


def test_slurms_batch_script_and_its_steps() -> None:
    batch = script("python train.py")
    found = one("parents", Facts((ME, batch, SLURMSTEPD, INIT), slurm=BATCH))
    assert found.state == "problem"
    assert found.do.startswith("Start the training by `srun holdfast run -- …`")
    assert found.do.endswith("End the script in: exec python train.py")
    assert states("parents", Facts((ME, SLURMSTEPD, INIT), slurm=STEP)) == ["ok"]
    assert states("parents", Facts((ME, batch, SLURMSTEPD, INIT), slurm=STEP)) == ["note"]


@pytest.mark.parametrize(
    ("mode", "state"), [("control-group", "note"), ("", "note"), ("mixed", "problem")]
)
def test_systemd_signals_every_process_unless_it_was_told_not_to(mode: str, state: str) -> None:
    unit = Unit("train.service", 90.0, mode)
    assert states("parents", Facts((ME, script("python x.py"), INIT), unit=unit)) == [state]


def test_a_parent_that_ignores_it() -> None:
    parent = Process(1, ("python", "launch.py"), "python", ignored=TERM)
    assert states("parents", Facts((ME, parent), **POD)) == ["problem"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("python train.py", "exec python train.py"),
        ("set -e\n# run\nA=1 B=2 ./train --lr 1  # now", "A=1 B=2 exec ./train --lr 1"),
        ("cd x; python \\\n  train.py", "cd x; exec python    train.py"),
        ("python train.py | tee log", ""),
        ("python train.py &", ""),
        ("for i in 1 2\ndo python x.py\ndone", ""),
        ("exec python train.py", ""),
        ("", ""),
    ],
)
def test_the_line_with_exec(text: str, line: str) -> None:
    assert with_exec(text) == line


def test_what_scripts_do_with_signals() -> None:
    assert hands_over("true && exec python x.py")
    assert not hands_over("exec 2>&1\n# exec python\npython x.py")
    assert passes_on("trap f TERM; x & wait")
    assert not passes_on("trap f TERM; x && y 2>&1")
    assert not passes_on("x & wait")


# -- grace ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p95_s", "state", "do"),
    [
        (None, "note", "holdfast doctor RUN says what the saves of a run need."),
        (2.0, "note", "terminationGracePeriodSeconds and HOLDFAST_GRACE: 30 or more"),
        (
            41.0,
            "warning",
            "terminationGracePeriodSeconds and HOLDFAST_GRACE: 100 or more",
        ),
    ],
)
def test_kubernetes(p95_s: float | None, state: str, do: str) -> None:
    found = one("grace", Facts((ME,), saves=Saves(p95_s), **POD))
    assert (found.state, found.do) == (state, do)


@pytest.mark.parametrize(
    ("slurm", "p95_s", "state", "do"),
    [
        (STEP, 5.0, "ok", ""),
        (STEP, 25.0, "warning", "#SBATCH --signal=USR1@60"),
        (BATCH, 100.0, "problem", "#SBATCH --signal=B:USR1@210"),
        (replace(STEP, kill_wait_s=None), 5.0, "note", "#SBATCH --signal=USR1@30"),
        (replace(STEP, left_s=4.0), 5.0, "problem", "Ask for more: #SBATCH --time="),
        (replace(STEP, left_s=None), None, "ok", ""),
    ],
)
def test_slurm(slurm: Slurm, p95_s: float | None, state: str, do: str) -> None:
    found = one("grace", Facts((ME, SLURMSTEPD), slurm=slurm, saves=Saves(p95_s)))
    assert (found.state, found.do) == (state, do)


def test_the_grace_that_the_run_was_told() -> None:
    for p95_s, state in ((None, "ok"), (10.0, "ok"), (50.0, "warning"), (90.0, "problem")):
        facts = Facts((ME,), grace_s=80.0, saves=Saves(p95_s), **POD)
        assert one("grace", facts).state == state


def test_systemd() -> None:
    facts = Facts((ME, INIT), unit=Unit("train.service", 90.0), saves=Saves(50.0))
    found = one("grace", facts)
    assert (found.state, found.do) == (
        "warning",
        "systemctl edit train.service: TimeoutStopSec=110",
    )


def test_the_grace_to_ask_for_holds_a_save_that_takes_twice_as_long() -> None:
    for p95_s in (0.0, 1.0, 9.9, 10.1, 44.4, 600.0):
        assert needed_s(p95_s) >= max(30, 2 * p95_s + 10)
        assert needed_s(p95_s) % 10 == 0


@pytest.mark.parametrize(
    ("p95_s", "state"), [(None, "note"), (1.0, "note"), (6.0, "warning"), (60.0, "warning")]
)
def test_a_container_beside_kubernetes(p95_s: float | None, state: str) -> None:
    facts = Facts((ME, TINI), container="/.dockerenv", saves=Saves(p95_s))
    assert one("grace", facts).state == state


# -- notices ----------------------------------------------------------------------


def test_notices_that_are_left_out() -> None:
    assert states("notices", Facts((ME, LOGIN))) == ["ok"]
    assert states("notices", Facts((ME, LOGIN), left_out="none")) == ["note"]


SILENT = "http://169.254.169.254: timed out"


@pytest.mark.parametrize(
    ("source", "container", "p95_s", "state", "says"),
    [
        (Source("aws", "sys_vendor"), "", None, "ok", "AWS (sys_vendor): answers"),
        (Source("aws", "sys_vendor"), "", 60.0, "ok", "a save takes"),
        (Source("gcp", "product_name"), "", 60.0, "warning", "told 30.0 s ahead"),
        (Source("azure", "tag", SILENT), "", 1.0, "warning", "would not be heard: http"),
        (Source("aws", "sys_vendor", SILENT), "/.dockerenv", 1.0, "warning", "timed out"),
        (Source("aws", "sys_vendor", "HTTP 403"), "/.dockerenv", 1.0, "warning", "HTTP 403"),
        (Source("file", "HOLDFAST_NOTICE_FILE"), "", 1.0, "ok", "file (HOLDFAST_NOTICE_FILE)"),
    ],
)
def test_notices(
    source: Source, container: str, p95_s: float | None, state: str, says: str
) -> None:
    facts = Facts((ME, TINI), container=container, saves=Saves(p95_s), sources=(source,))
    found = one("notices", facts)
    assert (found.state, says in found.what) == (state, True), found
    assert ("hop-limit" in found.do) == (bool(container) and "timed out" in source.error)


# -- space ------------------------------------------------------------------------

GB = 10**9
ROOMY = Space(
    free_bytes=100 * GB, free_files=10**6, stored_bytes=20 * GB, state_bytes=10 * GB, keep="last=3"
)


@pytest.mark.parametrize(
    ("seen", "state", "says"),
    [
        (ROOMY, "ok", "it fits"),
        # 3 + 1 in flight are 40 GB, 20 of them are there.
        (replace(ROOMY, free_bytes=20 * GB), "ok", "it fits"),
        (replace(ROOMY, free_bytes=15 * GB), "warning", "5.00 GB are missing"),
        (replace(ROOMY, free_bytes=9 * GB), "problem", "11.0 GB are missing"),
        (replace(ROOMY, free_bytes=20 * GB, protected=1), "warning", "10.0 GB are missing"),
        (replace(ROOMY, keep="last=90 size=50GB"), "ok", "holds up to 50.0 GB"),
        (replace(ROOMY, keep=""), "ok", "every checkpoint stays"),
        (replace(ROOMY, keep="", free_bytes=30 * GB), "warning", "room for 3 more"),
        (replace(ROOMY, keep="every=100", free_bytes=GB), "problem", "room for 0 more"),
        (replace(ROOMY, keep="newer=rule", free_bytes=30 * GB), "warning", "room for 3 more"),
        (replace(ROOMY, free_files=3), "problem", "only 3 more files"),
        (replace(ROOMY, free_files=None), "ok", "it fits"),
        (replace(ROOMY, state_bytes=0, keep=""), "ok", "every checkpoint stays"),
    ],
)
def test_space(seen: Space, state: str, says: str) -> None:
    found = space(seen)
    assert (found.state, says in found.what) == (state, True), found
