"""`holdfast.json` that arrives wrong: who has made it goes on, and puts it right."""

from __future__ import annotations

import logging

import pytest

from holdfast.errors import DamagedObject, RunHeld
from holdfast.repo import keys
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer
from holdfast.stores.base import Store
from holdfast.stores.faulty import Call, Effect, Fault, FaultPlan, FaultyStore
from holdfast.stores.memory import MemoryStore
from tests.repo.support import check, dead, process, save

SPOILED = Fault(Effect.SPOIL, operation="put_new", prefix=keys.RUN_INFO, bit=900)


def open_writer(store: Store) -> Writer:
    return Writer.open(Repo(store), holder=process(), alive=dead)


def test_it_is_put_right_once_the_log_says_which_run_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = FaultyStore(MemoryStore("wrong"), FaultPlan((SPOILED,)))
    with caplog.at_level(logging.WARNING):
        writer = open_writer(store)
        save(writer, 1)
    assert caplog.text == ""
    again = Repo(store.survivor())
    assert again.info().run == writer.run
    assert again.info().created_s > 0
    order = [f"{call.operation} {call.key}" for call in store.calls]
    entry = f"put_new {keys.entry_key(1)}"
    assert order.index(entry) < order.index(f"delete {keys.RUN_INFO}")
    with caplog.at_level(logging.ERROR):
        save(open_writer(store.survivor()), 2)
    assert check(store.survivor()) == [1, 2]
    assert caplog.text == ""


@pytest.mark.parametrize("effect", [Effect.FAIL, Effect.LOSE_REPLY, Effect.DELAY])
@pytest.mark.parametrize("operation", ["delete", "put_new"])
def test_where_that_fails_the_run_goes_by_its_log(
    operation: str, effect: Effect, caplog: pytest.LogCaptureFixture
) -> None:
    """A delete that comes late takes nothing away that the log does not say."""
    nth = 2 if operation == "put_new" else 1
    failing = Fault(effect, operation=operation, prefix=keys.RUN_INFO, nth=nth)
    store = FaultyStore(MemoryStore("late"), FaultPlan((failing, SPOILED)))
    with caplog.at_level(logging.WARNING):
        writer = open_writer(store)
    assert "could not be written again; the run goes by its log" in caplog.text
    save(writer, 1)
    assert check(store.survivor()) == [1]
    store.release()
    store.survivor().delete([keys.RUN_INFO])  # as the line says, where it is still there
    save(open_writer(store.survivor()), 2)
    assert check(store.survivor()) == [1, 2]
    caplog.clear()
    again = Repo(store.survivor())
    assert again.info().run == writer.run
    assert caplog.text == ""


def test_a_process_that_finds_it_wrong_cannot_begin_another_run() -> None:
    """At any moment: before the log says which run it is, it is told; then the run is held."""
    number, calls, told = 0, 1, set[str]()
    while number < calls:
        number += 1
        inner = MemoryStore("another")
        others: list[Writer] = []

        def on_call(
            call: Call, at: int = number, inner: Store = inner, others: list[Writer] = others
        ) -> None:
            if call.number == at:
                try:
                    others.append(
                        Writer.open(Repo(inner), holder=process(), alive=lambda holder: True)
                    )
                except (DamagedObject, RunHeld) as error:
                    told.add(type(error).__name__)

        store = FaultyStore(inner, FaultPlan((SPOILED,)), on_call=on_call)
        try:
            writer = Writer.open(Repo(store), holder=process(), alive=lambda holder: True)
        except RunHeld:
            (writer,) = others
        save(writer, 1)
        assert check(inner) == [1], f"before call {number}"
        assert Repo(inner).info().run == writer.run
        calls = len(store.calls)
    assert told == {"DamagedObject", "RunHeld"}


def test_where_nothing_else_is_there_the_error_says_what_to_do() -> None:
    """Its maker died before it could put it right."""
    store = MemoryStore("alone")
    store.put_new(keys.RUN_INFO, [b'{"digest":"'])
    for attempt in (Repo(store).info, lambda: open_writer(store)):
        with pytest.raises(DamagedObject, match="not a sealed Holdfast object") as caught:
            attempt()
        assert "no log and no checkpoints" in caught.value.hint
        assert "delete holdfast.json in memory://alone and start again" in caught.value.hint
    store.delete([keys.RUN_INFO])
    save(open_writer(store), 1)
    assert check(store) == [1]
