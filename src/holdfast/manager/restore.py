"""Restoring: choose the checkpoint, accept its structure, verify, fill, finish."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from holdfast.core.address import shell_word
from holdfast.core.group import ALONE, Group, Ranks
from holdfast.core.records import Manifest, Record
from holdfast.core.rng import apply_rng, derived_rng
from holdfast.core.tree import TreeDecoder
from holdfast.core.units import format_list
from holdfast.core.values import collector_paused
from holdfast.errors import (
    CheckpointRemoved,
    CorruptionError,
    DamagedObject,
    HoldfastError,
    NoIntactCheckpoint,
    PickleRefused,
    StoreUnavailable,
)
from holdfast.manager.info import Restored, info_of
from holdfast.manager.ranks import agreed, told
from holdfast.manager.reader import ChunkReader, pack_heads, wanted_for
from holdfast.repo.joining import alike, view_of
from holdfast.repo.repo import Repo

logger = logging.getLogger("holdfast")

RUNTIME = "~"
"""Where the paths of the runtime section's leaves start: no name of a user's does."""


@dataclass(frozen=True)
class Wish:
    """What the caller of `restore` asked for."""

    into: MutableMapping[str, Any] | None
    strict: bool = True
    only: Collection[str] = ()
    skip: Collection[str] = ()
    rename: Mapping[str, str] | None = None
    allow_pickle: bool = False
    rng: bool = True


class Restorer:
    """Restores from one run. Short-lived: made for each call."""

    def __init__(
        self,
        repo: Repo,
        address: str,
        find: Callable[[Callable[[Record], bool]], Record | None],
        distrusted: set[str],
        told: set[str],
        on_restored: Callable[[Manifest], None],
        group: Group | None = None,
    ) -> None:
        """`find` gives the newest checkpoint that is wanted. `distrusted` and `told` outlive
        it: packs in which damage was found, and the checkpoints about which something was
        logged. Of a `group` all ranks go on from the same checkpoint, or none does."""
        self._group = group
        self._repo = repo
        self._address = address
        self._find = find
        self._distrusted = distrusted
        self._told = told
        self._on_restored = on_restored

    @property
    def _ranks(self) -> Ranks:
        return ALONE if self._group is None else self._group.ranks

    def restore(self, chosen: Record | None, wish: Wish) -> Restored | None:
        """Restore `chosen`, or the newest intact checkpoint. See CheckpointManager.restore."""
        return self._newest_intact(chosen, lambda record: self._restore(record, wish))

    def read_loop(self, chosen: Record | None) -> Restored | None:
        """Only the runtime section, from `chosen` or the newest that has it intact."""
        return self._newest_intact(chosen, self._read_loop)

    def go_on(self, restore: Callable[[Restored], Restored]) -> Restored | None:
        """See CheckpointManager.go_on."""
        return self._newest_intact(None, lambda record: restore(self._read_loop(record)))

    def _read_loop(self, record: Record) -> Restored:
        manifest = self._manifest(record)
        decoder = TreeDecoder(manifest.leaves)
        runtime = decoder.apply(manifest.runtime, path=RUNTIME)
        self._fill(record, manifest, decoder)
        return self._answer(record, manifest, runtime, {})

    def _newest_intact(
        self, chosen: Record | None, attempt: Callable[[Record], Restored]
    ) -> Restored | None:
        skipped: list[str] = []
        tried: set[str] = set()
        while True:
            id, record = self._choose(chosen, tried)
            if id is None or id in tried:
                break
            tried.add(id)
            try:
                group = None if chosen else self._group
                record, found = self._together(group, record, attempt)
            except CheckpointRemoved:
                if chosen:
                    raise
                continue  # pruned while it was read: the list is read again
            except CorruptionError as error:
                if chosen or record is None:
                    raise
                why = error.brief if isinstance(error, DamagedObject) else error.message
                name = f"checkpoint {self._address}@{record.step}"
                skipped.append(f"{name} is damaged: {why}")
                if record.id not in self._told:
                    self._told.add(record.id)
                    logger.error("%s is damaged, trying the one before it:\n  %s", name, why)
                continue
            if skipped and record.id not in self._told:
                self._told.add(record.id)
                logger.error("fell back to %s@%d", self._address, record.step)
            return replace(found, skipped=tuple(skipped))
        if not tried:
            return None
        raise NoIntactCheckpoint(
            f"none of the {len(skipped)} checkpoint(s) of {self._address} is intact:"
            + format_list(skipped),
            hint=f"Look at the damage: holdfast verify {shell_word(self._address)}. "
            "To start over, choose another address; nothing here was changed.",
        )

    def _choose(
        self, chosen: Record | None, tried: Collection[str]
    ) -> tuple[str | None, Record | None]:
        """What comes next, as (id, record); None for nothing. Rank 0 chooses for all: their
        listings may differ for a moment. An id without a record: this rank cannot see it."""

        def choose() -> Record | None:
            return chosen or self._find(lambda record: record.id not in tried)

        if self._group is None or chosen is not None:
            record = choose()
            return (record.id, record) if record else (None, None)
        id = told(self._group, lambda: record.id if (record := choose()) else None)
        return id, None if id is None else self._find(lambda record: record.id == id)

    def _unseen(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"rank 0 restores a checkpoint of {self._address} that another rank cannot see",
            hint="All ranks have to reach the same store: a shared folder or a bucket.",
        )

    def _together(
        self, group: Group | None, record: Record | None, attempt: Callable[[Record], Restored]
    ) -> tuple[Record, Restored]:
        """Of all ranks, or of none: raises what one of them has met."""
        found, error = None, None
        try:
            found = attempt(record) if record is not None else None
        except HoldfastError as problem:
            error = problem
        error = agreed(group, self._unseen() if record is None else error)
        if error is not None:
            raise error
        assert record is not None
        assert found is not None
        return record, found

    def _manifest(self, record: Record) -> Manifest:
        """As this rank has saved it."""
        manifest = self._repo.manifest(record)
        return manifest if self._group is None else view_of(manifest, self._group.ranks.rank)

    def _restore(self, record: Record, wish: Wish) -> Restored:
        manifest = self._manifest(record)
        if manifest.pickled and not wish.allow_pickle:
            raise PickleRefused(
                f"checkpoint {self._address}@{record.step} holds pickled values, which run code "
                "when they are loaded",
                hint="If you trust whoever wrote it, pass allow_pickle=True.",
            )
        # Sizes that a manifest claims are compared with what is stored before anything
        # is allocated for them.
        reader = ChunkReader(self._repo, record, manifest, self._ranks)
        reader.check_packs(manifest.leaves)
        decoder = TreeDecoder(manifest.leaves, allow_pickle=wish.allow_pickle, fetch=reader.fetch)
        system = TreeDecoder(manifest.leaves)
        try:
            values = decoder.apply(
                manifest.tree, wish.into, only=wish.only, skip=wish.skip, rename=wish.rename
            )
            runtime = system.apply(manifest.runtime, path=RUNTIME)
            differences = decoder.report(strict=wish.strict)
            self._fill(record, manifest, system, decoder)
        except BaseException:
            decoder.discard()
            raise
        if differences:
            logger.warning("restored in part:\n  %s", "\n  ".join(differences.lines()))
        if wish.rng:
            apply_rng(self._rng_for(manifest, runtime.get("rng") or {}))
        self._on_restored(manifest)
        return self._answer(record, manifest, runtime, values)

    def _rng_for(self, manifest: Manifest, states: dict[str, Any]) -> dict[str, Any]:
        """A rank that was not there draws numbers of its own, as those that were there do."""
        ranks = None if self._group is None else self._group.ranks
        if ranks is None or ranks.rank < manifest.world_size or alike(manifest, "rng"):
            return states
        return derived_rng(states, ranks.rank)

    def _fill(self, record: Record, manifest: Manifest, *decoders: TreeDecoder) -> None:
        """As `fill`; remembers damaged packs, which must not be reused by a save."""
        try:
            heads = "all" if self._group is None else "needed"
            fill(self._repo, record, manifest, *decoders, heads=heads, ranks=self._ranks)
        except DamagedObject as error:
            self._distrusted.add(error.key.removeprefix("packs/").removesuffix(".safetensors"))
            raise

    def _answer(
        self,
        record: Record,
        manifest: Manifest,
        runtime: Mapping[str, Any],
        values: Mapping[str, Any],
    ) -> Restored:
        return Restored(
            info=info_of(self._address, record),
            loop=runtime.get("loop"),
            config=manifest.config,
            environment=manifest.environment,
            values=values,
            world_size=manifest.world_size,
        )


def fill(
    repo: Repo,
    record: Record,
    manifest: Manifest,
    *decoders: TreeDecoder,
    heads: Literal["", "all", "needed"] = "",
    ranks: Ranks = ALONE,
) -> None:
    """Read and verify all that decoders asked for, then run their finishers. The headers of
    packs are verified, too: of all packs, so that damage to a part that is not asked for may
    show; or of those that are needed, for of many ranks each reads a part."""
    with collector_paused():
        requests = [request for decoder in decoders for request in decoder.requests]
        wanted = wanted_for(manifest, requests, ranks)
        if heads:
            needed = {one.chunk.pack for one in wanted} if heads == "needed" else None
            wanted += pack_heads(manifest, needed)
    ChunkReader(repo, record, manifest, ranks).read(wanted)
    for decoder in decoders:
        decoder.run()
