"""Stop anywhere in any nest of loops, come back, and the same things happen."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.run.engine import Engine
from holdfast.run.random_states import RandomStates
from tests.support.loop_programs import Act, Draw, For, Killed, Process, Use, programs


def reference(program: tuple) -> Process:
    process = Process()
    process.run(program)
    return process


def check_every_place(program: tuple, places: list[int]) -> None:
    whole = reference(program)
    for place in places:
        first = Process(die_at=place)
        try:
            first.run(program)
        except Killed:
            pass
        assert first.saved is not None
        second = Process(first.saved)
        second.run(program)
        assert second.landed == 1
        assert second.trace == whole.trace
        assert second.engine.position.step == whole.engine.position.step


@settings(max_examples=150)
@given(programs(), st.data())
def test_a_program_killed_anywhere_resumes_to_the_same_trace(program, data) -> None:
    places = reference(program).places
    if places:
        check_every_place(program, [data.draw(st.integers(0, places - 1))])


@settings(max_examples=75)
@given(programs(), st.data())
def test_killed_again_while_resuming(program, data) -> None:
    whole = reference(program)
    if not whole.places:
        return
    checkpoint = None
    for _ in range(4):
        process = Process(checkpoint, die_at=data.draw(st.integers(0, whole.places - 1)))
        try:
            process.run(program)
        except Killed:
            checkpoint = process.saved
        else:
            assert process.trace == whole.trace
            return
    process = Process(checkpoint)
    process.run(program)
    assert process.trace == whole.trace


TYPICAL = (
    Draw(),
    For(
        "epochs",
        3,
        True,
        False,
        None,
        (
            Draw(),
            Act(1),
            For("batches", 3, True, False, None, (Act(2), Use())),
            Act(3),
            For("range", 3, True, True, 1, (Use(), Act(4))),
            Use(),
            For("batches", 2, False, False, None, (Act(5),)),
            Act(6),
        ),
    ),
    Act(7),
    For("range", 2, True, False, None, (For("range", 2, True, False, None, (Act(8),)), Act(9))),
)


def test_every_place_of_a_typical_program() -> None:
    places = reference(TYPICAL).places
    assert places == 3 * (4 + 1 + 3 + 1) + 1 + 2 * (3 + 1) + 1
    check_every_place(TYPICAL, list(range(places)))


def test_without_marks_the_prologue_would_differ(monkeypatch) -> None:
    """The check above notices a wrong random state in a prologue."""
    monkeypatch.setattr(RandomStates, "apply", lambda self, states: None)
    places = range(reference(TYPICAL).places)
    wrong = 0
    for place in places:
        try:
            check_every_place(TYPICAL, [place])
        except AssertionError:
            wrong += 1
    assert wrong > 10


def test_a_loop_that_nests_only_later_waits_with_saves_until_its_body_ends() -> None:
    """The first such body was not marked; from then on there are places inside."""
    inner = For("range", 2, True, True, None, (Act(1),), only_at=1)
    late = For("range", 2, True, True, None, (Act(2),), only_at=3)
    program = (For("range", 5, True, False, None, (Draw(), inner, late, Use())),)
    places = reference(program).places
    assert places == 5 + 3 + 1  # items, places inside the second such body, the end
    check_every_place(program, list(range(places)))


def test_an_engine_starts_at_no_place() -> None:
    assert str(Engine(Process()).position) == "before the first loop"
