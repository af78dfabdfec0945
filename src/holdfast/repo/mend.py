"""Replacing damaged objects of a run by intact ones of another, such as a copy of it.

Objects are never changed, so a damaged one is deleted and an intact one put in its place:
not before the new one is complete and every digest of it was right. In between there is
none; whoever is stopped there finds the same intact one again. Safe beside the run's writer:
it puts a name once, and a name stands for the same bytes for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from holdfast.core.records import Pack, Record
from holdfast.errors import (
    CheckpointRemoved,
    CorruptionError,
    DamagedObject,
    ObjectNotFound,
    StateError,
)
from holdfast.repo import keys
from holdfast.repo.check import MANIFEST_MAX_BYTES
from holdfast.repo.copies import put_manifest
from holdfast.repo.pace import Pace
from holdfast.repo.pack_copy import PackJob, copy_packs
from holdfast.repo.ranges import Check, Range, ranges_of, united
from holdfast.repo.repo import Repo, manifest_of


class Mended(NamedTuple):
    """What became of one damaged object."""

    key: str
    problem: str
    """Why it could not be replaced; "" if it was."""


def mend_manifest(run: Repo, record: Record, other: Repo) -> Mended | None:
    """Replace the manifest of a listed checkpoint if it is damaged or missing; None if not.

    Raises CheckpointRemoved; StoreReadOnly, StoreUnavailable.
    """
    try:
        run.manifest(record)
        return None
    except CorruptionError:
        pass
    key = keys.manifest_key(record.id)
    try:
        data = other.store.get(key, max_bytes=MANIFEST_MAX_BYTES)
        manifest_of(record.id, data)
    except ObjectNotFound:
        return Mended(key, f"{other.address} does not have it")
    except CorruptionError as error:
        return Mended(key, f"it is no better in {other.address}: {error.message}")
    put_manifest(run, record.id, data)
    return Mended(key, "")


def mend_packs(
    run: Repo,
    names: Iterable[str],
    other: Repo,
    *,
    pace: Pace | None = None,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> list[Mended]:
    """Replace these packs, which are damaged or missing, by those of the same names in
    `other`, if every byte is right there that any checkpoint of the run uses.

    Raises StoreFull, StoreReadOnly, StoreUnavailable; CopyStopped.
    """
    wanted = dict.fromkeys(names)
    packs, ranges = _what_is_said_of(run, wanted)
    done: list[Mended] = []
    for name in wanted:
        key = keys.pack_key(name)
        if name not in packs:
            done.append(Mended(key, "no manifest that can be read says what it holds"))
            continue
        try:
            job = _job(run, packs[name], ranges[name], other)
            copy_packs([job], run.store, pace=pace or Pace(), on_bytes=on_bytes)
        except ObjectNotFound:
            done.append(Mended(key, f"{other.address} does not have it"))
        except (DamagedObject, StateError) as error:
            done.append(Mended(key, f"it is no better in {other.address}: {error.message}"))
        else:
            done.append(Mended(key, ""))
    return done


def _job(run: Repo, pack: Pack, ranges: list[list[Range]], other: Repo) -> PackJob:
    key = keys.pack_key(pack.name)
    size = other.store.size(key)
    if size != pack.nbytes:
        raise DamagedObject(key, f"it has {size:,} bytes, not {pack.nbytes:,}")
    try:
        run.store.size(key)
        there = True
    except ObjectNotFound:
        there = False
    except DamagedObject:
        there = True  # something else lies there, such as a link

    def read(offset: int, into: memoryview) -> None:
        other.store.read_into(key, offset, into)

    checks = [Check(pack.name, part) for part in ranges]
    return PackJob(pack.name, pack.nbytes, read, checks, replaces=there)


def _what_is_said_of(
    run: Repo, names: Iterable[str]
) -> tuple[dict[str, Pack], dict[str, list[list[Range]]]]:
    """Of packs that the run holds: what all of its manifests say of them."""
    wanted = set(names)
    packs: dict[str, Pack] = {}
    parts: dict[str, list[list[Range]]] = {}
    for record in run.records():
        if wanted.isdisjoint(record.packs):
            continue
        try:
            manifest = run.manifest(record)
        except (CorruptionError, CheckpointRemoved):
            continue
        found = ranges_of(manifest)
        for pack in manifest.packs:
            if pack.name in wanted and not pack.run:
                packs[pack.name] = pack
                parts.setdefault(pack.name, []).append(found[pack.name])
    return packs, {name: united(part) for name, part in parts.items()}
