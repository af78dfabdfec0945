"""`Listing`: a run's checkpoints as its log lists them, and what can be changed there.

Like `lookup` it imports neither NumPy nor the tree code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from holdfast.core.address import available
from holdfast.core.address import validate_tag as check_tag
from holdfast.core.records import Record
from holdfast.core.retention import Decision, decide, parse_keep
from holdfast.errors import CheckpointNotFound, UsageError
from holdfast.manager.edits import more_metrics, require, split_metrics, with_tag
from holdfast.manager.info import CheckpointInfo, info_of, recorded_rules
from holdfast.manager.lookup import Lookup, Ref
from holdfast.repo.lending import is_fork_pin
from holdfast.stores.base import ObjectInfo

if TYPE_CHECKING:
    from holdfast.manager.doctor import Health


class Listing(Lookup):
    """The checkpoints of one run, for a process that is not its writer.

    Reads the list, changes tags, pins and metrics, prunes, verifies and exports; safe
    beside a live writer. Opening it creates nothing. `keep` is the rule that `prune`
    applies; where it has no `best=`, "best" follows the rule that the run recorded.
    """

    def tag(self, ref: Ref, name: str) -> CheckpointInfo:
        """Give a checkpoint a name; it moves there if another had it. Tagged ones stay."""
        check_tag(name)
        id = self._resolve(ref).id
        tagged: list[Record] = []

        def change(records: tuple[Record, ...]) -> list[Record]:
            tagged[:] = [with_tag(require(records, id, self.address), True, name)]
            return [tagged[0] if r.id == id else with_tag(r, False, name) for r in records]

        self._amend("tag", change)
        # Not read anew: another rank may be here before rank 0 has committed it.
        return info_of(self.address, tagged[0])

    def untag(self, name: str) -> None:
        """Take a tag away. Raises CheckpointNotFound if no checkpoint has it."""
        records = self._read()[1]
        if not any(name in record.tags for record in records):
            raise CheckpointNotFound(
                f"no checkpoint of {self.address} has the tag {name!r}",
                hint=available(records) if records else "",
            )
        self._amend("untag", lambda records: [with_tag(r, False, name) for r in records])

    def pin(self, ref: Ref, reason: str = "") -> CheckpointInfo:
        """Keep a checkpoint whatever the rules say, until `unpin`."""
        if is_fork_pin(reason):
            raise UsageError(
                f"a reason cannot start like a forked run's pin: {reason!r}",
                hint="Word it otherwise.",
            )
        return self._edit("pin", ref, lambda r: {"pins": tuple(sorted({*r.pins, reason}))})

    def unpin(self, ref: Ref) -> CheckpointInfo:
        """Leave a checkpoint to the rules again. Pins of forked runs stay."""
        return self._edit("unpin", ref, lambda r: {"pins": tuple(filter(is_fork_pin, r.pins))})

    def log_metrics(self, ref: Ref, metrics: Mapping[str, float]) -> CheckpointInfo:
        """Add metrics to a checkpoint after the fact; its data is not touched."""
        finite, odd = split_metrics(metrics)
        return self._edit("metrics", ref, lambda record: more_metrics(record, finite, odd))

    def _edit(
        self, action: str, ref: Ref, fields: Callable[[Record], Mapping[str, object]]
    ) -> CheckpointInfo:
        id = self._resolve(ref).id
        edited: list[Record] = []

        def change(records: tuple[Record, ...]) -> list[Record]:
            old = require(records, id, self.address)
            edited[:] = [msgspec.structs.replace(old, **fields(old))]
            return [edited[0] if r.id == id else r for r in records]

        self._amend(action, change)
        return info_of(self.address, edited[0])

    def prune(self, keep: str | None = None, *, dry_run: bool = False) -> list[Decision]:
        """Apply a retention rule now (its own without `keep`).

        Returns each checkpoint with the reason why it stays or goes. With `dry_run`
        nothing is changed. Safe beside a live writer in another process.

        Where something would go, the newest checkpoints are read first, up to one
        whose every byte is right: that one stays, and damaged ones take nobody's
        place. Raises NoIntactCheckpoint, and removes nothing, if there is none.
        """
        policy = self.policy if keep is None else parse_keep(keep)
        records = self._read()[1]
        decisions = decide(records, policy)
        if all(d.keep for d in decisions):
            return decisions
        from holdfast.manager.verify import newest_intact

        intact, damaged = newest_intact(self._repo, records, self.address)

        def verdicts(records: tuple[Record, ...]) -> list[Decision]:
            # A checkpoint that was committed since then is newer, but was not read.
            found = decide(records, policy, damaged=damaged)
            stays = {"keep": True, "why": ("newest verified",)}
            return [
                d._replace(**stays) if d.record.id == intact and not d.keep else d for d in found
            ]

        decisions = verdicts(records)
        if dry_run or all(d.keep for d in decisions):
            return decisions

        def change(records: tuple[Record, ...]) -> list[Record]:
            decisions[:] = verdicts(records)
            return [d.record for d in decisions if d.keep]

        self._amend("prune", change)
        return decisions

    def remove(
        self, refs: Iterable[Ref], *, force: bool = False, dry_run: bool = False
    ) -> list[Decision]:
        """Remove these checkpoints, all or none; what becomes of each of the run, and why.

        What no retention rule would remove (the newest intact one, the best by the run's
        rule, pinned and tagged ones) is removed only with `force`; what a forked run
        needs, never. To know what is intact the newest are read first, as by `prune`;
        with `force` nothing is read. With `dry_run` nothing is changed, and those that
        would stay are in the result. Safe beside a live writer in another process.

        Raises CheckpointProtected naming those that must stay; NoIntactCheckpoint;
        CheckpointNotFound.
        """
        from holdfast.manager.removal import plan_removal, refuse

        entry, records = self._read()
        rules = self.policy.best or recorded_rules(entry)
        named = {self._resolve(ref).id for ref in refs}
        intact, damaged = None, frozenset[str]()
        if not force and records:
            from holdfast.manager.verify import newest_intact

            intact, damaged = newest_intact(self._repo, records, self.address)

        def plan(records: tuple[Record, ...]) -> list[Decision]:
            return plan_removal(records, named, rules, intact=intact, damaged=damaged, force=force)

        decisions = plan(records)
        if dry_run:
            return decisions
        refuse(decisions, self.address)

        def change(records: tuple[Record, ...]) -> list[Record]:
            for id in named:
                require(records, id, self.address)
            decisions[:] = plan(records)
            refuse(decisions, self.address)  # it may have been tagged or pinned since
            return [d.record for d in decisions if d.keep]

        self._amend("remove", change)
        return decisions

    def collect_orphans(
        self, *, dry_run: bool = False, take_over: bool = False
    ) -> list[ObjectInfo]:
        """Delete what unfinished saves left; the objects (key, size).

        Refuses a run with a live writer, or one that may live on another machine, unless
        `take_over`: that process can then save no more. Raises RunHeld, NoStore,
        CorruptionError where the log must be repaired first.
        """
        from holdfast.repo.orphans import collect_orphans

        self._check_usable()
        return collect_orphans(self._repo, dry_run=dry_run, take_over=take_over)

    def examine(self, *, full: bool = False, checkpoints: bool = True) -> Health:
        """The health of the run, by sizes or, with `full`, by every digest; without
        `checkpoints` only of what lists them. Changes nothing. Raises NoStore."""
        from holdfast.manager import doctor

        self._check_usable()
        repo, address, clock = self._repo, self.address, self._clock
        return doctor.examine(repo, address, full=full, checkpoints=checkpoints, clock=clock)

    def repair(self, *, take_over: bool = False) -> None:
        """Rebuild a damaged list of checkpoints from those that are whole, and commit it.

        A job that starts does the same. Refuses a run with a live writer as
        `collect_orphans` does.
        """
        from holdfast.manager.doctor import repair

        self._check_usable()
        self._repo.store.prepare_writing()
        repair(self._repo, take_over=take_over)

    def _amend(self, action: str, change: Callable[[tuple[Record, ...]], Iterable[Record]]) -> None:
        """Commit a changed list, as a guest of the run's writer."""
        self._check_usable()
        self._repo.store.prepare_writing()
        self._repo.amend(action, change)
