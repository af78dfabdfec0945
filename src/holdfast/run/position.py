"""Where a run is in its loops: values and transitions, nothing that acts.

A position is the number of completed steps and the path of open loops, outermost
first. A loop is in one of three phases:

    next    between two items: `completed` items are done, none is in progress
    body    in the body of item number `completed`
    tail    in that body too, after a loop inside it has ended

and when it ends it is listed by the loop around it (or by the position) as closed.

A checkpoint is taken only where a resume can come back to: in front of the next item
of the innermost loop, or at the very end of a loop (a tail is pending then). The
bodies around it run again up to that point, for which each open loop keeps a mark:
what its feed and the random generators were before the item in progress was taken.

A step is a completed item of a counted loop in whose body no other counted loop ran.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from holdfast.errors import LoopError

Phase = Literal["next", "body", "tail"]

VERSION = 1


@dataclass(frozen=True)
class Mark:
    """What taking the item in progress once more needs."""

    feed: Any
    rng: Any


@dataclass(frozen=True)
class Label:
    """What a loop is called. `name` is "" unless the user gave one."""

    kind: str
    """"epochs", "batches" or "range"."""
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}" if self.name else self.kind


@dataclass(frozen=True)
class Closed:
    """A loop that has ended in the body that lists it."""

    label: Label
    completed: int
    limit: int | None
    """How many items it was to have, where that was known."""
    counted: bool
    broken: bool
    """Left by `break`, `return` or an exception, not exhausted."""
    rng: Any = None
    """The random states after it, for the code up to the next loop; None if they
    were not recorded."""
    guessed: bool = False
    """It was left, nobody saw when, and `rng` is that of a later moment."""


@dataclass(frozen=True)
class Frame:
    """An open loop."""

    label: Label
    counted: bool
    limit: int | None = None
    completed: int = 0
    phase: Phase = "next"
    nested: bool = False
    """A counted loop was opened in the body in progress."""
    done: tuple[Closed, ...] = ()
    """Loops that ended in the body in progress, in the order they were opened."""
    mark: Mark | None = None
    feed: Any = None
    """The feed's state, in a saved position whose innermost loop is this one."""


@dataclass(frozen=True)
class Position:
    """Immutable; the functions below return the next one."""

    step: int = 0
    done: tuple[Closed, ...] = ()
    """Outermost loops that have ended."""
    frames: tuple[Frame, ...] = ()

    @property
    def top(self) -> Frame:
        """The innermost open loop."""
        return self.frames[-1]

    @property
    def inside(self) -> bool:
        """Whether the innermost loop is between two of its items."""
        return bool(self.frames) and self.top.phase == "next"

    @property
    def untouched(self) -> bool:
        """Whether no loop has been opened yet: that of an imported checkpoint."""
        return not self.frames and not self.done

    @property
    def siblings(self) -> tuple[Closed, ...]:
        """Loops that ended in the body that a loop opened now would be part of."""
        return self.frames[-1].done if self.frames else self.done

    @property
    def replayable(self) -> bool:
        """Whether a resume could come back exactly here."""
        if not self.frames:
            return bool(self.done) and _known(self.done[:-1])
        *outer, top = self.frames
        at_end = top.phase == "tail" and top.mark is not None and not _open_end(top.done)
        if top.phase != "next" and not at_end:
            return False
        ended = top.done[:-1] if top.phase == "tail" else top.done
        return (
            all(frame.mark is not None and _known(frame.done) for frame in outer)
            and _known(self.done)
            and _known(ended)
        )

    def __str__(self) -> str:
        """For people: "epochs 3, batches 17"."""
        if not self.frames:
            return f"after {self.done[-1].label}" if self.done else "before the first loop"
        words = [f"{frame.label} {frame.completed:,}" for frame in self.frames]
        if self.top.phase == "tail":
            words.append(f"after {self.top.done[-1].label}")
        return ", ".join(words)


