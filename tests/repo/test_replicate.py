"""Copies of checkpoints in another run: what they are, and what is refused."""

from __future__ import annotations

import pytest

import holdfast
from holdfast.errors import (
    CheckpointRemoved,
    DamagedObject,
    Fenced,
    NoStore,
    OtherRun,
    RunHeld,
    UsageError,
)
from holdfast.repo import keys, log
from holdfast.repo.fork import fork
from holdfast.repo.rebuild import rebuild
from holdfast.repo.replicate import Replicator
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer
from holdfast.stores.faulty import FaultyStore
from holdfast.stores.memory import MemoryStore
from tests.repo.copies import (
    copy_all,
    damage,
    made,
    only_pack,
    opened,
)
from tests.repo.support import check, dead, ids, keep_last, live_packs, packs, process, save
from tests.repo.test_every_call import open_writer


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_CREATE_BACKOFF_S", 0.0)


# -- what a copy is ----------------------------------------------------------------------


def test_a_copy_has_the_same_ids_packs_and_manifests_byte_for_byte() -> None:
    source, target = made(1, 2, 3), MemoryStore("target")
    copy_all(source, target)
    assert check(target) == [1, 2, 3]
    theirs, ours = Repo(source).records(), Repo(target).records()
    assert theirs == ours
    assert packs(source) == packs(target)
    for folder in (keys.PACKS, keys.MANIFESTS):
        for info in source.list(folder):
            assert source.get(info.key, max_bytes=1 << 20) == target.get(
                info.key, max_bytes=1 << 20
            )
    assert Repo(source).info() == Repo(target).info()


def test_metrics_tags_notes_and_the_users_pins_travel_and_claims_of_forks_do_not() -> None:
    source, target = made(1, 2), MemoryStore("target")
    repo = Repo(source)
    repo.edit_record(
        "all",
        repo.records()[0].id,
        tags=("gold",),
        pins=("fork:../child", "mine"),
        odd_metrics={"x": "nan"},
        note="why",
    )
    copy_all(source, target)
    first = Repo(target).records()[0]
    assert (first.tags, first.pins, first.note) == (("gold",), ("mine",), "why")
    assert first.odd_metrics == {"x": "nan"}


def test_only_missing_packs_are_copied() -> None:
    source, target = made(1, 2, 3), MemoryStore("target")
    first, second, third = Repo(source).records()
    with opened(source, target) as copies:
        assert set(copies.copy(first.id).packs) == set(first.packs)
        shared = set(first.packs)
        assert set(copies.copy(second.id).packs) == set(second.packs) - shared
        again = copies.copy(second.id)
        assert (again.packs, again.added, again.replaced) == ({}, False, ())
    counted = FaultyStore(source)
    with opened(counted, target) as copies:
        assert set(copies.copy(third.id).packs) == set(third.packs) - shared
    read = {call.key for call in counted.calls if call.operation == "read_into"}
    assert read == {keys.pack_key(name) for name in set(third.packs) - shared}


def test_a_save_of_a_mirror_costs_its_packs_its_manifest_and_its_entry() -> None:
    source, target = made(1, 2), FaultyStore(MemoryStore("target"))
    with opened(source, target) as copies:
        for record in Repo(source).records():
            before = len(target.calls)
            copies.copy(record.id)
            calls = [(c.operation, c.key.split("/")[0]) for c in target.calls[before:]]
            assert calls == [
                ("put_new", "manifests"),
                ("put_new", "packs"),
                ("put_new", "log"),
                ("get", "log"),  # its parent is there
                ("list", "log/".rstrip("/")),  # and it is the newest
            ]


def test_copies_come_in_the_order_of_the_source_whatever_is_copied_first() -> None:
    source, target = made(1, 2, 3, 4), MemoryStore("target")
    records = Repo(source).records()
    with opened(source, target) as copies:
        for i in (3, 0, 2, 1):
            copies.copy(records[i].id)
    assert ids(Repo(target).records()) == ids(records)


def test_a_tag_that_moved_in_the_source_moves_in_the_copy() -> None:
    source, target = made(1, 2), MemoryStore("target")
    repo = Repo(source)
    first, second = repo.records()
    repo.edit_record("tag", first.id, tags=("gold",))
    with opened(source, target) as copies:
        copies.copy(first.id)
        repo.edit_record("untag", first.id, tags=())
        repo.edit_record("tag", second.id, tags=("gold",))
        copies.copy(second.id)
        assert [r.tags for r in copies.records()] == [(), ("gold",)]
        repo.edit_record("untag", second.id, tags=(), metrics={"late": 1.0})
        copies.update()
    assert Repo(target).records() == repo.records()


