"""Deliberate bugs in the commit protocol: the suite must catch every one of them.

Each entry names the bug, plants it, and names the tests of this folder that must then
fail. A bug that nothing catches means that the suite proves nothing about that rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from holdfast.core.records import Entry
from holdfast.errors import HoldfastError
from holdfast.repo import keys
from holdfast.repo.head import Draft, Head, Transaction
from holdfast.repo.log import Log, _Outcome
from holdfast.repo.repo import Removal, Repo
from holdfast.repo.saves import Save
from holdfast.repo.writer import Writer
from holdfast.stores.faulty import Effect
from tests.repo import (
    test_damage,
    test_every_call,
    test_power_loss,
    test_races,
    test_spoiled_entries,
)

Plant = Callable[[pytest.MonkeyPatch], None]


def delete_before_the_entry(patch: pytest.MonkeyPatch) -> None:
    whole = Log._create

    def create(self: Log, entry, base):  # type: ignore[no-untyped-def]
        if base is not None:
            old = set(self.records(base.entry))
            live = {name for r in entry.records for name in r.packs}
            gone = [r for r in old if r.id not in {x.id for x in entry.records}]
            names = [name for r in gone for name in r.packs if name not in live]
            self._store.delete([keys.pack_key(name) for name in names])
        return whole(self, entry, base)

    patch.setattr(Log, "_create", create)


def no_fencing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Writer, "_check_epoch", lambda self, head: None)


def no_check_that_reused_packs_are_live(patch: pytest.MonkeyPatch) -> None:
    import holdfast.repo.writer as module

    patch.setattr(module, "not_held", lambda *about: [])


def a_missing_segment_is_damage_at_once(patch: pytest.MonkeyPatch) -> None:
    from holdfast.repo import repo

    patch.setattr(repo, "_LIST_ATTEMPTS", 1)


def segments_of_changes_are_not_in_flight(patch: pytest.MonkeyPatch) -> None:
    whole = Writer._may_collect

    def may_collect(self: Writer, key: str) -> bool:
        return key.startswith(keys.SEGMENTS) or whole(self, key)

    patch.setattr(Writer, "_may_collect", may_collect)


def no_read_back_after_a_failed_create(patch: pytest.MonkeyPatch) -> None:
    def create(self: Log, entry, base):  # type: ignore[no-untyped-def]
        from holdfast.core.sealed import seal

        id, data = seal(entry)
        created = self._store.put_new(keys.entry_key(entry.number), [data])
        return id, _Outcome.CREATED if created else _Outcome.TAKEN

    patch.setattr(Log, "_create", create)


def no_ancestry_check(patch: pytest.MonkeyPatch) -> None:
    whole = Log._newest_after

    def newest_after(self: Log, entry: Entry, id: str, outcome: _Outcome) -> Head:
        created = outcome is _Outcome.CREATED
        return Head(entry, id) if created else whole(self, entry, id, outcome)

    patch.setattr(Log, "_newest_after", newest_after)


def the_parent_alone_is_believed(patch: pytest.MonkeyPatch) -> None:
    whole = Log._newest_after

    def newest_after(self: Log, entry: Entry, id: str, outcome: _Outcome) -> Head:
        believed = outcome is _Outcome.CREATED and self._continues(entry)
        return Head(entry, id) if believed else whole(self, entry, id, outcome)

    patch.setattr(Log, "_newest_after", newest_after)


def any_damaged_entry_is_left_out(patch: pytest.MonkeyPatch) -> None:
    class Every(set[int]):
        def __contains__(self, number: object) -> bool:
            return True

    whole = Log.__init__

    def init(self: Log, *about: Any, **named: Any) -> None:
        whole(self, *about, **named)
        self._spoiled = Every()

    patch.setattr(Log, "__init__", init)


def what_is_read_wrong_once_is_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Log, "_stays", lambda self, key: True)


def gc_forgets_saves_in_flight(patch: pytest.MonkeyPatch) -> None:
    def may_collect(self: Writer, key: str) -> bool:
        return keys.manifest_id(key) is not None or keys.owner(key) is not None

    patch.setattr(Writer, "_may_collect", may_collect)


def the_entry_before_its_manifest(patch: pytest.MonkeyPatch) -> None:
    later: list[tuple[str, object]] = []
    whole = Writer.put_own
    commit = Log.commit

    def put_own(self: Writer, key: str, parts, nbytes: int) -> None:  # type: ignore[no-untyped-def]
        if key.startswith(keys.MANIFESTS):
            later.append((key, parts))
        else:
            whole(self, key, parts, nbytes)

    def commit_first(self: Log, transaction: Transaction, **rest):  # type: ignore[no-untyped-def]
        result = commit(self, transaction, **rest)
        while later:
            key, parts = later.pop()
            self._store.put_new(key, parts)  # type: ignore[arg-type]
        return result

    patch.setattr(Writer, "put_own", put_own)
    patch.setattr(Log, "commit", commit_first)


def a_failed_commit_deletes_its_packs(patch: pytest.MonkeyPatch) -> None:
    whole = Writer._commit

    def commit(self: Writer, transaction: Transaction, save: Save | None) -> Head:
        try:
            return whole(self, transaction, save)
        except HoldfastError:
            if save is not None:
                self._repo.store.delete([keys.pack_key(name) for name in save.written])
            raise

    patch.setattr(Writer, "_commit", commit)


def retired_checkpoints_stay_listed(patch: pytest.MonkeyPatch) -> None:
    whole = Log._entry

    def entry(self: Log, draft: Draft, base: Head | None, *rest):  # type: ignore[no-untyped-def]
        if base is not None and draft.action == "save":
            old = [r for r in self.records(base.entry) if r not in draft.records]
            draft = Draft((*old, *draft.records), draft.action, draft.changes)
        return whole(self, draft, base, *rest)

    patch.setattr(Log, "_entry", entry)


def shared_packs_are_deleted(patch: pytest.MonkeyPatch) -> None:
    whole = Repo.removed

    def removed(self: Repo, before: Head | None, after: Head) -> Removal:
        found = whole(self, before, after)
        if before is None:
            return found
        gone = [r for r in self.log.records(before.entry) if r.id in found.manifests]
        return Removal(found.manifests, tuple(n for r in gone for n in r.packs), found.segments)

    patch.setattr(Repo, "removed", removed)


def names_are_reused(patch: pytest.MonkeyPatch) -> None:
    begin = Writer.begin

    def same_name(self: Writer) -> Save:
        save = begin(self)
        self._in_flight.pop(save.nonce)
        save.nonce = "0" * 16
        self._in_flight[save.nonce] = save
        return save

    patch.setattr(Writer, "begin", same_name)


def the_log_is_pruned_to_one_entry(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("holdfast.repo.log.KEEP_ENTRIES", 0)
    patch.setattr("holdfast.repo.log.PRUNED_TOGETHER", 1)


def a_damaged_entry_is_believed(patch: pytest.MonkeyPatch) -> None:
    import msgspec

    import holdfast.repo.log as module

    def trusting(data: bytes, kind, key: str):  # type: ignore[no-untyped-def]
        from holdfast.core.digest import digest
        from holdfast.errors import DamagedObject

        try:
            body = data[data.index(b'"value":') + 8 : -1]
            return digest(body), msgspec.json.decode(body, type=kind)
        except (ValueError, msgspec.DecodeError) as error:
            raise DamagedObject(key, "it is malformed") from error

    def trusting_id(data: bytes, key: str) -> str:
        return trusting(data, msgspec.Raw, key)[0]

    patch.setattr(module, "unseal", trusting)
    patch.setattr(module, "unseal_id", trusting_id)


def the_folder_is_not_synced(patch: pytest.MonkeyPatch) -> None:
    from tests.support.crash_states import Folder
    from tests.support.crashfs import CrashFileSystem

    whole = CrashFileSystem.sync

    def sync(self: CrashFileSystem, fd: int) -> None:
        if not isinstance(self._open[fd], Folder):
            whole(self, fd)

    patch.setattr(CrashFileSystem, "sync", sync)


def files_are_not_synced(patch: pytest.MonkeyPatch) -> None:
    from tests.support.crash_states import File
    from tests.support.crashfs import CrashFileSystem

    whole = CrashFileSystem.sync

    def sync(self: CrashFileSystem, fd: int) -> None:
        if not isinstance(self._open[fd], File):
            whole(self, fd)

    patch.setattr(CrashFileSystem, "sync", sync)


def dying(case: str) -> Callable[[], None]:
    def run() -> None:
        for effect in (Effect.DIE_BEFORE, Effect.DIE_AFTER):
            test_every_call.test_dying_at_any_call_leaves_the_old_or_the_new_state(case, effect)

    return run


def failing(case: str) -> Callable[[], None]:
    def run() -> None:
        for effect in (Effect.LOSE_REPLY, Effect.FAIL, Effect.DELAY):
            test_every_call.test_a_failing_call_never_loses_or_halves_anything(case, effect)

    return run


def rebuilding() -> None:
    store = test_damage.three_saves()
    newest = test_damage.newest_entry(store)
    inside_a_word = store.get(newest, max_bytes=1 << 30).index(b'"save"') + 2
    test_damage.damage(store, newest, inside_a_word)
    assert test_damage.check(store) == [1, 2]


def unknown_commits() -> None:
    for effect in (Effect.LOSE_REPLY, Effect.DELAY, Effect.FAIL):
        test_every_call.test_the_writer_itself_goes_on_after_an_unknown_commit(effect)


BUGS: dict[Plant, Iterable[Callable[[], None]]] = {
    delete_before_the_entry: [dying("save and retire"), failing("save and retire")],
    no_fencing: [test_races.test_an_overtaken_writer_cannot_commit],
    no_check_that_reused_packs_are_live: [test_races.test_a_prune_beside_a_save_that_reuses],
    no_read_back_after_a_failed_create: [
        test_every_call.test_a_lost_reply_is_recognised_as_success
    ],
    no_ancestry_check: [test_races.test_a_number_that_was_used_and_pruned_is_not_believed],
    the_parent_alone_is_believed: [test_races.test_a_parent_that_came_back_late_is_not_believed],
    any_damaged_entry_is_left_out: [
        test_spoiled_entries.test_an_entry_of_another_is_never_left_out
    ],
    what_is_read_wrong_once_is_left_out: [
        test_spoiled_entries.test_what_only_reads_show_is_no_reason_to_leave_a_number_out
    ],
    gc_forgets_saves_in_flight: [unknown_commits],
    the_entry_before_its_manifest: [dying("save and retire")],
    a_failed_commit_deletes_its_packs: [unknown_commits],
    retired_checkpoints_stay_listed: [dying("save and retire")],
    shared_packs_are_deleted: [dying("save and retire")],
    names_are_reused: [dying("first save")],
    the_log_is_pruned_to_one_entry: [dying("save and retire")],
    a_damaged_entry_is_believed: [rebuilding],
    the_folder_is_not_synced: [test_power_loss.test_power_loss_at_every_call],
    a_missing_segment_is_damage_at_once: [
        test_races.test_a_reader_whose_segments_are_replaced_reads_the_newer_list
    ],
    segments_of_changes_are_not_in_flight: [
        test_races.test_a_change_that_lands_late_has_its_segments
    ],
    files_are_not_synced: [test_power_loss.test_power_loss_at_every_call],
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_deliberate_bug_is_caught(bug: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.repo.log._CREATE_BACKOFF_S", 0.0)
    bug(monkeypatch)
    caught = []
    for run in BUGS[bug]:
        try:
            run()
        except (AssertionError, HoldfastError, pytest.fail.Exception, TypeError):
            caught.append(run)
    assert caught, f"no test notices: {bug.__name__}"


def test_without_a_bug_they_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.repo.log._CREATE_BACKOFF_S", 0.0)
    for runs in BUGS.values():
        for run in runs:
            if run is not test_power_loss.test_power_loss_at_every_call:  # a test of its own
                run()
