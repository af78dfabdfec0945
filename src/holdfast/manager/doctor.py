"""The health of a run: what is there, what is wrong with it, and what to do about it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from holdfast import __version__
from holdfast.core.address import shell_word
from holdfast.core.process import is_alive
from holdfast.core.records import FORMAT, Manifest, Record, RunInfo
from holdfast.core.sealed import unseal
from holdfast.core.types import MiB
from holdfast.core.units import format_ago, format_size
from holdfast.errors import (
    CheckpointRemoved,
    CorruptionError,
    DamagedObject,
    ObjectNotFound,
)
from holdfast.manager.info import info_of
from holdfast.manager.reader import ChunkReader
from holdfast.manager.verify import verify
from holdfast.repo import keys
from holdfast.repo.head import Head
from holdfast.repo.holding import Alive, refuse_if_held
from holdfast.repo.mirrors import remembered
from holdfast.repo.orphans import find_orphans
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer
from holdfast.stores.abilities import Abilities, probe

State = Literal["ok", "note", "warning", "problem", "damage"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """Of a run: "run", "log", "checkpoint", "leftovers", "writer", "file system", "versions";
    of the place: see `holdfast.jobs.findings`."""
    state: State
    """"note": unusual, but nothing is lost. Of a place: "warning", a stop may lose work;
    "problem", it does."""
    what: str
    do: str = ""
    """What to do about it: words, or a command."""


@dataclass(frozen=True)
class Health:
    """Everything that was found."""

    findings: tuple[Finding, ...]
    repairable: bool = False
    """Whether `repair` would help: the list of checkpoints, or `holdfast.json`, is damaged."""
    mirror: str = ""
    """The run's mirror, where its last writer had one."""

    @property
    def damage(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.state == "damage")


def examine(
    repo: Repo,
    address: str,
    *,
    full: bool = False,
    checkpoints: bool = True,
    alive: Alive = is_alive,
    clock: Callable[[], float] = time.time,
) -> Health:
    """Look at all of a run, without changing it: the packs by their size, or, if `full`,
    every byte by its digest. Without `checkpoints` only at what lists them.

    Raises NoStore where there is no trace of a run; StoreUnavailable.
    """
    run = _run(repo, clock)
    log, head = _log(repo, address)
    findings = [run, log]
    records: tuple[Record, ...] = ()
    if head is not None:
        try:
            records = repo.log.records(head.entry)
        except DamagedObject as error:
            do = f"holdfast doctor {shell_word(address)} --repair"
            log = Finding("log", "damage", f"a part of its list is damaged: {error.message}", do)
            findings[1] = log
    repairable = "damage" in (run.state, log.state)
    if not checkpoints:
        return Health(tuple(findings), repairable, remembered(repo.store))
    newest: Manifest | None = None
    if records:
        found, newest = _checkpoints(repo, records, address, full=full)
        findings += found
    if log.state == "ok" and run.state != "damage":
        findings += _leftovers(repo, address, head, alive)
    findings.append(_writer(head, alive, clock))
    findings += _file_system(repo)
    findings.append(_versions(newest))
    return Health(tuple(findings), repairable)


def repair(repo: Repo, *, take_over: bool = False, alive: Alive = is_alive) -> None:
    """Rebuild the list of checkpoints from the manifests that are whole, as a starting job
    would, and commit it. Does nothing to a log that is whole.

    Raises RunHeld as `gc` does; StoreReadOnly, StoreUnavailable.
    """
    try:
        head = repo.head()
    except CorruptionError:
        head = None  # no entry says who holds it
    entry = head.entry if head else None
    refuse_if_held(entry, repo.address, take_over=take_over, alive=alive)
    Writer.open(repo, take_over=take_over, alive=lambda holder: alive(holder) is not False).close()


def _run(repo: Repo, clock: Callable[[], float]) -> Finding:
    """`holdfast.json`, read as it is: `Repo.info` would help itself from the log."""
    try:
        info = unseal(repo.store.get(keys.RUN_INFO, max_bytes=MiB), RunInfo, keys.RUN_INFO)[1]
    except ObjectNotFound:
        if not any(keys.entry_number(found.key) for found in repo.store.list(keys.LOG)):
            repo.info()  # its error says what to do
            raise
        return Finding(
            "run",
            "damage",
            f"{keys.RUN_INFO} is missing, so that no program finds the run",
            f"holdfast doctor {shell_word(repo.address)} --repair",
        )
    except DamagedObject as error:
        what = f"{error.message}; the log has all that it said"
        return Finding("run", "note", what, "Nothing is lost. Copy the run to a sound disk.")
    made = f", started {format_ago(clock() - info.created_s)}" if info.created_s else ""
    forked = f", forked from {info.parent}" if info.parent else ""
    return Finding("run", "ok", f"format {info.format}, id {info.run}{made}{forked}")