def test_finished_is_said_of_the_newest_checkpoint_only() -> None:
    address, other = "memory://finished/source", "memory://finished/target"
    with holdfast.CheckpointManager(address) as run:
        run.save(1, {"x": 1}).result()
        run.save(2, {"x": 2}, finished=True).result()
    source, target = MemoryStore.named("finished/source"), MemoryStore.named("finished/target")
    first, last = Repo(source).records()
    with opened(source, target) as copies, holdfast.CheckpointManager(other) as seen:
        copies.copy(first.id)
        assert not seen.finished
        copies.copy(last.id)
        assert seen.finished
        copies.update(retire=lambda records: [last.id])
        assert not seen.finished
    assert Repo(target).head().entry.keep == Repo(source).head().entry.keep  # pyright: ignore[reportOptionalMemberAccess]


def test_retirement_with_a_copy_spares_what_is_pinned() -> None:
    source, target = made(1, 2, 3), MemoryStore("target")
    with opened(source, target) as copies:
        for record in Repo(source).records():
            copies.copy(record.id, retire=keep_last(1))
            if record.step == 1:
                Repo(target).edit_record("pin", record.id, pins=("here",))
    assert check(target) == [1, 3]
    assert packs(target) == live_packs(Repo(target).records())


def test_a_job_goes_on_in_the_copy_and_its_epoch_is_above_all_that_came() -> None:
    source, target = made(1), MemoryStore("target")
    writer = open_writer(source)
    for _ in range(5):  # epochs go up
        writer = open_writer(source)
    save(writer, 2)
    copy_all(source, target)
    new = open_writer(target)
    base = Repo(target).records()[-1]
    record = save(new, 3, reuse=Repo(target).manifest(base))
    assert new.epoch > writer.epoch
    assert record.ordinal == 3
    new.collect()
    assert check(target) == [1, 2, 3]
    target.delete([info.key for info in target.list(keys.LOG)])
    rebuilt = rebuild(Repo(target)).records
    assert rebuilt is not None
    assert [r.step for r in rebuilt] == [1, 2, 3]


# -- forks -------------------------------------------------------------------------------


def forked(name: str) -> tuple[MemoryStore, MemoryStore]:
    """A run and one forked from it, which has saved once more, from what it borrows."""
    for address in (f"{name}/parent", f"{name}/child"):
        store = MemoryStore.named(address)
        store.delete([info.key for info in store.list("")])
    parent, child = MemoryStore.named(f"{name}/parent"), MemoryStore.named(f"{name}/child")
    save(open_writer(parent), 1)
    repo = Repo(parent)
    fork(repo, repo.records()[0], Repo(child))
    base = Repo(child).manifest(Repo(child).records()[0])
    save(open_writer(child), 2, reuse=base)
    return parent, child


def test_a_copy_of_a_fork_holds_what_the_fork_borrows() -> None:
    parent, child = forked("borrow")
    target = MemoryStore("far away")
    assert [bool(r.borrowed) for r in Repo(child).records()] == [True, True]
    copy_all(child, target)
    for store in (parent, child):  # all that is left is the copy
        store.delete([info.key for info in store.list("")])
    assert check(target) == [1, 2]
    records = Repo(target).records()
    assert [r.borrowed for r in records] == [(), ()]
    # It goes on there, reusing what was borrowed once.
    writer = open_writer(target)
    save(writer, 3, reuse=Repo(target).manifest(records[0]), retire=keep_last(1))
    writer.collect()
    assert check(target) == [3]
    assert packs(target) == live_packs(Repo(target).records())


def test_the_list_of_a_copied_fork_is_rebuilt_without_its_parent() -> None:
    parent, child = forked("rebuild")
    target = MemoryStore("rebuilt")
    copy_all(child, target)
    for store in (parent, child):
        store.delete([info.key for info in store.list("")])
    target.delete([info.key for info in target.list(keys.LOG)])
    open_writer(target)
    assert check(target) == [1, 2]
    assert [r.borrowed for r in Repo(target).records()] == [(), ()]


def test_a_copy_of_a_copy_of_a_fork() -> None:
    parent, child = forked("chain")
    middle, last = MemoryStore("middle"), MemoryStore("last")
    copy_all(child, middle)
    for store in (parent, child):
        store.delete([info.key for info in store.list("")])
    copy_all(middle, last)
    assert check(last) == [1, 2]
    assert Repo(last).records() == Repo(middle).records()


# -- what is refused ---------------------------------------------------------------------


def test_another_run_is_refused_and_left_alone() -> None:
    source, target = made(1), made(5, name="target")
    before = {info.key for info in target.list("")}
    with pytest.raises(OtherRun, match="another run"):
        opened(source, target)
    assert {info.key for info in target.list("")} == before


def test_a_copy_that_went_on_by_itself_is_refused() -> None:
    source, target = made(1), MemoryStore("target")
    copy_all(source, target)
    save(open_writer(target), 7)
    entries = {info.key for info in target.list(keys.LOG)}
    with pytest.raises(OtherRun, match=r"went on by itself.* step 7"):
        opened(source, target)
    save(open_writer(source), 8)  # an ordinal that both have given out
    with pytest.raises(OtherRun, match=r"went on by itself.* step 7"):
        opened(source, target)
    assert {info.key for info in target.list(keys.LOG)} == entries
    # The other way round it is the newer one of the two, but for what it never had.
    with pytest.raises(OtherRun, match="step 8"):
        opened(target, source)


