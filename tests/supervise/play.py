"""The supervisor's decisions, with a time that is turned by hand."""

from __future__ import annotations

from dataclasses import replace

from holdfast.supervise import machine
from holdfast.supervise.machine import (
    Action,
    Event,
    Exited,
    Life,
    Say,
    Settings,
    Start,
    Started,
    Watched,
)


class Play:
    """A supervisor whose time is turned by hand."""

    def __init__(self, **settings: object) -> None:
        self.settings = replace(Settings(), **settings)  # type: ignore[arg-type]
        self.state = machine.begin(0.0)
        self.now_s = 0.0
        self.life = Life()
        self.lines: list[str] = []

    def give(self, event: Event) -> list[Action]:
        self.state, actions = machine.handle(self.settings, self.state, event)
        self.lines += [action.text for action in actions if isinstance(action, Say)]
        return [action for action in actions if not isinstance(action, Say)]

    def start(self) -> None:
        """Wait for the next attempt, and begin it."""
        self.now_s = max(self.now_s, self.state.start_at_s)
        assert self.give(Watched(self.now_s)) == [Start(self.state.attempt)]
        self.give(Started(self.now_s, 100 + self.state.attempt))
        self.life = Life()

    def watch(self, seconds: float, *, each_s: float = 1.0) -> list[Action]:
        """Let time go by without a sign of life, until something is to be done."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += each_s
            if actions := self.give(Watched(self.now_s, self.life)):
                return actions
        return []

    def beat(self, step: int = 0, checkpoint: int | None = None, phase: str = "training") -> None:
        saved = self.life.checkpoints if checkpoint is None else (("run", checkpoint),)
        self.life = Life(self.life.beats + 1, phase != "ended", "run", phase, step, saved)
        assert self.give(Watched(self.now_s, self.life)) == []

    def end(self, status: int, jitter: float = 1.0) -> list[Action]:
        self.now_s += 1
        return self.give(Exited(self.now_s, status, self.life, jitter))

    def wait_s(self) -> float:
        return self.state.start_at_s - self.now_s
