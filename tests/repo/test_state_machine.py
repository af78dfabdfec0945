"""Histories of saves, tags, pins, prunes, forks, gc and crashes, against a dict."""

from __future__ import annotations

import copy
from collections.abc import Callable

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from holdfast.errors import Fenced, RunClosed
from holdfast.repo.fork import fork
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer
from holdfast.stores.base import Store
from holdfast.stores.faulty import Died, Effect, FaultPlan, FaultyStore
from holdfast.stores.memory import MemoryStore
from tests.repo.support import check, dead, live_packs, packs, process, save

# What a run is to its user: step -> (metrics, tags, pinned), in the order of saving.
Model = dict[int, tuple[dict[str, float], frozenset[str], bool]]


class RepoMachine(RuleBasedStateMachine):
    """One run with its writer, guests, an overtaken writer, and forks."""

    @initialize()
    def start(self) -> None:
        self.store = self.new_store("machine")
        self.children: list[Store] = []
        self.model: Model = {}
        self.step = 0
        self.writer = self.open()
        self.overtaken: list[Writer] = []

    def new_store(self, name: str) -> Store:
        """An empty one. For other stores than memory: overridden elsewhere."""
        return MemoryStore(name)

    def open(self, store: FaultyStore | None = None) -> Writer:
        return Writer.open(Repo(store or self.store), holder=process(), alive=dead)

    # -- the writer ------------------------------------------------------------

    @rule(
        reuse=st.booleans(),
        keep=st.integers(1, 4) | st.none(),
        tags=st.sampled_from([(), ("gold",), ("silver",)]),
        loss=st.floats(0, 1),
    )
    def save(self, reuse: bool, keep: int | None, tags: tuple[str, ...], loss: float) -> None:
        self.step += 1
        self.do_save(self.writer, self.model, self.step, reuse, keep, tags, loss)

    def do_save(
        self,
        writer: Writer,
        model: Model,
        step: int,
        reuse: bool,
        keep: int | None,
        tags: tuple[str, ...],
        loss: float,
    ) -> None:
        repo = Repo(self.store)
        records = repo.records()
        base = repo.manifest(records[-1]) if reuse and records else None
        # The model first: a save that dies half-way must match the old or the new one.
        for other, (metrics, had, pinned) in model.items():
            model[other] = (metrics, had - set(tags), pinned)
        model[step] = ({"loss": loss}, frozenset(tags), False)
        if keep is not None:
            for old in list(model)[:-keep]:
                if not model[old][2]:
                    del model[old]
        save(
            writer,
            step,
            reuse=base,
            tags=tags,
            metrics={"loss": loss},
            retire=lambda rs: [r.id for r in rs[:-keep]] if keep else [],
        )

    @rule()
    def reopen(self) -> None:
        self.writer.close()
        self.writer = self.open()

    @rule()
    def take_over(self) -> None:
        self.overtaken.append(self.writer)
        self.writer = self.open()

    @precondition(lambda self: self.overtaken)
    @rule(data=st.data())
    def overtaken_writers_are_fenced(self, data: st.DataObject) -> None:
        old = data.draw(st.sampled_from(self.overtaken))
        try:
            save(old, 10_000)
        except Fenced:
            pass
        else:
            raise AssertionError("an overtaken writer committed")
        try:
            old.collect()
        except (Fenced, RunClosed):
            pass
        else:
            raise AssertionError("an overtaken writer collected")

    @rule()
    def collect(self) -> None:
        self.writer.collect()
        assert packs(self.store) == live_packs(Repo(self.store).records())

    # -- guests ----------------------------------------------------------------

    def any_step(self, data: st.DataObject) -> tuple[int, str]:
        record = data.draw(st.sampled_from(Repo(self.store).records()))
        return record.step, record.id

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tag=st.sampled_from(["gold", "new"]))
    def tag(self, data: st.DataObject, tag: str) -> None:
        step, id = self.any_step(data)
        Repo(self.store).update_record("tag", id, lambda r: {"tags": tuple({*r.tags, tag})})
        metrics, tags, pinned = self.model[step]
        self.model[step] = (metrics, tags | {tag}, pinned)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        step, id = self.any_step(data)
        Repo(self.store).edit_record("pin", id, pins=("",))
        self.model[step] = (*self.model[step][:2], True)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def log_metric_late(self, data: st.DataObject) -> None:
        step, id = self.any_step(data)
        Repo(self.store).update_record("metrics", id, lambda r: {"metrics": {**r.metrics, "v": 1}})
        metrics, tags, pinned = self.model[step]
        self.model[step] = ({**metrics, "v": 1}, tags, pinned)

    @precondition(lambda self: len(self.model) > 1)
    @rule(keep=st.integers(1, 3))
    def prune(self, keep: int) -> None:
        newest = list(self.model)[-keep:]
        Repo(self.store).amend("prune", lambda rs: [r for r in rs if r.pins or r.step in newest])
        self.model = {s: v for s, v in self.model.items() if v[2] or s in newest}

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        step, id = self.any_step(data)
        repo = Repo(self.store)
        child = self.new_store(f"child{len(self.children)}")
        record = next(r for r in repo.records() if r.id == id)
        fork(repo, record, Repo(child))
        self.children.append(child)
        self.model[step] = (*self.model[step][:2], True)

    # -- crashes ---------------------------------------------------------------

    @rule(
        number=st.integers(1, 40),
        after=st.booleans(),
        reuse=st.booleans(),
        keep=st.integers(1, 3) | st.none(),
    )
    def crash_in_a_save(self, number: int, after: bool, reuse: bool, keep: int | None) -> None:
        effect = Effect.DIE_AFTER if after else Effect.DIE_BEFORE
        self.step += 1
        wanted = copy.deepcopy(self.model)

        def work(store: FaultyStore) -> None:
            writer = self.open(store)
            self.do_save(writer, wanted, self.step, reuse, keep, (), 0.5)
            writer.collect()

        self.crash(number, effect, work, wanted)

    def crash(
        self, number: int, effect: Effect, work: Callable[[FaultyStore], None], wanted: Model
    ) -> None:
        store = FaultyStore(self.store, FaultPlan.at(number, effect))
        try:
            work(store)
        except Died:
            pass
        found = self.observed()
        assert found in (self.model, wanted)
        self.model = found
        self.overtaken.clear()
        self.writer = self.open()

    # -- what must hold after every step ---------------------------------------

    def observed(self) -> Model:
        return {
            r.step: (dict(r.metrics), frozenset(r.tags), bool(r.pins))
            for r in Repo(self.store).records()
        }

    @invariant()
    def the_run_is_what_the_dict_says(self) -> None:
        if hasattr(self, "store"):
            assert check(self.store) == list(self.model)
            assert self.observed() == self.model

    @invariant()
    def forks_are_whole(self) -> None:
        for child in getattr(self, "children", []):
            repo = Repo(child)
            repo._parents = {self.store.address: self.store}
            for record in repo.records():
                for pack in repo.manifest(record).packs:
                    assert repo.pack_size(pack) == pack.nbytes


RepoMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=30)
TestRepo = RepoMachine.TestCase