def test_source_and_target_must_be_two() -> None:
    source = made(1)
    with pytest.raises(UsageError, match="is the source and the target"):
        opened(source, source)
    alias = MemoryStore("another name")
    alias._objects, alias._lock = source._objects, source._lock
    with pytest.raises(UsageError, match="under another name"):
        opened(source, alias)


def test_nothing_to_copy_from() -> None:
    with pytest.raises(NoStore):
        opened(MemoryStore("none"), MemoryStore("target"))


def test_a_target_with_a_live_writer_is_refused() -> None:
    source, target = made(1), MemoryStore("target")
    copy_all(source, target)
    Writer.open(Repo(target), holder=process(), alive=dead)
    for answer in (True, None):  # None: on another machine
        with pytest.raises(RunHeld):
            Replicator.open(Repo(source), Repo(target), alive=lambda holder, answer=answer: answer)
    Replicator.open(Repo(source), Repo(target), alive=dead).close()


def test_source_and_copy_are_told_apart_in_one_process() -> None:
    """They share the run's id, and may share an epoch: each has its own writer here."""
    source, target = MemoryStore("source"), MemoryStore("target")
    first = Writer.open(Repo(source))
    save(first, 1)
    with Replicator.open(Repo(source), Repo(target)) as copies:
        copies.copy(Repo(source).records()[0].id)
        with pytest.raises(RunHeld):
            Writer.open(Repo(source))
        with pytest.raises(RunHeld):
            Writer.open(Repo(target))
        first.close()
        again = Writer.open(Repo(source))
        assert again.epoch == copies.writer.epoch
    Writer.open(Repo(target)).close()
    with pytest.raises(RunHeld):
        Writer.open(Repo(source))
    again.close()


def test_an_overtaken_copy_commits_nothing_more() -> None:
    source, target = made(1, 2), MemoryStore("target")
    first, second = Repo(source).records()
    old = opened(source, target)
    old.copy(first.id)
    opened(source, target).close()
    with pytest.raises(Fenced):
        old.copy(second.id)
    assert check(target) == [1]


def test_a_removed_checkpoint_is_not_copied() -> None:
    source, target = made(1, 2), MemoryStore("target")
    first, second = Repo(source).records()
    with opened(source, target) as copies:
        Repo(source).amend("prune", lambda records: records[1:])
        with pytest.raises(CheckpointRemoved):
            copies.copy(first.id)
        copies.copy(second.id)
    assert check(target) == [2]


# -- damage ------------------------------------------------------------------------------


def test_damage_in_the_source_stops_that_checkpoint_and_no_other() -> None:
    source, target = made(1, 2, 3), MemoryStore("target")
    first, second, third = Repo(source).records()
    [own] = set(second.packs) - set(first.packs)
    damage(source, keys.pack_key(own), at=4)
    with opened(source, target) as copies:
        copies.copy(first.id)
        with pytest.raises(DamagedObject, match=r"'x' in packs/.* do not match their digest"):
            copies.copy(second.id)
        copies.copy(third.id)
    assert check(target) == [1, 3]
    assert f"{own}.safetensors" not in packs(target)


@pytest.mark.parametrize("what", ["manifest", "pack", "short pack"])
def test_what_is_missing_or_short_in_the_source_is_damage(what: str) -> None:
    source, target = made(1), MemoryStore("target")
    [record] = Repo(source).records()
    key = keys.manifest_key(record.id) if what == "manifest" else only_pack(record)
    data = source.get(key, max_bytes=1 << 20)
    source.delete([key])
    if what == "short pack":
        source.put_new(key, [data[:-1]])
    with opened(source, target) as copies, pytest.raises(DamagedObject, match=key):
        copies.copy(record.id)
    assert check(target) == []


def test_what_is_damaged_or_missing_in_the_copy_is_replaced() -> None:
    source, target = made(1, 2), MemoryStore("target")
    copy_all(source, target)
    first, second = Repo(source).records()
    damage(target, only_pack(first), at=3)
    target.delete([keys.manifest_key(second.id)])
    with opened(source, target) as copies:
        # Size and name are right, and what is listed was compared once.
        assert copies.copy(first.id).replaced == ()
        assert copies.copy(first.id, verify=True).replaced == (only_pack(first),)
        assert copies.copy(second.id).replaced == (keys.manifest_key(second.id),)
    assert check(target) == [1, 2]
    target.delete([only_pack(first)])
    damage(target, keys.manifest_key(first.id), at=100)
    with opened(source, target) as copies:
        assert set(copies.copy(first.id).replaced) == {
            only_pack(first),
            keys.manifest_key(first.id),
        }
    assert check(target) == [1, 2]
