"""What the adapters of libraries that own their loop share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from holdfast.errors import StateError, UsageError
from holdfast.manager import open as open_checkpoint
from holdfast.run.rehearsal import Beside
from holdfast.run.run import Run
from holdfast.run.together import TogetherWith


def check_run(run: object) -> None:
    """Raises UsageError for an address where a run is wanted."""
    if not isinstance(run, Run):
        raise UsageError(
            f"a callback needs a Run, not {run!r}"[:200],
            hint='Make it first: holdfast.Run("runs/x").',
        )


def check_name_is_new(run: Run, name: str) -> None:
    """Raises UsageError where a training of this name has ended in the same body: what the second
    found in a checkpoint could be either's."""
    if any(loop.label.name == name for loop in run._session.engine.position.siblings):
        raise UsageError(
            f"this run had a training named {name!r} just before this one",
            hint="Give each a callback of its own, with a name: Callback(run, name=…)",
        )


def check_is_alone(callback: object, others: Iterable[object]) -> None:
    """Raises UsageError where another one of Holdfast's is among the callbacks of the training."""
    if any(isinstance(one, type(callback)) for one in others if one is not callback):
        raise UsageError(
            "this training has two of Holdfast's callbacks",
            hint="Give it one: it saves to one run, whose mirror= may be a second place.",
        )


def meet_ranks(run: Run) -> TogetherWith:
    """The ranks that train with this process, before anything of the run is read: where it goes
    on is then the same on all of them. All ranks come here, with each training."""
    run._session.meet()
    return run._session.ranks


def expect_later(run: Run, names: Iterable[str]) -> None:
    """These will be tracked when the training begins, as if `Run(late=…)` said so."""
    run._session.tracked.expect(names)


def track_later(run: Run, objects: Mapping[str, Any], *, restore: bool) -> None:
    """Track what there is only now. `restore`: the training is one that a checkpoint holds; else
    it is a new one, of which the checkpoint may hold the last that had this name."""
    run._session.tracked.add(objects)
    if restore:
        run._session.restore_late(objects)
    else:
        run._session.watch(objects)


def tell_rehearsal(run: Run, look: Callable[[], Beside]) -> None:
    """Before the training's first step. If this is a rehearsal, it calls `look` at each."""
    recorder = run._session._recorder
    if recorder is not None:
        recorder.look_at(look)


def check_kind(state: Mapping[str, Any], library: str) -> None:
    """Raises StateError for what a training by another library has saved."""
    if state and state.get("kind") != library.lower():
        raise StateError(
            f"the checkpoint holds a training by another library than {library}",
            hint="Give this one a run, or a name, of its own.",
        )


def saved_training(ref: str, name: str, library: str, imported: type) -> Any:
    """What a training by `library` has saved in a checkpoint: a mapping; or a model of `imported`
    type, as `holdfast import` keeps its files. Raises StateError if it has none of that name."""
    checkpoint = open_checkpoint(ref)
    state = checkpoint.get(name)
    if isinstance(state, imported):
        return state
    if not isinstance(state, Mapping) or state.get("kind") != library.lower():
        raise StateError(
            f"{ref} has no booster of {library}'s named {name!r}",
            hint=f"It has: {', '.join(checkpoint)}.",
        )
    return state


def numbered(callbacks: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Callbacks by their class and their place among those of that class."""
    counts = Counter[str]()
    for callback in callbacks:
        name = type(callback).__qualname__
        yield f"{name}-{counts[name]}", callback
        counts[name] += 1