def _known(closed: tuple[Closed, ...]) -> bool:
    return all(one.rng is not None for one in closed)


def _open_end(closed: tuple[Closed, ...]) -> bool:
    """Whether the newest was left early: nobody knows how far its body got."""
    return bool(closed) and closed[-1].broken


# -- transitions --------------------------------------------------------------


def enter(position: Position, frame: Frame) -> Position:
    """`frame` opens inside the item in progress, if any loop is open."""
    if not position.frames:
        return replace(position, frames=(frame,))
    parent = position.top
    if parent.phase == "next":
        raise LoopError(
            f"{frame.label} was opened while {parent.label} fetches its next item",
            hint="Open loops in the body of another, not in its data.",
        )
    parent = replace(parent, phase="body", nested=parent.nested or frame.counted)
    return replace(position, frames=(*position.frames[:-1], parent, frame))


def take(position: Position, mark: Mark | None) -> Position:
    """The innermost loop hands out its next item."""
    frame = replace(position.top, phase="body", nested=False, done=(), mark=mark, feed=None)
    return replace(position, frames=(*position.frames[:-1], frame))


def complete(position: Position) -> Position:
    """The body in progress of the innermost loop ran to its end."""
    frame = position.top
    is_step = frame.counted and not frame.nested
    frame = replace(
        frame, completed=frame.completed + 1, phase="next", nested=False, done=(), mark=None
    )
    return replace(position, step=position.step + is_step, frames=(*position.frames[:-1], frame))


def close(position: Position, *, broken: bool, rng: Any = None, guessed: bool = False) -> Position:
    """The innermost loop ends."""
    frame = position.top
    closed = Closed(frame.label, frame.completed, frame.limit, frame.counted, broken, rng, guessed)
    return _list(replace(position, frames=position.frames[:-1]), closed)


def skip(position: Position, closed: Closed) -> Position:
    """A loop that had ended before the checkpoint is met again and yields nothing."""
    return _list(position, closed)


def _list(position: Position, closed: Closed) -> Position:
    if not position.frames:
        return replace(position, done=(*position.done, closed))
    parent = position.top
    parent = replace(
        parent,
        phase="tail",
        nested=parent.nested or closed.counted,
        done=(*parent.done, closed),
    )
    return replace(position, frames=(*position.frames[:-1], parent))


# -- coming back --------------------------------------------------------------


@dataclass(frozen=True)
class Skip:
    """The loop had ended: yield nothing, and set the random state it left."""

    closed: Closed
    lands: bool
    """This is where the checkpoint was taken: restore everything."""


@dataclass(frozen=True)
class Enter:
    """The loop was open: go on in it."""

    frame: Frame
    lands: bool


@dataclass(frozen=True)
class Replay:
    """The way back from a program's start to a saved position.

    `depth` of the saved loops have been entered again.
    """

    saved: Position
    depth: int = 0

    def meet(self, live: Position, label: Label, limit: int | None) -> Skip | Enter:
        """What becomes of a loop that the program opens on its way.

        Loops are matched by name, and those without one by their order among the
        others without one. Raises LoopError if the saved run had no such loop here.
        """
        frames = self.saved.frames
        done = frames[self.depth - 1].done if self.depth else self.saved.done
        active = frames[self.depth] if self.depth < len(frames) else None
        same = sum(one.label.name == label.name for one in live.siblings)
        for index, closed in enumerate(done):
            if closed.label.name == label.name:
                if same == 0:
                    self._check_kind(closed.label, label)
                    lands = active is None and index == len(done) - 1
                    if lands and self.depth == 0 and _asks_for_more(closed, limit):
                        return Enter(_reopened(closed), lands=True)
                    return Skip(closed, lands)
                same -= 1
        if active is not None and active.label.name == label.name and same == 0:
            self._check_kind(active.label, label)
            return Enter(active, lands=self.depth == len(frames) - 1 and active.phase == "next")
        raise self.mismatch(f"the program opens the loop {label}, which was not open there")

    def entered(self) -> Replay:
        """One saved loop deeper."""
        return replace(self, depth=self.depth + 1)

    def mismatch(self, what: str) -> LoopError:
        return LoopError(
            f"the checkpoint was saved in the loops ({self.saved}), but {what}",
            hint="The loops must be those of the run that saved it; give loops that run only "
            "sometimes a name=, or start under a new address.",
        )

    def _check_kind(self, saved: Label, live: Label) -> None:
        if saved.kind != live.kind:
            raise self.mismatch(f"the program opens {live} in the place of {saved}")


