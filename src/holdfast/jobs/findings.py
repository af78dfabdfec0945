"""What of a place would lose work, and what to do about it: a function of what was seen."""

from __future__ import annotations

import math
import shlex
from typing import Literal

from holdfast.core.retention import KeepPolicy, parse_keep
from holdfast.core.units import format_duration, format_seconds, format_size
from holdfast.errors import BadPolicy
from holdfast.jobs.facts import Facts, Process, Saves, Source, Space
from holdfast.jobs.shells import (
    hands_over,
    is_interactive,
    is_shell,
    passes_on,
    program,
    script_of,
    with_exec,
)
from holdfast.manager.doctor import Finding, State

KUBERNETES_GRACE_S = 30.0  # terminationGracePeriodSeconds, where nobody set it
DOCKER_GRACE_S = 10.0  # of `docker stop`, where nobody asked for more
_DAEMONS = frozenset(("systemd", "containerd-shim", "sshd", "cron", "crond", "atd"))
# A save also makes a manifest, a log entry, and temporary files.
_FILES_OF_A_SAVE = 100


def findings(facts: Facts) -> tuple[Finding, ...]:
    """In the order in which they are shown. "problem": a stop, or a full disk, would lose what
    was done since the newest checkpoint. "warning": it may."""
    found = [_signals(facts), *_parents(facts), *_grace(facts), *_notices(facts)]
    if facts.space is not None:
        found.append(space(facts.space))
    return tuple(found)


# -- signals ----------------------------------------------------------------------


def _signals(facts: Facts) -> Finding:
    if not facts.ancestors:
        return Finding("signals", "note", "they cannot be looked at: there is no /proc here")
    own = facts.ancestors[0]
    deaf = own.ignored | own.blocked
    how = {name: "ignored" if name in own.ignored else "blocked" for name in deaf}
    if "SIGTERM" in deaf:
        what = f"SIGTERM is {how['SIGTERM']} here: a run is not told that it has to stop"
        do = "Start it without `trap '' TERM`, or what else sets this."
        return Finding("signals", "problem", what, do)
    user = sorted(deaf & {"SIGUSR1", "SIGUSR2"})
    if user:
        state: State = "warning" if facts.slurm else "note"
        what = f"{' and '.join(user)} {_are(user)} {how[user[0]]} here"
        return Finding("signals", state, what, "Ask for SIGTERM: #SBATCH --signal=TERM@120")
    if "SIGINT" in deaf:
        what = "SIGINT is ignored here, as for every command in the background: use SIGTERM"
        return Finding("signals", "note", what)
    if own.pid == 1:
        what = "this is process 1, which gets only those signals that it handles"
        return Finding("signals", "note", what, "Start the container with: holdfast run -- …")
    kept = "; SIGHUP is ignored, so that it outlives its terminal" if "SIGHUP" in deaf else ""
    return Finding("signals", "ok", f"SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 arrive{kept}")


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


# -- parents ----------------------------------------------------------------------

Sender = Literal["container", "slurm", "step", "systemd", "nobody"]
"""Who sends SIGTERM: to the first process of a container, to the batch script, to the tasks of
a step, to the main process of a service, or nobody that could be told."""


def _parents(facts: Facts) -> list[Finding]:
    """A finding for each process between who sends SIGTERM and this one that keeps it."""
    chain, sender = _below_sender(facts)
    found = [
        finding for process in reversed(chain) if (finding := _keeps(process, sender)) is not None
    ]
    if found:
        return found
    if not chain:
        return [Finding("parents", "ok", "none that a signal has to pass")]
    passed = ", ".join(f"{_title(one)} ({one.pid})" for one in reversed(chain))
    return [Finding("parents", "ok", f"{passed}: signals get through")]


