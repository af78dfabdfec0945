"""`Lookup`: what a run's log lists, and everything that can be asked without changing it.

Imports neither NumPy nor the tree code: this is what `holdfast ls` waits for. What
reads or writes a state is in `manager`, or imported when it is called.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from holdfast.core.address import (
    BestBy,
    Selector,
    newest_that,
    no_checkpoint,
    parse_selector,
    select,
)
from holdfast.core.choosing import Choice, choose, parse_choice
from holdfast.core.records import Entry, Manifest, Record
from holdfast.core.retention import KeepPolicy, Mode, parse_keep
from holdfast.errors import CheckpointNotFound, NoStore, RunClosed
from holdfast.manager.info import (
    CheckpointInfo,
    Overview,
    RunStatus,
    Transfer,
    Verification,
    info_of,
    overview_of,
    recorded_rules,
    status_of,
)
from holdfast.manager.progress import current_work
from holdfast.repo.repo import Repo
from holdfast.repo.results_list import Summary, summary
from holdfast.stores.base import Store
from holdfast.stores.open import open_store

if TYPE_CHECKING:
    from holdfast.manager.comparison import Comparison
    from holdfast.manager.exported import Exported
    from holdfast.manager.foreign_comparison import Compared
    from holdfast.manager.goodput import Goodput
    from holdfast.manager.history import Event
    from holdfast.manager.mirror_status import MirrorStatus

Ref = str | int | None
"""A checkpoint: a step, "latest", "best:val_loss", a tag, the start of an id; None = latest."""


class Lookup:
    """The reading half of `Listing`: lists, verifies, copies and exports."""

    def __init__(
        self,
        address: str | os.PathLike[str],
        *,
        keep: str | None = None,
        store: Store | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.address = os.fspath(address)
        self.policy: KeepPolicy = parse_keep(keep)
        self._clock = clock
        self._repo = Repo(store if store is not None else open_store(self.address), clock=clock)
        self._closed = False
        self._pid = os.getpid()

    def close(self) -> None:
        """Close the store. May be called twice."""
        if self._closed or self._pid != os.getpid():
            return  # a forked child holds nothing
        self._closed = True
        self._repo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- reading ---------------------------------------------------------------

    def checkpoints(self) -> list[CheckpointInfo]:
        """Every live checkpoint, oldest commit first; none where there is no run yet."""
        return [info_of(self.address, record) for record in self._read()[1]]

    def latest(self) -> CheckpointInfo | None:
        """The newest checkpoint, or None."""
        return next(iter(self.newest(1)), None)

    def newest(self, count: int) -> list[CheckpointInfo]:
        """The newest `count` checkpoints, newest commit first: of a long list the end is read."""
        found = self._repo.newest(count) if self._is_run() else ()
        return [info_of(self.address, record) for record in found]

    def best(self, metric: str | None = None, mode: Mode | None = None) -> CheckpointInfo | None:
        """The checkpoint with the lowest (mode "max": highest) finite `metric`, or None.

        What is not said is taken from the `keep` rule, the manager's own or else the
        one that the run recorded; a metric without a rule is better when it is lower.
        Raises BadAddress if it is not clear which metric, or whether higher is better.
        """
        try:
            return info_of(self.address, self._select(BestBy(metric, mode)))
        except (CheckpointNotFound, NoStore):
            return None

    def info(self, ref: Ref = None) -> CheckpointInfo:
        """The checkpoint that `ref` names. Raises NoStore, CheckpointNotFound, BadAddress."""
        return info_of(self.address, self._resolve(ref))

    def choose(self, checkpoints: Choice = "all") -> list[CheckpointInfo]:
        """The checkpoints that `checkpoints` names, oldest commit first: "all", "last=5",
        "best=3:val_loss", "every=1000", "within=2h", a step, a tag, an id, several of these
        words, or a list of them. Raises NoStore, CheckpointNotFound, BadAddress, BadPolicy.
        """
        chosen = parse_choice(checkpoints)
        entry, records = self._read()
        if not records:
            raise self.nothing()
        rules = self.policy.best or recorded_rules(entry)
        return [info_of(self.address, record) for record in choose(records, chosen, rules)]

    def manifest(self, ref: Ref = None) -> Manifest:
        """The checkpoint's whole description. Raises DamagedObject."""
        return self._repo.manifest(self._resolve(ref))

    @property
    def finished(self) -> bool:
        """Whether the newest checkpoint was saved as a finished run's last."""
        return self.status().finished

    def status(self) -> RunStatus:
        """Whether it is finished, who writes it, what it takes; as of now."""
        return status_of(*self._read())

    def overview(self, newest: int | None = None) -> Overview:
        """The run and its checkpoints, newest first; of a long list the `newest` only, and
        of the older ones as many that have a tag or a pin, or are the best by a rule.
        """
        return overview_of(self.address, *self._read(), newest)

    def mirror_status(self) -> MirrorStatus | None:
        """What the run's mirror lists, if it answers quickly; None if the run has none."""
        from holdfast.manager.mirror_status import mirror_status

        return mirror_status(self._repo)

    def events(self) -> list[Event]:
        """What happened to the run, by its writers, oldest first: saves, restores, starts, ends;
        none where nothing was recorded. Raises NoStore where there is no run."""
        from holdfast.manager.history import History

        self._check_usable()
        events = History(self._repo.store).read()
        if not events:
            self._repo.info()
        return events

    def goodput(self, events: Sequence[Event] | None = None) -> Goodput | None:
        """Where the run's time went, up to now if its writer is known to be alive; None where
        no start was recorded. From `events`, else from those that are there."""
        from holdfast.manager.goodput import of_run

        return of_run(self._repo, self.events() if events is None else events, self._clock())

    def stored_results(self) -> Summary:
        """How many results of calls (`Run.once`) the run has, and their bytes."""
        self._check_usable()
        return summary(self._repo.store)

    def verify(
        self, ref: Ref = None, *, repair_from: str | os.PathLike[str] | None = None
    ) -> list[Verification]:
        """Read every byte of one checkpoint, or of all, and compare with its digest.

        Packs and manifests that are damaged or missing are replaced by those of the same
        names in the run at `repair_from`, if they are whole there. Safe beside a live writer.
        Of the run's log nothing is said (`examine`) and nothing replaced (`repair`).
        """
        from holdfast.manager.verify import verify_all

        records = self._read()[1] if ref is None else (self._resolve(ref),)
        current_work().begin(sum(record.nbytes for record in records))
        return verify_all(self._repo, records, self.address, repair_from)

    def copy(
        self,
        refs: Iterable[Ref],
        to: str | os.PathLike[str],
        *,
        verify: bool = False,
        bandwidth: int | None = None,
        take_over: bool = False,
    ) -> list[Transfer]:
        """Copy these checkpoints to the run at `to`, which is made a copy of this one where
        there is none: the same ids, every byte verified on the way. What became of each.

        What is there is not copied again, and compared only with `verify`. `bandwidth` is in
        bytes per second. Damage of one, which is in the result, does not stop the others.

        Raises OtherRun if `to` is no copy of this run; RunHeld if a process writes it, or may
        do so elsewhere, unless `take_over`; what stores raise.
        """
        from holdfast.manager.replication import Wish, replicate

        wish = Wish({self._resolve(ref).id for ref in refs}, verify=verify)
        return replicate(self._repo, self.address, to, wish, bandwidth, take_over=take_over)

    def sync(
        self,
        to: str | os.PathLike[str],
        *,
        delete: bool = False,
        dry_run: bool = False,
        verify: bool = False,
        bandwidth: int | None = None,
        take_over: bool = False,
    ) -> list[Transfer]:
        """As `copy`, of all checkpoints, and bring metrics, tags and notes there up to date.

        `delete` removes there what this run no longer lists, unless it is pinned or something
        could not be copied. With `dry_run` nothing is changed.
        """
        from holdfast.manager.replication import Wish, replicate

        wish = Wish(None, delete, dry_run, verify)
        self._check_usable()
        return replicate(self._repo, self.address, to, wish, bandwidth, take_over=take_over)

    def export(
        self, ref: Ref, folder: str | os.PathLike[str], *, replace: bool = False
    ) -> list[Path]:
        """Write a checkpoint as plain files that need no Holdfast to be read.

        `state.safetensors` with every tensor, `state.json` with the rest, `files/`
        with tracked files; returns their paths. The folder must not exist or be empty,
        or, with `replace`, files of the same names in it are replaced. It appears
        when every byte was verified and is on disk; an error leaves nothing behind.

        Raises UsageError for a folder that cannot take it; DamagedObject.
        """
        from holdfast.manager.export import export

        return export(self._repo, self._resolve(ref), Path(folder), replace=replace)

    def export_tensors(
        self, ref: Ref, file: str | os.PathLike[str], *, only: str = "", replace: bool = False
    ) -> list[str]:
        """Write a checkpoint's tensors as one `.safetensors` file; their names in it.

        With `only="model"` those below this name, as `model.state_dict()` names them.
        The file appears when every byte was verified and is on disk.

        Raises UsageError for a file that is there, unless `replace`; DamagedObject.
        """
        from holdfast.manager.export import export_tensors

        record = self._resolve(ref)
        return export_tensors(self._repo, record, Path(file), only=only, replace=replace)

    def export_as(
        self,
        ref: Ref,
        to: str,
        target: str | os.PathLike[str],
        *,
        only: str = "",
        files: str | os.PathLike[str] | None = None,
        adapter: str = "",
        shard_size: int | str | None = None,
        replace: bool = False,
    ) -> Exported:
        """Write a checkpoint in the form that another program loads.

        | `to` | `target` | is read by |
        |---|---|---|
        | `"safetensors"` | a file; with `shard_size` a folder | safetensors |
        | `"pt"` | a file | `torch.load(file, weights_only=True)` |
        | `"dcp"` | a folder | `torch.distributed.checkpoint.load` |
        | `"hf"` | a folder | `transformers`: `AutoModel.from_pretrained(folder)` |
        | `"peft"` | a folder | `peft`: `PeftModel.from_pretrained(base, folder)` |

        `only` names a part of the state; for "hf" and "peft" the model, else `model`. `files`
        is a folder with config.json and the tokenizer's files, else they are taken from
        `pretrained_files` in the state. `adapter` names one of several. `shard_size` is in bytes or
        such as "5GB" ("hf": 5 GB, if it is not said). The target appears
        when every byte was verified and is on disk; an error leaves nothing behind.

        Raises UsageError for a target that is there, unless `replace`, and where what the
        format needs is not in the checkpoint; DamagedObject; StateError, PickleRefused.
        """
        from holdfast.manager.formats import export_as

        return export_as(
            self._repo,
            self._resolve(ref),
            to,
            Path(target),
            only=only,
            files=None if files is None else Path(files),
            adapter=adapter,
            shard_size=shard_size,
            replace=replace,
        )

    def compare(
        self, ref: Ref, other: Lookup, other_ref: Ref, *, values: bool = False
    ) -> Comparison:
        """What differs between a checkpoint of this run and one of `other`, which may be
        this run too. Digests are compared; with `values` what is unequal is read, to say
        how far it is apart.

        Raises CheckpointNotFound, DamagedObject.
        """
        from holdfast.manager.comparison import compare

        record, against = self._resolve(ref), other._resolve(other_ref)
        return compare(self._repo, record, other._repo, against, values=values)

    def to_compare(self, ref: Ref, *, only: str = "") -> Compared:
        """A checkpoint as one side of `foreign_comparison.compare_files`, with `only` what is
        below this name, where there is one. Raises CheckpointNotFound, DamagedObject."""
        from holdfast.manager.foreign_comparison import of_checkpoint

        return of_checkpoint(self._repo, self._resolve(ref), only)

    def _is_run(self) -> bool:
        self._check_usable()
        try:
            self._repo.info()
        except NoStore:
            return False
        return True

    def nothing(self) -> NoStore:
        """What to raise where the run was found to have no checkpoint."""
        return no_checkpoint(self.address, elsewhere=self._repo.elsewhere())

    def _read(self) -> tuple[Entry | None, tuple[Record, ...]]:
        """The newest log entry and its records; (None, ()) where there is no run yet."""
        if not self._is_run():
            return None, ()
        head, records = self._repo.listed()
        return (head.entry if head else None), records

    def _find(self, wanted: Callable[[Record], bool]) -> Record | None:
        """The newest record that is `wanted`, without reading all of a long list."""
        return self._repo.find(wanted) if self._is_run() else None

    def _resolve(self, ref: Ref) -> Record:
        return self._select(parse_selector(ref))

    def _select(self, selector: Selector) -> Record:
        if (wanted := newest_that(selector)) and (found := self._find(wanted)):
            return found
        entry, records = self._read()
        if not records:
            raise self.nothing()
        return select(records, selector, self.policy.best or recorded_rules(entry))

    def _check_usable(self) -> None:
        if self._closed:
            raise RunClosed(
                f"the manager of {self.address} is closed",
                hint="Open it again: holdfast.CheckpointManager(address).",
            )
        if self._pid != os.getpid():
            raise RunClosed(
                f"{self.address} was opened by process {self._pid}, not by this forked child",
                hint="Open it again in the child; only one process may write.",
            )