def _asks_for_more(closed: Closed, limit: int | None) -> bool:
    """A finished run that is given more epochs goes on; one that was stopped early does
    so only if they are more than it had been given."""
    if closed.label.kind == "batches" or limit is None:
        return False
    return limit > max(closed.completed, closed.limit or 0)


def _reopened(closed: Closed) -> Frame:
    return Frame(
        closed.label,
        closed.counted,
        closed.limit,
        completed=closed.completed,
        feed={"taken": closed.completed},
    )


# -- as a plain tree ----------------------------------------------------------


def to_tree(position: Position) -> dict[str, Any]:
    """`position` as plain values; marks and feeds as they are."""
    return {
        "version": VERSION,
        "step": position.step,
        "done": [_closed_tree(closed) for closed in position.done],
        "frames": [
            {
                "kind": frame.label.kind,
                "name": frame.label.name,
                "counted": frame.counted,
                "limit": frame.limit,
                "completed": frame.completed,
                "phase": frame.phase,
                "nested": frame.nested,
                "done": [_closed_tree(closed) for closed in frame.done],
                "mark": frame.mark and {"feed": frame.mark.feed, "rng": frame.mark.rng},
                "feed": frame.feed,
            }
            for frame in position.frames
        ],
    }


def from_tree(tree: Any) -> Position:
    """The position that `to_tree` wrote. Raises LoopError if it is none."""
    try:
        if tree["version"] != VERSION:
            raise LoopError(
                f"the checkpoint's loop position has version {tree['version']}, not {VERSION}",
                hint="It was saved by another version of Holdfast; use that one.",
            )
        return Position(
            step=int(tree["step"]),
            done=tuple(map(_closed, tree["done"])),
            frames=tuple(map(_frame, tree["frames"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LoopError(
            f"the checkpoint holds no loop position that can be read ({error!r})",
            hint="It was saved with CheckpointManager.save, not by a Run: restore it with "
            "CheckpointManager.restore.",
        ) from None


def _closed_tree(closed: Closed) -> dict[str, Any]:
    return {
        "kind": closed.label.kind,
        "name": closed.label.name,
        "completed": closed.completed,
        "limit": closed.limit,
        "counted": closed.counted,
        "broken": closed.broken,
        "rng": closed.rng,
        "guessed": closed.guessed,
    }


def _closed(tree: Any) -> Closed:
    return Closed(
        label=Label(tree["kind"], tree["name"]),
        completed=int(tree["completed"]),
        limit=tree["limit"],
        counted=bool(tree["counted"]),
        broken=bool(tree["broken"]),
        rng=tree["rng"],
        guessed=bool(tree.get("guessed")),
    )


def _frame(tree: Any) -> Frame:
    mark = tree["mark"]
    if tree["phase"] not in ("next", "body", "tail"):
        raise ValueError(f"phase {tree['phase']!r}")
    return Frame(
        label=Label(tree["kind"], tree["name"]),
        counted=bool(tree["counted"]),
        limit=tree["limit"],
        completed=int(tree["completed"]),
        phase=tree["phase"],
        nested=bool(tree["nested"]),
        done=tuple(map(_closed, tree["done"])),
        mark=mark and Mark(mark["feed"], mark["rng"]),
        feed=tree["feed"],
    )