def _below_sender(facts: Facts) -> tuple[list[Process], Sender]:
    """The parents that a stop signal has to pass, nearest first: up to a shell that a person
    types into, to the daemon that signals its children, or to the container's first process."""
    chain: list[Process] = []
    for process in facts.ancestors[1:]:
        if process.name == "slurmstepd":
            return chain, "step" if facts.slurm and facts.slurm.step else "slurm"
        if is_interactive(process.argv) and process.terminal:
            return chain, "nobody"
        if process.name in _DAEMONS or not process.argv:
            break
        if process.pid == 1:
            if facts.container or is_shell(process.argv):
                return [*chain, process], "container"
            break  # the machine's own init
        chain.append(process)
    # Of a service systemd signals every process, unless it was told not to.
    alone = facts.unit is not None and facts.unit.kill_mode not in ("", "control-group")
    return chain, "systemd" if alone else "nobody"


def _keeps(process: Process, sender: Sender) -> Finding | None:
    """What is wrong with a parent; None where it passes SIGTERM on, or will be gone."""
    title = f"{_title(process)} (process {process.pid})"
    state: State = "note" if sender in ("nobody", "step") else "problem"
    if is_shell(process.argv):
        return _shell(process, title, state, sender)
    if "SIGTERM" in process.ignored:
        what = f"{title} ignores SIGTERM, and so does what it starts"
        return Finding("parents", state, what, "Start it without `trap '' TERM`.")
    # tini and dumb-init block their signals and wait for them.
    if process.pid != 1 or "SIGTERM" in process.caught | process.blocked:
        return None
    what = f"{title} does not handle SIGTERM: as process 1 it never gets it, and passes none on"
    do = "Make the container's command: holdfast run -- … (or start it with --init)."
    return Finding("parents", state, what, do)


def _shell(process: Process, title: str, state: State, sender: Sender) -> Finding | None:
    if hands_over(process.script):
        return None  # here it waits for what comes before
    traps = "SIGTERM" in process.caught
    if traps and passes_on(process.script):
        return None
    what = f"{title} waits for its command and does not pass SIGTERM on"
    if traps and not process.script:
        # Any trap makes a shell handle this signal, and what it does then is not known.
        what, state = f"{title} may keep SIGTERM from its command: its script is not seen", "note"
    line = with_exec(process.script)
    if not line or "holdfast doctor" in line:
        line = "exec python train.py"
    if script_of(process.argv)[0]:
        do = f"Write: {program(process.argv)} -c {shlex.quote(line)}"
    else:
        do = f"End the script in: {line}"
    if sender == "slurm":
        do = f"Start the training by `srun holdfast run -- …`, which signals reach. Or: {do}"
    return Finding("parents", state, what, do)


def _title(process: Process) -> str:
    if not is_shell(process.argv):
        name = program(process.argv) or process.name
        if name.startswith("python"):  # of what it runs: a script, or a command as a script
            words = [word.rpartition("/")[2] for word in process.argv[1:3]]
            return " ".join([name, *words[:1]]) if words and words[0][:1] != "-" else name
        return name
    text, path = script_of(process.argv)
    name = program(process.argv)
    return f"{name} -c" if text else f"{name} {path.rpartition('/')[2]}".rstrip()


# -- grace ------------------------------------------------------------------------


def _grace(facts: Facts) -> list[Finding]:
    found: list[Finding] = []
    if facts.kubernetes:
        found.append(_kubernetes(facts))
    if facts.slurm is not None:
        found.append(_slurm(facts))
    if facts.unit is not None:
        name, stop_s = facts.unit.name, facts.unit.stop_s
        do = f"systemctl edit {shlex.quote(name)}: TimeoutStopSec={{needed}}"
        found.append(_compare(f"systemd ({name})", stop_s, facts.saves, do))
    if facts.container and not found:
        found.append(_docker(facts.saves))
    if not found:
        what = "no Kubernetes, Slurm or systemd service here: who sends SIGTERM sets it"
        found.append(Finding("grace", "ok", f"{what}{_saves_text(facts.saves)}"))
    return found


