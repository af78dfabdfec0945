"""Restoring: choose the checkpoint, accept its structure, verify, fill, finish."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.core.address import shell_word
from holdfast.core.records import Manifest, Record
from holdfast.core.rng import apply_rng
from holdfast.core.tree import TreeDecoder
from holdfast.core.units import format_list
from holdfast.core.values import collector_paused
from holdfast.errors import (
    CheckpointRemoved,
    CorruptionError,
    DamagedObject,
    NoIntactCheckpoint,
    PickleRefused,
)
from holdfast.manager.info import Restored, info_of
from holdfast.manager.reader import ChunkReader, Wanted, pack_heads, wanted_for
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
    ) -> None:
        """`find` gives the newest checkpoint that is wanted. `distrusted` and `told` outlive
        it: packs in which damage was found, and the checkpoints about which something was
        logged."""
        self._repo = repo
        self._address = address
        self._find = find
        self._distrusted = distrusted
        self._told = told
        self._on_restored = on_restored

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
        manifest = self._repo.manifest(record)
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
            record = chosen or self._find(lambda record: record.id not in tried)
            if record is None or record.id in tried:
                break
            tried.add(record.id)
            try:
                found = attempt(record)
            except CheckpointRemoved:
                if chosen:
                    raise
                continue  # pruned while it was read: the list is read again
            except CorruptionError as error:
                if chosen:
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
            return Restored(
                found.info,
                found.loop,
                found.config,
                found.environment,
                found.values,
                tuple(skipped),
            )
        if not tried:
            return None
        raise NoIntactCheckpoint(
            f"none of the {len(skipped)} checkpoint(s) of {self._address} is intact:"
            + format_list(skipped),
            hint=f"Look at the damage: holdfast verify {shell_word(self._address)}. "
            "To start over, choose another address; nothing here was changed.",
        )

    def _restore(self, record: Record, wish: Wish) -> Restored:
        manifest = self._repo.manifest(record)
        if manifest.pickled and not wish.allow_pickle:
            raise PickleRefused(
                f"checkpoint {self._address}@{record.step} holds pickled values, which run code "
                "when they are loaded",
                hint="If you trust whoever wrote it, pass allow_pickle=True.",
            )
        # Sizes that a manifest claims are compared with what is stored before anything
        # is allocated for them.
        reader = ChunkReader(self._repo, record, manifest)
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
            apply_rng(runtime.get("rng") or {})
        self._on_restored(manifest)
        return self._answer(record, manifest, runtime, values)

    def _fill(self, record: Record, manifest: Manifest, *decoders: TreeDecoder) -> None:
        """As `fill`; remembers damaged packs, which must not be reused by a save."""
        try:
            fill(self._repo, record, manifest, *decoders, also=pack_heads(manifest))
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
        )


def fill(
    repo: Repo,
    record: Record,
    manifest: Manifest,
    *decoders: TreeDecoder,
    also: Sequence[Wanted] = (),
) -> None:
    """Read and verify all that decoders asked for, then run their finishers."""
    with collector_paused():
        requests = [request for decoder in decoders for request in decoder.requests]
        wanted = [*wanted_for(manifest, requests), *also]
    ChunkReader(repo, record, manifest).read(wanted)
    for decoder in decoders:
        decoder.run()
