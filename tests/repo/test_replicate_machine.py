"""Histories of saves, retention, tags, copies and syncs, with faults, against dicts."""

from __future__ import annotations

from contextlib import suppress

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from holdfast.core.records import Record
from holdfast.errors import HoldfastError
from holdfast.manager.edits import with_tag
from holdfast.repo.fork import fork
from holdfast.repo.replicate import Replicator
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer
from holdfast.stores.base import Store
from holdfast.stores.faulty import Died, Effect, FaultPlan, FaultyStore
from holdfast.stores.memory import MemoryStore
from tests.repo.support import check, dead, live_packs, packs, process, save

# What a list is to its user: id -> (step, metrics, tags, user's pins), in its order.
Model = dict[str, tuple[int, dict[str, float], frozenset[str], frozenset[str]]]


def model_of(store: Store) -> Model:
    return {
        r.id: (
            r.step,
            r.metrics,
            frozenset(r.tags),
            frozenset(p for p in r.pins if not p.startswith("fork:")),
        )
        for r in Repo(store).records()
    }


def copying(source: Store, target: Store) -> Replicator:
    return Replicator.open(Repo(source), Repo(target), take_over=True, alive=dead)


class CopyMachine(RuleBasedStateMachine):
    """A run, forked or not, that saves and retires, and its copy."""

    @initialize(forked=st.booleans())
    def start(self, forked: bool) -> None:
        self.source, self.target = MemoryStore("source"), MemoryStore("target")
        self.step = 0
        if forked:
            parent = MemoryStore.named("copy-machine/parent")
            parent.delete([info.key for info in parent.list("")])
            save(Writer.open(Repo(parent), holder=process(), alive=dead), 0)
            fork(Repo(parent), Repo(parent).records()[0], Repo(self.source))
        self.writer = Writer.open(Repo(self.source), holder=process(), alive=dead)
        self.copied: Model = {}

    # -- the run -----------------------------------------------------------------

    @rule(
        back=st.integers(0, 3) | st.none(),
        keep=st.integers(1, 4) | st.none(),
        tags=st.sampled_from([(), (), ("gold",), ("silver",)]),
    )
    def save(self, back: int | None, keep: int | None, tags: tuple[str, ...]) -> None:
        """Reusing a chunk of an earlier checkpoint, not always the last."""
        self.step += 1
        repo = Repo(self.source)
        records = repo.records()
        base = None
        if back is not None and records:
            base = repo.manifest(records[max(0, len(records) - 1 - back)])
        save(
            self.writer,
            self.step,
            reuse=base,
            tags=tags,
            metrics={"loss": 1 / self.step},
            retire=(lambda rs: [r.id for r in rs[:-keep]]) if keep else (lambda rs: ()),
        )

    @rule()
    def another_process(self) -> None:
        self.writer = Writer.open(Repo(self.source), holder=process(), alive=dead)

    def any_record(self, data: st.DataObject) -> Record:
        return data.draw(st.sampled_from(Repo(self.source).records()))

    @precondition(lambda self: bool(Repo(self.source).records()))
    @rule(data=st.data(), tag=st.sampled_from(["gold", "silver", ""]), pin=st.booleans())
    def mark(self, data: st.DataObject, tag: str, pin: bool) -> None:
        repo, record = Repo(self.source), self.any_record(data)

        def change(records: tuple[Record, ...]) -> list[Record]:
            return [with_tag(r, r.id == record.id, tag) for r in records]

        if tag:
            repo.amend("tag", change)
        repo.update_record("metrics", record.id, lambda r: {"metrics": {**r.metrics, "v": 1.0}})
        if pin:
            repo.update_record("pin", record.id, lambda r: {"pins": tuple({*r.pins, "mine"})})

    # -- the copy ----------------------------------------------------------------

    def expect(self, ids: list[str], retired: list[str] | None = None) -> None:
        """The model of the copy after these were copied, and others retired."""
        now, order = model_of(self.source), self.ordinals()
        moved = {tag for id in ids for tag in now[id][2]}
        after: Model = {}
        for id in sorted({*self.copied, *ids}, key=lambda id: order[id]):
            step, metrics, tags, pins = self.copied.get(
                id, now.get(id, (0, {}, *[frozenset()] * 2))
            )
            if id in ids:
                _, metrics, tags, more = now[id]
                pins = pins | more
            else:
                tags = tags - moved
            if id not in (retired or ()) or pins:
                after[id] = (step, metrics, tags, pins)
        self.copied = after

    def ordinals(self) -> dict[str, int]:
        records = (*Repo(self.target).records(), *Repo(self.source).records())
        return {r.id: r.ordinal for r in records}

    @precondition(lambda self: bool(Repo(self.source).records()))
    @rule(data=st.data())
    def copy_some(self, data: st.DataObject) -> None:
        records = Repo(self.source).records()
        chosen = data.draw(st.lists(st.sampled_from(records), min_size=1, unique_by=lambda r: r.id))
        with copying(self.source, self.target) as copies:
            for record in chosen:
                self.expect([record.id])
                copies.copy(record.id)

    @precondition(lambda self: bool(Repo(self.source).records()))
    @rule(delete=st.booleans())
    def sync(self, delete: bool) -> None:
        now = model_of(self.source)
        with copying(self.source, self.target) as copies:
            for id in now:
                self.expect([id])
                copies.copy(id)
            gone = [id for id in self.copied if id not in now] if delete else []
            self.expect(list(now), gone)
            copies.update(retire=lambda records: gone)
        found = model_of(self.target)
        assert [id for id in found if id in now] == list(now)
        for id in now:
            assert found[id][:3] == now[id][:3]

    @precondition(lambda self: bool(Repo(self.source).records()))
    @rule(
        data=st.data(),
        effect=st.sampled_from([Effect.DIE_BEFORE, Effect.DIE_AFTER, Effect.LOSE_REPLY]),
        call=st.integers(1, 60),
    )
    def copy_and_die(self, data: st.DataObject, effect: Effect, call: int) -> None:
        record = self.any_record(data)
        before = self.copied
        faulty = FaultyStore(self.target, FaultPlan.at(call, effect))
        with suppress(Died, HoldfastError):
            copying(self.source, faulty).copy(record.id)
        if model_of(self.target) != before:
            self.expect([record.id])

    @precondition(lambda self: self.copied)
    @rule(keep=st.integers(1, 3))
    def prune_the_copy(self, keep: int) -> None:
        stay = set(list(self.copied)[-keep:])
        Repo(self.target).amend("prune", lambda rs: [r for r in rs if r.pins or r.id in stay])
        self.copied = {id: v for id, v in self.copied.items() if v[3] or id in stay}

    @precondition(lambda self: self.copied)
    @rule()
    def collect_in_the_copy(self) -> None:
        Writer.open(Repo(self.target), holder=process(), alive=dead).collect()
        assert packs(self.target) == live_packs(Repo(self.target).records())

    # -- always ------------------------------------------------------------------

    @invariant()
    def every_listed_checkpoint_is_whole(self) -> None:
        steps = [value[0] for value in self.copied.values()]
        assert check(self.target) == steps
        if steps:
            assert list(model_of(self.target).items()) == list(self.copied.items())
            for record in Repo(self.target).records():
                assert not record.borrowed


CopyMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=25)
TestCopies = CopyMachine.TestCase