def needed_s(p95_s: float) -> int:
    """The grace to ask for: a save that takes twice what 95 % of them took, and 10 seconds
    for the step that is under way and for the end of the program, in whole tens."""
    return max(30, math.ceil((2 * p95_s + 10) / 10) * 10)


def _p95(saves: Saves | None) -> float | None:
    return None if saves is None else saves.p95_s


def _saves_text(saves: Saves | None) -> str:
    p95_s = _p95(saves)
    return "" if p95_s is None else f"; a save takes {format_seconds(p95_s)} (p95)"


def _kubernetes(facts: Facts) -> Finding:
    saves = facts.saves
    if facts.grace_s is not None:
        do = "terminationGracePeriodSeconds and HOLDFAST_GRACE: {needed} or more"
        return _compare("Kubernetes, by HOLDFAST_GRACE", facts.grace_s, saves, do)
    hidden = "terminationGracePeriodSeconds cannot be seen from inside; it is 30 if nobody set it"
    p95_s = _p95(saves)
    if p95_s is None:
        do = "holdfast doctor RUN says what the saves of a run need."
        return Finding("grace", "note", hidden, do)
    needed = needed_s(p95_s)
    what = f"a save takes {format_seconds(p95_s)} (p95); {hidden}"
    state: State = "note" if needed <= KUBERNETES_GRACE_S else "warning"
    do = f"terminationGracePeriodSeconds and HOLDFAST_GRACE: {needed} or more"
    return Finding("grace", state, what, do)


def _docker(saves: Saves | None) -> Finding:
    what = "a container: `docker stop` gives 10 seconds unless it is asked for more"
    p95_s = _p95(saves)
    if p95_s is None:
        return Finding("grace", "note", what, "holdfast doctor RUN says what a run's saves need.")
    state: State = "note" if p95_s < DOCKER_GRACE_S / 2 else "warning"
    do = f"docker stop --time {needed_s(p95_s)}"
    return Finding("grace", state, f"{what}{_saves_text(saves)}", do)


def _slurm(facts: Facts) -> Finding:
    assert facts.slurm is not None
    left_s = facts.slurm.left_s
    left = "its end is not known" if left_s is None else f"{format_duration(max(0, left_s))} left"
    do = f"#SBATCH --signal={'' if facts.slurm.step else 'B:'}USR1@{{needed}}"
    name = f"Slurm (job {facts.slurm.job}, {left}), KillWait"
    finding = _compare(name, facts.slurm.kill_wait_s, facts.saves, do)
    if left_s is not None and (_p95(facts.saves) or 0) > max(0, left_s):
        what = f"{finding.what}: no further save fits"
        return Finding("grace", "problem", what, "Ask for more: #SBATCH --time=")
    return finding


def _compare(name: str, grace_s: float | None, saves: Saves | None, do: str) -> Finding:
    """Whether a save fits into `grace_s`; `do` has a place for the seconds that are needed."""
    p95_s = _p95(saves)
    given = "cannot be seen" if grace_s is None else format_seconds(grace_s)
    what = f"{name}: {given}{_saves_text(saves)}"
    if grace_s is None:
        return Finding("grace", "note", what, do.format(needed=needed_s(p95_s or 0)))
    if p95_s is None or needed_s(p95_s) <= grace_s:
        return Finding("grace", "ok", what)
    state: State = "warning" if p95_s < grace_s else "problem"
    return Finding("grace", state, what, do.format(needed=needed_s(p95_s)))


# -- notices ----------------------------------------------------------------------

# Between a cloud's notice and the end of the machine.
_AHEAD_S = {"aws": 120.0, "gcp": 30.0, "azure": 30.0}
_CLOUDS = {"aws": "AWS", "gcp": "Google Cloud", "azure": "Azure"}


