"""Positions as values: transitions, messages, and the tree they are saved as."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import LoopError
from holdfast.run import position as at
from holdfast.run.position import Closed, Enter, Frame, Label, Mark, Position, Replay, Skip

EPOCHS, BATCHES, RANGE = Label("epochs"), Label("batches"), Label("range")
MARK = Mark(feed={"taken": 0}, rng={"python": 1})


def opened(position: Position, label: Label, counted: bool = True, limit: int | None = None):
    return at.take(at.enter(position, Frame(label, counted, limit)), MARK)


def test_steps_count_on_innermost_loops_only() -> None:
    position = opened(opened(Position(), EPOCHS), BATCHES)
    position = at.complete(position)
    assert position.step == 1
    position = at.close(position, broken=False, rng={})
    assert position.top.phase == "tail"
    position = at.complete(position)
    assert position.step == 1
    assert position.top.completed == 1


def test_an_epoch_without_an_inner_loop_is_a_step() -> None:
    assert at.complete(opened(Position(), EPOCHS)).step == 1


def test_an_uncounted_loop_inside_leaves_the_step_to_the_outer_one() -> None:
    position = opened(opened(Position(), EPOCHS), BATCHES, counted=False)
    position = at.close(at.complete(position), broken=False)
    assert position.step == 0
    assert at.complete(position).step == 1


def test_an_item_left_by_break_is_not_completed() -> None:
    position = opened(opened(Position(), EPOCHS), BATCHES)
    position = at.close(at.complete(position), broken=True)
    assert position.step == 1
    assert position.top.done[0] == Closed(BATCHES, 1, None, True, True)


def test_no_loop_opens_while_another_fetches() -> None:
    between = at.enter(Position(), Frame(EPOCHS, True))
    with pytest.raises(LoopError, match="fetches"):
        at.enter(between, Frame(BATCHES, True))


def test_replayable_needs_marks_around_and_known_random_states_between() -> None:
    outer = at.take(at.enter(Position(), Frame(EPOCHS, True)), None)
    assert not at.enter(outer, Frame(BATCHES, True)).replayable
    outer = opened(Position(), EPOCHS)
    inner = at.enter(outer, Frame(BATCHES, True))
    assert inner.replayable
    assert not at.take(inner, None).replayable  # in a body
    after = at.close(inner, broken=False, rng=None)
    assert after.replayable  # the tail: restored at its start
    assert not at.enter(after, Frame(BATCHES, True)).replayable
    after = at.close(inner, broken=False, rng={})
    assert at.enter(after, Frame(BATCHES, True)).replayable


def test_a_position_reads_well() -> None:
    position = at.enter(opened(Position(), EPOCHS), Frame(BATCHES, True, completed=1700))
    assert str(position) == "epochs 0, batches 1,700"
    assert str(at.close(position, broken=False)) == "epochs 0, after batches"
    assert str(Position()) == "before the first loop"
    assert str(Position(done=(Closed(EPOCHS, 3, 3, True, False),))) == "after epochs"
    assert str(Label("range", "warm-up")) == "range 'warm-up'"


# -- coming back --------------------------------------------------------------

SAVED = at.enter(
    at.close(opened(opened(Position(), EPOCHS), RANGE), broken=True, rng={}),
    Frame(BATCHES, True, completed=17),
)


def test_the_way_back_enters_skips_and_lands() -> None:
    live, replay = Position(), Replay(SAVED)
    met = replay.meet(live, EPOCHS, None)
    assert isinstance(met, Enter)
    assert not met.lands
    live, replay = opened(live, EPOCHS), replay.entered()
    met = replay.meet(live, RANGE, None)
    assert isinstance(met, Skip)
    assert not met.lands
    live = at.skip(live, met.closed)
    met = replay.meet(live, BATCHES, None)
    assert met == Enter(SAVED.top, lands=True)


@pytest.mark.parametrize("label", [BATCHES, Label("range", "other")])
def test_another_loop_in_its_place_is_refused(label: Label) -> None:
    live, replay = opened(Position(), EPOCHS), Replay(SAVED).entered()
    with pytest.raises(LoopError, match="epochs 0, batches 17"):
        replay.meet(live, label, None)


def test_named_loops_are_matched_by_name_whatever_their_order() -> None:
    a, b = Label("range", "a"), Label("range", "b")
    saved = opened(Position(), EPOCHS)
    for label in (a, b):
        saved = at.close(at.enter(saved, Frame(label, True)), broken=False, rng={})
    live, replay = opened(Position(), EPOCHS), Replay(saved).entered()
    met = replay.meet(live, b, None)
    assert isinstance(met, Skip)
    assert met.lands


def finished(completed: int, limit: int, broken: bool = False) -> Replay:
    return Replay(Position(9, done=(Closed(EPOCHS, completed, limit, True, broken, {}),)))


def test_a_finished_run_yields_nothing() -> None:
    met = finished(5, 5).meet(Position(), EPOCHS, 5)
    assert isinstance(met, Skip)
    assert met.lands


def test_a_finished_run_with_more_epochs_continues() -> None:
    met = finished(5, 5).meet(Position(), EPOCHS, 8)
    assert isinstance(met, Enter)
    assert met.lands
    assert met.frame.completed == 5


def test_a_run_that_stopped_early_stays_finished() -> None:
    assert isinstance(finished(3, 5, broken=True).meet(Position(), EPOCHS, 5), Skip)
    assert isinstance(finished(3, 5, broken=True).meet(Position(), EPOCHS, 6), Enter)


def test_a_finished_loop_that_another_followed_is_not_reopened() -> None:
    saved = Position(9, done=(Closed(EPOCHS, 5, 5, True, False, {}),) * 2)
    met = Replay(saved).meet(Position(), EPOCHS, 8)
    assert isinstance(met, Skip)
    assert not met.lands


# -- the saved form -----------------------------------------------------------

labels = st.builds(Label, st.sampled_from(["epochs", "batches", "range"]), st.text(max_size=3))
counts = st.integers(0, 10**12)
closed = st.builds(
    Closed,
    labels,
    counts,
    st.none() | counts,
    st.booleans(),
    st.booleans(),
    st.none() | st.just({}),
)
frames = st.builds(
    Frame,
    labels,
    st.booleans(),
    st.none() | counts,
    counts,
    st.sampled_from(["next", "body", "tail"]),
    st.booleans(),
    st.lists(closed, max_size=2).map(tuple),
    st.none() | st.just(MARK),
    st.none() | st.just({"taken": 3}),
)
positions = st.builds(
    Position, counts, st.lists(closed, max_size=2).map(tuple), st.lists(frames).map(tuple)
)


@given(positions)
def test_a_position_survives_its_saved_form(position: Position) -> None:
    assert at.from_tree(at.to_tree(position)) == position


@pytest.mark.parametrize(
    "tree",
    [None, 3, {}, {"version": 1}, {"version": 1, "step": 1, "done": [], "frames": [{}]}],
)
def test_what_is_no_position_is_refused(tree: object) -> None:
    with pytest.raises(LoopError, match="no loop position") as caught:
        at.from_tree(tree)
    assert "CheckpointManager" in caught.value.hint


def test_a_position_of_another_version_is_refused() -> None:
    with pytest.raises(LoopError, match="version 2"):
        at.from_tree({**at.to_tree(Position()), "version": 2})