def _log(repo: Repo, address: str) -> tuple[Finding, Head | None]:
    do = f"holdfast doctor {shell_word(address)} --repair"
    try:
        head = repo.log.read()
    except CorruptionError as error:
        return Finding("log", "damage", error.message, do), None
    entries = sum(1 for found in repo.store.list(keys.LOG) if keys.entry_number(found.key))
    if head is None:
        return Finding("log", "note", "it is empty: nothing was saved yet"), None
    where = f"entry {head.number} ({head.entry.action})"
    if head.damage:
        what = f"readers fall back to {where}: {'; '.join(head.damage)}"
        return Finding("log", "damage", what, do), head
    rebuilt = ", rebuilt by a repair" if head.entry.rebuilt else ""
    return Finding("log", "ok", f"{where} is the newest of {entries}{rebuilt}"), head


def _checkpoints(
    repo: Repo, records: tuple[Record, ...], address: str, *, full: bool
) -> tuple[list[Finding], Manifest | None]:
    """(a finding for all that are whole and one for each that is not, the newest manifest)."""
    damage: list[Finding] = []
    newest: Manifest | None = None
    whole = 0
    mend = ""
    for record in records:
        info = info_of(address, record)
        try:
            problems = list(verify(repo, record, address).problems) if full else []
            manifest = repo.manifest(record)
            ChunkReader(repo, record, manifest).check_packs(manifest.leaves)
            newest = manifest
        except CheckpointRemoved:
            continue  # a rule took it meanwhile
        except CorruptionError as error:
            problems = [error.message]
        if not problems:
            whole += 1
            continue
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        do = f"holdfast rm {shell_word(f'{info.address}@{record.id[:12]}')}"
        mend = mend or _from_mirror(repo, address)
        what = f"step {record.step:,}: {problems[0]}{more}"
        damage.append(Finding("checkpoint", "damage", what, mend or do))
    how = "every byte read" if full else "their packs compared by size; --full reads every byte"
    # The listed ones that nobody removed while they were looked at.
    total = whole + len(damage)
    state: State = "ok" if whole else "damage"
    do = "" if whole else mend or "None is whole. Look for a copy of the run."
    return [Finding("checkpoints", state, f"{whole} of {total} whole ({how})", do), *damage], newest


def _from_mirror(repo: Repo, address: str) -> str:
    """The command that repairs a run from its mirror; "" if it has none."""
    if not (mirror := remembered(repo.store)):
        return ""
    return f"holdfast verify {shell_word(address)} --repair-from {shell_word(mirror)}"


def _leftovers(repo: Repo, address: str, head: Head | None, alive: Alive) -> list[Finding]:
    if head is None:
        return []
    found = find_orphans(repo)
    if not found:
        return [Finding("leftovers", "ok", "none")]
    size = format_size(sum(info.size_bytes for info in found))
    objects = "1 object" if len(found) == 1 else f"{len(found):,} objects"
    what = f"{objects}, {size}, that no checkpoint needs"
    if head.entry.holder is not None and alive(head.entry.holder) is not False:
        return [Finding("leftovers", "ok", f"{what}: of a save that is under way, perhaps")]
    return [Finding("leftovers", "note", what, f"holdfast gc {shell_word(address)}")]


def _writer(head: Head | None, alive: Alive, clock: Callable[[], float]) -> Finding:
    holder = head.entry.holder if head else None
    if head is None or holder is None:
        done = ": the run is finished" if head and head.entry.finished else ""
        return Finding("writer", "ok", f"no process writes it{done}")
    who = f"process {holder.pid} on {holder.host}"
    ago = format_ago(clock() - head.entry.time_s)
    living = alive(holder)
    if living:
        return Finding("writer", "ok", f"{who} writes it; its last commit was {ago}")
    if living is None:
        what = f"{who} opened it; whether it still runs cannot be known from here"
        return Finding("writer", "note", f"{what}. Its last commit was {ago}")
    what = f"{who} is gone and did not close it; its last commit was {ago}"
    return Finding("writer", "note", what, "Start the job again: it goes on.")


def _file_system(repo: Repo) -> list[Finding]:
    try:
        found = probe(repo.store)
    except OSError as error:
        return [Finding("file system", "note", f"it cannot be looked at: {error.strerror}")]
    if found is None:
        return []
    what = f"{found.kind or 'unknown kind'}, {format_size(found.free_bytes)} free"
    if not found.writable:
        return [Finding("file system", "note", f"{what}; not writable here: {found.reason}")]
    what += f"; {_abilities_text(found)}"
    if found.safe:
        return [Finding("file system", "ok", what)]
    do = "It can be read here, but not be written: copy the run to a local disk or NFS."
    return [Finding("file system", "note", what, do)]


def _abilities_text(found: Abilities) -> str:
    named = {
        "hard links": found.hard_links,
        "renaming without replacing": found.rename_new,
        "sync of folders": found.sync_folders,
        "preallocation": found.preallocation,
    }
    able = [name for name, works in named.items() if works]
    unable = [name for name, works in named.items() if not works]
    return "; ".join(
        filter(None, (", ".join(able), f"without {', '.join(unable)}" if unable else ""))
    )


def _versions(newest: Manifest | None) -> Finding:
    here = f"Holdfast {__version__} here reads formats up to {FORMAT}"
    packages = newest.environment.get("packages") if newest else None
    wrote = packages.get("holdfast") if isinstance(packages, dict) else None
    by = f"; {wrote} wrote the newest checkpoint" if wrote else ""
    return Finding("versions", "ok", here + by)