def _notices(facts: Facts) -> list[Finding]:
    if not facts.sources and facts.left_out:
        what = f"HOLDFAST_NOTICES={facts.left_out}: only signals tell of the end"
        return [Finding("notices", "note", what)]
    if not facts.sources:
        what = "no cloud was recognized, so only signals tell of the end"
        return [Finding("notices", "ok", what)]
    return [_notice(source, facts) for source in facts.sources]


def _notice(source: Source, facts: Facts) -> Finding:
    where = f"{_CLOUDS.get(source.name, source.name)} ({source.why})"
    if source.error:
        what = f"{where}, but a notice would not be heard: {source.error}"
        if source.name == "aws" and facts.container and "timed out" in source.error:
            # The answer with the token may take so many hops, and a container is one more.
            do = (
                "aws ec2 modify-instance-metadata-options --http-put-response-hop-limit 2 "
                "--instance-id …"
            )
        else:
            do = "Let this program reach the machine's metadata service, not through a proxy."
        return Finding("notices", "warning", what, do)
    ahead_s = _AHEAD_S.get(source.name)
    if ahead_s is None:
        return Finding("notices", "ok", where)
    what = f"{where}: answers; a spot machine is told {format_seconds(ahead_s)} ahead"
    what += _saves_text(facts.saves)
    if (_p95(facts.saves) or 0.0) < ahead_s:
        return Finding("notices", "ok", what)
    do = 'The last save would not fit: save more often (every="auto"), or to a disk with a mirror.'
    return Finding("notices", "warning", what, do)


# -- space ------------------------------------------------------------------------


def space(seen: Space) -> Finding:
    """Whether what `keep` holds at most fits on the disk, with one save in flight."""
    free = f"{format_size(seen.free_bytes)} free"
    if seen.free_files is not None and seen.free_files < _FILES_OF_A_SAVE:
        what = f"{free}, but only {seen.free_files:,} more files (inodes)"
        return Finding("space", "problem", what, "Remove files there, or name another disk.")
    try:
        policy = parse_keep(seen.keep)
    except BadPolicy:  # a newer Holdfast may have more rules
        policy = KeepPolicy()
    state = f"a checkpoint is up to {format_size(seen.state_bytes)}"
    most = most_kept(policy)
    if most is None:
        room = seen.free_bytes // seen.state_bytes if seen.state_bytes else None
        rule = f'keep "{seen.keep}" has no bound' if seen.keep else "every checkpoint stays (keep)"
        what = f"{free}; {rule}, {state}"
        if room is None or room >= 10:
            more = "" if room is None else f": room for {room:,} more"
            return Finding("space", "ok", f"{what}{more}")
        level: State = "problem" if room < 1 else "warning"
        do = 'Bound it: keep="last=3", or a size= rule.'
        return Finding("space", level, f"{what}: room for {room} more", do)
    bound = (most + seen.protected) * seen.state_bytes
    if policy.size_bytes is not None:
        bound = min(bound, policy.size_bytes)
    needed = max(0, bound + seen.state_bytes - seen.stored_bytes)
    what = (
        f'{free}; keep "{seen.keep}" holds up to {format_size(bound)}, '
        f"of which {format_size(seen.stored_bytes)} are there; {state}"
    )
    if needed <= seen.free_bytes:
        return Finding("space", "ok", f"{what}: it fits, with a save in flight")
    missing = format_size(needed - seen.free_bytes)
    level = "problem" if seen.free_bytes < seen.state_bytes else "warning"
    return Finding("space", level, f"{what}: {missing} are missing", "Keep less, or free space.")


def most_kept(policy: KeepPolicy) -> int | None:
    """How many checkpoints the rules keep at most; None if there is no bound but `size=`.

    >>> most_kept(parse_keep("last=3 best=2:loss")), most_kept(parse_keep("within=2d"))
    (5, None)
    """
    if policy.every is not None or policy.within_s is not None:
        return None
    best = sum(rule.k for rule in policy.best)
    return (policy.last or 0) + best or None
