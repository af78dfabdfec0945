"""What a copy of a run lacks of it, and what becomes of each checkpoint there. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from holdfast.core.records import Record
from holdfast.manager.info import Action
from holdfast.repo import keys
from holdfast.repo.copies import updated


@dataclass(frozen=True)
class Wish:
    """What the caller of `copy` or `sync` asked for."""

    ids: Collection[str] | None
    """The checkpoints; None: all, and what the source no longer lists is looked at, too."""
    delete: bool = False
    dry_run: bool = False
    verify: bool = False


class Planned(NamedTuple):
    """What is to become of one checkpoint in the target."""

    record: Record
    action: Action
    why: tuple[str, ...]
    nbytes: int


def plan(
    source: Sequence[Record],
    target: Sequence[Record],
    wish: Wish,
    *,
    needs: Mapping[str, Mapping[str, int]],
    there: Mapping[str, int],
) -> list[Planned]:
    """What is to be done with each checkpoint, in the order of the source; then with those
    that only the target has.

    `needs`: the packs of each checkpoint of the source, by its id; `there`: every object
    of the target, by its key, with its size.
    """
    listed = {record.id: record for record in target}
    new = {r.id: r for r in updated(target, source, wish.ids)}
    planned: list[Planned] = []
    coming: set[str] = set()
    for record in source:
        if wish.ids is not None and record.id not in wish.ids:
            continue
        missing = {
            name: nbytes
            for name, nbytes in needs[record.id].items()
            if there.get(keys.pack_key(name)) != nbytes and name not in coming
        }
        coming.update(missing)
        size = sum(missing.values())
        old = listed.get(record.id)
        if old is None:
            planned.append(Planned(record, "copy", ("not there",), size))
        elif lacks := _lacks(record, missing, there):
            planned.append(Planned(record, "repair", (lacks,), size))
        elif changed := _changed(old, new[record.id]):
            planned.append(Planned(record, "update", (f"new {changed}",), 0))
        else:
            planned.append(Planned(record, "keep", ("the same",), 0))
    if wish.ids is None:
        planned += _not_in_source(source, target, new, delete=wish.delete)
    return planned


def _lacks(record: Record, missing: Mapping[str, int], there: Mapping[str, int]) -> str:
    """Which objects of a listed checkpoint are missing in the target."""
    words: list[str] = []
    if keys.manifest_key(record.id) not in there:
        words.append("its manifest")
    if missing:
        words.append(f"{len(missing)} pack{'s' if len(missing) > 1 else ''}")
    if not words:
        return ""
    return f"{' and '.join(words)} {'is' if len(words) == len(missing) == 1 else 'are'} missing"


def _changed(old: Record, new: Record) -> str:
    """What a listed checkpoint is to get, as a few words."""
    fields = {
        "metrics": (old.metrics, old.odd_metrics) != (new.metrics, new.odd_metrics),
        "tags": old.tags != new.tags,
        "note": old.note != new.note,
        "pins": old.pins != new.pins,
    }
    return ", ".join(name for name, differs in fields.items() if differs)


def _not_in_source(
    source: Sequence[Record],
    target: Sequence[Record],
    new: Mapping[str, Record],
    *,
    delete: bool,
) -> list[Planned]:
    ids = {record.id for record in source}
    others = [record for record in target if record.id not in ids]
    gone = {r.id for r in others if delete and not r.pins}
    users = {name for r in target if r.id not in gone for name in r.packs}
    planned: list[Planned] = []
    for record in others:
        if record.id in gone:
            only = {n: size for n, size in record.packs.items() if n not in users}
            users.update(only)  # each is counted once
            why = "the source no longer lists it"
            planned.append(Planned(record, "remove", (why,), sum(only.values())))
        elif record.pins:
            pins = [f"pinned: {pin}" if pin else "pinned" for pin in record.pins]
            planned.append(Planned(record, "keep", tuple(pins), 0))
        elif changed := _changed(record, new[record.id]):
            planned.append(Planned(record, "update", (f"new {changed}",), 0))
        else:
            planned.append(Planned(record, "keep", ("only there",), 0))
    return planned
