"""One training loop in which contenders take turns to save.

A turn is one step that is not counted, the save at its end, and `length` counted steps.
Turns without a save, in between, are the measure of what a step takes. So all contenders
see the same loop in the same minutes, and nobody meets another's save.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from bench.peers import HoldfastRun, Peer
from bench.states import State, Training

QUIET = "no saves"

Watch = Callable[[str], AbstractContextManager[object]]

_ENDLESS = 10**9  # the loop ends with its turns


@dataclass(frozen=True)
class Step:
    """Where the time of one counted step went."""

    boundary_s: float
    """From the end of the step before to the start of this one: what the loop does."""
    gradients_s: float
    update_s: float
    """The optimizer's step, and what was hooked into it."""
    saving: bool
    """Whether a save was in flight when it started."""

    @property
    def total_s(self) -> float:
        return self.boundary_s + self.gradients_s + self.update_s


@dataclass
class Turn:
    """One contender's turn."""

    name: str
    call_s: float = 0.0
    """How long the call that begins the save took."""
    steps: list[Step] = field(default_factory=list[Step])
    digest: str = ""
    """Of the state that was saved, where it was asked for."""

    @property
    def total_s(self) -> float:
        return self.call_s + sum(step.total_s for step in self.steps)


class Quiet:
    """What turns without saves take, and the medians over their steps."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        steps = [step for turn in turns if turn.name == QUIET for step in turn.steps]
        self.turns_s = [turn.total_s for turn in turns if turn.name == QUIET]
        self.turn_s = statistics.median(self.turns_s)
        self.step_s = statistics.median(step.total_s for step in steps)
        self.boundary_s = statistics.median(step.boundary_s for step in steps)
        self.update_s = statistics.median(step.update_s for step in steps)

    def stall_s(self, turn: Turn, *, overlaps: bool) -> float:
        """How long the loop stood still for the save.

        The call, and what the next boundary took longer than others. For a peer that
        overlaps also what the optimizer's next step took longer, since it waits there.
        """
        first = turn.steps[0]
        stall = turn.call_s + first.boundary_s - self.boundary_s
        return stall + (first.update_s - self.update_s if overlaps else 0.0)

    def in_flight_s(self, turn: Turn) -> float:
        """What the call and the steps during the save took longer than quiet ones."""
        return turn.call_s + sum(step.total_s - self.step_s for step in turn.steps if step.saving)

    def lost_s(self, turn: Turn) -> float:
        """What the whole turn took longer than a quiet one."""
        return turn.total_s - self.turn_s


class Loop:
    """Trains `state`; the peers, with folders below `folder`, are those that take turns."""

    def __init__(
        self, state: Training, folder: Path, kinds: Sequence[type[Peer]], *, leads_in: bool = True
    ) -> None:
        """Without `leads_in` a turn starts with its save, of a state that was changed without
        a step: for steps of many seconds, or that change nothing."""
        self._state = state
        self._leads_in = leads_in
        self._runner = HoldfastRun(folder / "run", state)
        self.peers: dict[str, Peer] = {
            kind.name: self._runner if kind is HoldfastRun else kind(folder / kind.name, state)
            for kind in kinds
        }

    def train(
        self,
        names: Sequence[str],
        length: int,
        *,
        check: State | None = None,
        checked: int = 0,
        watch: Watch = nullcontext,
    ) -> list[Turn]:
        """Train turn by turn; at most once per loop, since breaking out ends the run's.

        The saves of the first `checked` turns are restored into `check` and compared.
        What a turn does happens inside `watch(name)`, until its save is durable.
        """
        turns = [Turn(name) for name in names]
        ended = 0.0
        with ExitStack() as watching:
            for number in self._runner.run.range(_ENDLESS):
                boundary_s = time.perf_counter() - ended
                index, place = divmod(number, length + 1)
                if place > 0:
                    turns[index].steps.append(self._step(turns[index], boundary_s))
                    ended = time.perf_counter()
                    continue
                if index > 0:
                    self._wait(turns[index - 1])
                    watching.close()
                    self._settle(turns[index - 1], check if index <= checked else None)
                if index == len(turns):
                    break
                watching.enter_context(watch(turns[index].name))
                self._begin(turns[index], digested=check is not None and index < checked)
                ended = time.perf_counter()
        return turns

    def close(self) -> None:
        for peer in {self._runner, *self.peers.values()}:
            peer.close()

    def _begin(self, turn: Turn, *, digested: bool) -> None:
        if self._leads_in:
            self._state.forward_backward()
            self._state.update()
        else:
            self._state.touch()
        if digested:
            turn.digest = self._state.digest()
        peer = self.peers.get(turn.name)
        start = time.perf_counter()
        if peer is not None:
            peer.start()
        turn.call_s = time.perf_counter() - start

    def _step(self, turn: Turn, boundary_s: float) -> Step:
        peer = self.peers.get(turn.name)
        saving = peer is not None and not peer.done()  # looked at in nobody's time
        start = time.perf_counter()
        self._state.forward_backward()
        middle = time.perf_counter()
        self._state.update()
        return Step(boundary_s, middle - start, time.perf_counter() - middle, saving)

    def _wait(self, turn: Turn) -> None:
        peer = self.peers.get(turn.name)
        if peer is not None:
            peer.wait()

    def _settle(self, turn: Turn, check: State | None) -> None:
        """Nothing of a turn's save is left for the next one."""
        peer = self.peers.get(turn.name)
        if peer is not None:
            if check is not None:
                check.clear()
                peer.restore(check)
                if check.digest() != turn.digest:
                    raise AssertionError(f"{turn.name} did not restore what was saved")
            peer.forget()
        os.sync()
