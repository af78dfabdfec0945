"""`run.evaluate`: metrics for checkpoints that are there already, with the run's own objects."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from holdfast.core.address import some_of
from holdfast.core.choosing import Choice
from holdfast.errors import StructureMismatch, UsageError, briefly
from holdfast.manager import CheckpointManager
from holdfast.manager.evaluate import Evaluation, Evaluator, Function
from holdfast.manager.live_state import LiveState
from holdfast.manager.loaded import LoadedCheckpoint
from holdfast.manager.ranks import told
from holdfast.manager.restore import Wish
from holdfast.run.guard import Guarded

if TYPE_CHECKING:
    from holdfast.run.session import Session


class Evaluates:
    """A run's `evaluate`."""

    manager: CheckpointManager
    _session: Session
    _check_open: Callable[[], None]

    @briefly
    def evaluate(
        self,
        fn: Function,
        checkpoints: Choice = "all",
        *,
        metric: str | Sequence[str] | None = None,
        only: Collection[str] = (),
        again: bool = False,
    ) -> list[Evaluation]:
        """Call `fn` with each of the run's checkpoints restored into the tracked objects, and
        add the metrics that it gives to them.

        `fn(checkpoint)` returns a number, whose metric is called as `metric` says, else as the
        function is; or {name: number}. `checkpoint` is what `holdfast.open` gives: its `info`
        has the step. Tracked objects (`only` these names of them) hold its state; what it lacks,
        loaders, and the place in the loops are as they are now. When all is done, or something
        was raised, everything is as it was before, bit for bit: tracked objects, gradients,
        training modes and random states. At each call the last two are the same, and there are no
        gradients. This takes memory for one more copy of these objects.

            run.evaluate(lambda checkpoint: accuracy(model, test), metric="test_acc")

        Where and when: before, between, in and after loops; in a loop not between `backward` and
        `step`, for it changes parameters in place. Which (`checkpoints`: "all", "last=5",
        "best=3:val_loss", steps, tags, … as for `manager.choose`), what is skipped, what is
        raised: as for `CheckpointManager.evaluate`. From then on the metrics count for `keep`,
        `best` and `publish`. Where there is no checkpoint yet, nothing is done. After a request to
        stop it leaves as `guard` does. Of several ranks all call it, also where only one of them
        looks at what `fn` returns.
        """
        self._check_open()
        if isinstance(only, str):
            raise UsageError(f"only={only!r} is text, not a list of names", hint=f"only=[{only!r}]")
        session, manager = self._session, self.manager
        session.meet()
        manager.drain()
        manager.wait()  # what was saved last is to be evaluated, too
        session.saves.collect()
        state = session.tracked.state()
        if unknown := sorted(set(only).difference(state)):
            raise UsageError(
                f"only={list(only)!r}: nothing is tracked as {', '.join(map(repr, unknown))}",
                hint=f"Tracked: {some_of(sorted(state))}." if state else "Nothing is tracked.",
            )
        wanted = {name: value for name, value in state.items() if not only or name in only}
        group = session.ranks.group
        if told(group, lambda: manager.latest() is None):
            return []
        chosen = manager.chosen_together(checkpoints)
        allow_pickle = session.settings.allow_pickle
        known: set[str] = set()
        """Names of what is held."""
        states = [LiveState({})]
        held = ExitStack()

        def load(checkpoint: LoadedCheckpoint) -> None:
            into = self._parts(wanted, checkpoint)
            # What no checkpoint holds is left alone: a loader, say, that no loop has met yet.
            if fresh := {name: into[name] for name in into if name not in known}:
                states.append(LiveState(fresh, allow_pickle=allow_pickle))
                held.enter_context(states[-1])
                known.update(fresh)
            self._put_into(into, checkpoint)
            for state in reversed(states):  # the first one has the random states
                state.begin()

        def opened(id: str) -> LoadedCheckpoint:
            return manager.load(id, allow_pickle=allow_pickle)

        evaluator = Evaluator(
            manager,
            fn,
            metric,
            opened,
            load,
            again=again,
            around=lambda infos: Guarded(session, infos),
            say=session.console.say,
            group=group,
        )
        try:
            with states[0], held:
                return evaluator.run(chosen)
        finally:
            session.tracked.adopt(wanted)
            session.triggers.amended()
            session.saves.publish()

    def _parts(self, wanted: dict[str, object], checkpoint: LoadedCheckpoint) -> dict[str, Any]:
        """What of `wanted` the checkpoint holds. Raises StructureMismatch if that is nothing,
        and UsageError if it is a training of a framework's that has not begun."""
        saved = [name for name in checkpoint if isinstance(name, str)]
        here = self._session.tracked.saved_here(saved)
        into = {name: value for name, value in wanted.items() if name in here}
        if not into:
            raise StructureMismatch(
                f"{checkpoint.info.ref} holds nothing of {some_of(sorted(wanted))}"
                if wanted
                else "nothing is tracked that could be evaluated",
                missing=sorted(wanted),
                hint=f"It holds {some_of(sorted(saved))}. Track what fn needs, or read it: "
                "manager.evaluate(fn) gives each checkpoint to fn.",
            )
        for name, value in into.items():
            if getattr(value, "waits", False) is True and checkpoint[name]:
                raise UsageError(
                    f"{name!r} is a training that has not begun in this process: its model is not "
                    "known here, and would be the same for all checkpoints",
                    hint="Evaluate behind it, or load each in fn: run.manager.evaluate(fn).",
                )
        return into

    def _put_into(self, into: dict[str, Any], checkpoint: LoadedCheckpoint) -> None:
        tracked, settings = self._session.tracked, self._session.settings
        saved = [name for name in checkpoint if isinstance(name, str)]
        wish = Wish(
            into,
            strict=settings.strict,
            only=tuple(into),
            rename=tracked.renames_in(saved, ()),
            allow_pickle=settings.allow_pickle,
            rng=False,
        )
        self.manager.put_into(checkpoint.info.id, wish)
        tracked.adopt(into)
