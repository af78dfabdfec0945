"""What a run does at its boundaries: restore, save, stop, finish.

`Session` is the engine's host (see `engine.Host`). It owns no loop logic: where the
program is comes from the engine, when to save from `Triggers`, what to save from
`Tracked` and `MetricBook`, and the manager does the work.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from holdfast.core.frameworks import loaded_adapters
from holdfast.errors import HoldfastError, LoopError, SaveFailed, StoreError
from holdfast.manager import heartbeat
from holdfast.run import environment
from holdfast.run import position as at
from holdfast.run.attributes import Attributes
from holdfast.run.barriers import Barriers
from holdfast.run.box import Box
from holdfast.run.console import (
    Console,
    config_line,
    copying_line,
    differences_line,
    kept_line,
    plural,
    redrawn_line,
    settings_line,
    started_line,
    thread_line,
)
from holdfast.run.constructed import Constructed
from holdfast.run.contents import Contents
from holdfast.run.decisions import Decisions
from holdfast.run.engine import Engine
from holdfast.run.events import RunEvents
from holdfast.run.feed import LoaderInterrupted, Policy
from holdfast.run.feeds import FeedBook
from holdfast.run.gradients import Accumulation
from holdfast.run.held_state import HeldState
from holdfast.run.loop import Loop
from holdfast.run.metrics import MetricBook
from holdfast.run.position import Label, Replay
from holdfast.run.publish import Publisher
from holdfast.run.random_states import RandomStates
from holdfast.run.rehearsal import Recorder
from holdfast.run.restores import Restores
from holdfast.run.saves import Saves
from holdfast.run.settings import Settings
from holdfast.run.stopping import Stopping
from holdfast.run.together import TogetherWith
from holdfast.run.tracking import Tracked, untracked_line
from holdfast.run.triggers import Triggers
from holdfast.run.unsaved import Unsaved

logger = logging.getLogger("holdfast")

_BRIEFLY_S = 1.0  # what is in the mirror by then needs no line
# For shares of ranks of other machines, which may be gone, too. torchrun and Slurm kill what has
# not ended within 30 s.
_LEAVE_S = 20.0


class Session:
    """One process's part of a run."""

    def __init__(
        self,
        manager: Any,
        triggers: Triggers,
        box: Box,
        settings: Settings,
        console: Console,
        *,
        data: Policy = "refuse",
        publisher: Callable[[Any], Publisher | None] = lambda manager: None,
        recorder: Recorder | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.manager = manager
        self.triggers = triggers
        self.settings = settings
        self.console = console
        self.tracked = Tracked(box, settings.late, settings.rename or {})
        self.metrics = MetricBook()
        self.random = RandomStates(self.tracked.state, settings.rename)
        self.feeds = FeedBook(data, self.random)
        self.gradients = Accumulation()
        self.barriers = Barriers(manager.drain)
        self.constructed = Constructed(settings.override)
        self.attributes = Attributes()
        self.unsaved = Unsaved(self.tracked, self.attributes, settings.late)
        self.engine = Engine(self)
        self.events = RunEvents(manager.history.add, manager.address)
        self.contents = Contents(
            self.engine,
            self.tracked,
            self.metrics,
            self.feeds,
            self.gradients,
            self.constructed,
            self.attributes,
            lambda state: self.ranks.bucket_orders(state),
        )
        self.saves = Saves(manager, triggers, self.metrics, publisher(manager))
        self.held = HeldState(manager, settings.hold, self.contents, console)
        self.stopping = Stopping(
            self.engine,
            console,
            manager.address,
            exit_code=settings.exit_code,
            grace_s=settings.grace_s,
            save=self._save_now,
            events=self.events,
            saved=lambda: self.saves.all_durable(self.engine.ticks),
            saves=self.saves,
            held=self.held,
            want=triggers.want,
            mirrored=manager.finish_mirror,
        )
        self.restores = Restores(manager, self.tracked, settings, self.constructed, self.attributes)
        self.decisions = Decisions(triggers, self.stopping, clock)
        self.ranks = TogetherWith(
            settings.group, manager, self.decisions, self.saves, console, self.held.on
        )
        self._clock = clock
        self._recorder = recorder
        self._address: str = manager.address
        self._resuming = False
        """The first item after a resume inside a loop is to come."""
        self._armed = self._checked = self._warned_thread = False
        self._final = True
        """Nothing was trained since the last save of a finished run."""

    def meet(self) -> None:
        """Find out who trains with this process, once. All ranks come here."""
        self.feeds.ranks = self.ranks.meet()
        if self._recorder is not None:
            self._recorder.meet(self.ranks.ranks)

    def start(self) -> Replay | None:
        manager = self.manager
        self.meet()
        if line := environment.passing_folder_line(self._address):
            self.console.loud(line, each=False)
        heartbeat.beat(self._address, "restoring", 0)
        with self.console.bringing_back(self._address, manager.mirror):
            finished = self.ranks.finished(manager)
        if not finished or manager.mirror:
            # Before reading: what is restored must be the newest when we start to write. And a
            # finished run's mirror may lack the end, if its process was killed over it.
            manager.acquire()
        manager.environment = environment.collect()
        self.watch(self.tracked.objects)
        said: list[str] = []

        def restore(found: Any) -> Any:
            said[:] = self._accept(found)
            with self._restoring():
                return self.restores.everything(found.info.id)

        restored = manager.go_on(restore)
        if restored is None:
            self.restores.check_settings({})
            self.console.say(started_line(self._address, None, source=manager.mirror))
            self.triggers.start(None, self._clock())
            heartbeat.beat(self._address, "training", 0)
            return None
        self.saves.resumed(self.engine.ticks, restored.info)
        self.events.fell_back(restored)
        self._announce(restored)
        edited = "; ".join(self.attributes.edited())
        kept = edited and f"as in the checkpoint: {edited}"
        for line in filter(None, (self.ranks.changed_line(restored.world_size), *said, kept)):
            self.console.say(line)
        self.triggers.start(restored.info.step, self._clock())
        heartbeat.checkpoint(self._address, restored.info.step, restored.info.id)
        heartbeat.beat(self._address, "training", restored.info.step)
        self.metrics.restore(restored.loop.get("metrics", {}), restored.info.metrics)
        self.contents.lengths = dict(restored.loop.get("lengths", {}))
        self.feeds.restore(restored.loop.get("feeds", {}), restored.loop.get("held", []))
        return Replay(at.from_tree(restored.loop))

    def _accept(self, found: Any) -> list[str]:
        """Before the restore of a checkpoint. Raises what speaks against it, and returns
        what is to be said of it."""
        self.manager.config, changes = environment.checked_config(
            found.config,
            self.settings.config,
            allow_change=self.settings.allow_config_change,
            address=self._address,
        )
        self.restores.remember(found)
        if self.tracked.fresh(self.restores.names) and self.settings.strict:
            # The restore would only call the new name missing; this knows the old one.
            self.restores.check_claimed()
        overridden = self.restores.check_settings(found.loop.get("settings", {}))
        said = [config_line(changes)] if changes else []
        return [*said, settings_line(overridden)] if overridden else said

    def _restoring(self) -> contextlib.AbstractContextManager[None]:
        return self.console.working(f"{self._address}: restoring", f"{self._address}: restored")

    def _announce(self, restored: Any) -> None:
        info = restored.info
        source = self.manager.mirror if self.manager.brought_back(info.id) else ""
        line = started_line(self._address, info.step, time.time() - info.time_s, source=source)
        if restored.skipped:
            self.console.loud(
                f"{line}; {plural(len(restored.skipped), 'newer checkpoint')} damaged and not used"
            )
        else:
            self.console.say(line)
        if changed := environment.differences(restored.environment, self.manager.environment):
            self.console.say(differences_line(changed))

    def watch(self, names: Collection[str]) -> None:
        """Objects are tracked from now on."""
        self.gradients.watch(loaded_adapters(), self.tracked.objects)
        self.barriers.watch(loaded_adapters(), self.tracked.objects)
        late = {name: self.tracked.objects[name] for name in names}
        self.attributes.note(loaded_adapters(), late)

    def restore_late(self, names: Collection[str]) -> None:
        """Objects were tracked after the start: give them what the checkpoint holds."""
        self.watch(names)
        overridden, kept = self.restores.late(names)
        if overridden:
            self.console.say(settings_line(overridden))
        if kept:
            self.console.loud(kept_line(kept))

    def warn_untracked(self, scope: Mapping[str, Any]) -> None:
        """One line for optimizers and schedulers beside the tracked objects that are not
        tracked themselves."""
        objects, late = self.tracked.objects, self.settings.late
        if line := untracked_line(loaded_adapters(), scope, objects, late):
            self.console.loud(line)

    # -- the engine's host -----------------------------------------------------------

    def redrawn(self, passed: Label, following: Loop) -> None:
        self.console.loud(f"{self._address}: {redrawn_line(passed, following.label)}")

    def land(self, *, over: bool, rng: bool) -> None:
        resumed = self.restores.resumed
        assert resumed is not None
        self.feeds.ledger.land()
        with self._restoring():
            restored = self.restores.everything(resumed.id, rng=rng)
        self.ranks.put_bucket_orders(self.tracked.objects, restored.loop.get("buckets", {}))
        self.gradients.restore(restored.loop.get("gradients", {}))
        # What the prologue logged once more was computed from a later state.
        self.metrics.restore(restored.loop.get("metrics", {}), restored.info.metrics)
        position = at.from_tree(restored.loop)
        self._resuming = bool(position.frames) and position.top.completed > 0
        if position.frames and position.top.phase == "tail":
            what = "going on behind that loop, whose variables are not set"
            self.console.say(f"{self._address}: {position}: {what}")
            self.triggers.want("tail")  # else this step's checkpoint stays the one without it
        if over:
            self.console.say(
                f"{self._address} is finished at step {resumed.step:,}: nothing to train"
            )
            # The process that finished it may have died before it came to this.
            try:
                self._tidy()
            except HoldfastError as error:
                self.console.loud(f"{self._address}: could not tidy up: {error}")

    def before_item(self, loop: Loop) -> None:
        self._final = False
        self.gradients.begin()
        if self._armed:
            if self.engine.position.top.completed == 0:
                self.stopping.before_first()
            return
        self._armed = True
        if not self._checked:
            self._checked = True
            self.restores.check_claimed()
            self.tracked.check_complete(loaded_adapters())
            self.triggers.learn(self.manager.events)
            if self._recorder is not None:
                self._recorder.started(resumed.step if (resumed := self.restores.resumed) else None)
                if self._recorder.is_over(self.engine.position.step):
                    raise SystemExit(0)
        self.manager.acquire()
        if not self.stopping.await_requests() and not self._warned_thread:
            self._warned_thread = True
            self.console.loud(thread_line(self._address), each=False)

    def took(self, loop: Loop, item: Any) -> None:
        if self.engine.landed:
            self.events.going(self.engine.position.step, self.restores.resumed)
        self.unsaved.began(loop, self.engine.position.step, landed=self.engine.landed)
        if self._resuming and self.engine.landed:
            self._resuming = False
            if loop.site is not None and (names := loop.site.counters()):
                self.console.loud(
                    f"{self._address}: {' and '.join(names)} around the {loop.label} loop begins "
                    "anew after a resume: use run.batch, or put it inside the call"
                )
        if self._recorder is not None and self.engine.landed:
            step = self.engine.position.step
            self._recorder.entered(loop.place, step, item, self.tracked.objects, loop.site)

    def acted(self) -> bool:
        return self.metrics.fresh or self.gradients.stepped

    def left(self, loop: Loop, following: Loop) -> None:
        completed = self.engine.position.frames[0].completed
        what = f"the {loop.label} loop was left after {plural(completed, 'item')}"
        if loop.site is not None and loop.site.cell_ended(sys._getframe()):
            raise LoopError(
                f"{what}, and now the {following.label} loop would start after it",
                hint="Make a new Run: it goes on from the newest checkpoint.",
            )
        # `zip` of two loops is at the `for` of both; the error to come says what is wrong.
        here = loop.site is not None and loop.site.holds(sys._getframe(), advancing=True)
        if loop.label == following.label and not (here and loop.left is None):
            self.console.loud(
                f"{self._address}: {what}; the next one is another loop and starts at 0 "
                "(to go on instead, make a new Run)"
            )

    def opened(self, loop: Loop, *, first_inside: bool) -> None:
        self.feeds.ledger.opened(loop.place, loop.origin)
        fresh = self.metrics.settle(is_step=False)
        last = self.saves.of(self.engine.ticks)
        # Nothing but the start of this body ran since that save.
        if fresh and first_inside and last is not None:
            self.saves.attach_later(last, fresh)

    def open_feed(self, loop: Loop, saved: Any) -> bool:
        if loop.counted:
            kinds = [frame.label.kind for frame in self.engine.position.frames]
            self.triggers.check(kinds if loop.epoch_end is None else [*kinds, "epochs"])
        if saved is not None:
            self.feeds.met(loop.place, loop.origin)
        if not loop.loaders:
            return loop.feed.open(saved)
        again = loop.retake is not None
        as_saved = self.feeds.open(
            loop.place, loop.loaders, loop.mode, loop.feed, saved, again=again
        )
        begins = saved is None or not as_saved  # one that goes on may have an odd length
        if begins and (line := self.contents.note_length(loop)):
            self.console.say(line)
        return as_saved

    def passed(self, loop: Loop) -> None:
        self.feeds.met(loop.place, loop.origin)
        if loop.loaders:
            self.feeds.passed(loop.place, loop.loaders, loop.mode, loop.feed)

    def completed(self, *, is_step: bool) -> None:
        fresh = self.metrics.settle(is_step=is_step)
        if fresh and self.ranks.is_first and self.triggers.improves(fresh):
            self.triggers.want("best")

    def boundary(self, loop: Loop, *, last: bool) -> None:
        self.saves.collect()
        epoch_end = loop.label.kind == "epochs" or bool(loop.epoch_end)
        step = self.engine.position.step
        heartbeat.beat(self._address, "training", step)
        around = loop.habits.nests is True or loop.waits
        reason, stop = self.decisions.at(step, epoch_end=epoch_end, last=last, around=around)
        over = False
        if self._recorder is not None:
            self._recorder.completed(loop.place, step, self.metrics.known())
            over = self._recorder.is_over(step)
        if last:
            return
        if stop:
            self.stopping.here()
        elif (reason or over) and self.engine.position.replayable and not self.gradients.defers():
            if over:
                self._save_now("rehearsed")
                raise SystemExit(0)
            self._save(reason)
        elif self.held.on and self.engine.position.replayable:
            with self.saves.making():
                self.held.boundary(step, self.engine.ticks, self._clock(), epoch_end=epoch_end)

    def tail(self) -> None:
        self.unsaved.inner_ended(self.engine.position.step)
        self.stopping.in_tail()

    def outermost_done(self) -> None:
        self._finish()

    def interrupted(self, error: LoaderInterrupted) -> None:
        self.stopping.interrupted()

    # -- saving ----------------------------------------------------------------------

    def _save(self, note: str, *, block: bool = False, finished: bool = False) -> None:
        content = self.contents.now()
        self.unsaved.tell(content.state, self.console, self._address)
        with self.saves.making():
            pending = self.manager.save(
                content.step,
                content.state,
                metrics=content.metrics,
                note=note,
                loop=content.loop,
                finished=finished,
                block=block,
                in_place=self.barriers.in_place(),
            )
            self.saves.submitted(self.engine.ticks, pending)
        self.triggers.saved(content.step, self._clock())
        self.held.start(content.step, self._clock())

    def _save_now(self, note: str, *, finished: bool = False) -> None:
        """A save that nothing follows, so it is tried twice. Returns when it is durable."""
        self.manager.hurry_mirror()
        try:
            self._save_and_wait(note, finished=finished)
        except (StoreError, SaveFailed, OSError) as error:
            self.console.loud(f"{self._address}: the save failed, trying again: {error}")
            self._save_and_wait(note, finished=finished)
        self.saves.collect()

    def _save_and_wait(self, note: str, *, finished: bool) -> None:
        step = f"step {self.engine.position.step:,}"
        heartbeat.beat(self._address, "saving", self.engine.position.step)
        with self.console.working(
            f"{self._address}: saving {step}", f"{self._address}: saved {step}"
        ):
            self._save(note, block=True, finished=finished)

    def log(self, values: Mapping[str, Any]) -> None:
        """See Run.log."""
        self.metrics.log(values, self.engine.position.step)
        last = self.saves.of(self.engine.ticks)
        if self._final and last is not None:
            self.saves.attach(last, self.metrics.settle(is_step=False))

    # -- the end ---------------------------------------------------------------------

    def finish(self) -> None:
        """The program is done with its loops, however it left them."""
        self.engine.check_failed()
        if self._final:
            return
        if not self.engine.landed:
            self.console.loud(
                f"{self._address}: the program ended before it came to the place of the "
                "checkpoint; nothing was saved"
            )
            return
        with self.engine.finishing():
            self.metrics.settle(is_step=False)
            self._finish()

    def _finish(self) -> None:
        self.decisions.end()
        self.stopping.check_time()
        self._save_now("final", finished=True)
        self.ranks.settle(self.manager)
        self._final, self._armed = True, False
        self._tidy()
        if self.stopping.requested:
            self.stopping.exit(f"saved step {self.engine.position.step:,}, the last of the loop")
        self.stopping.rest()
        heartbeat.ended(self._address)

    def _tidy(self) -> None:
        """What a finished run wants: only the checkpoints of `on_finish`, and its export."""
        if self.settings.on_finish is not None and self.ranks.is_first:
            self.manager.prune(self.settings.on_finish)
        self.saves.publish()

    def close(self) -> None:
        """Flush and let go of everything. Raises SaveFailed if the newest save failed."""
        self.engine.closed = True
        self.stopping.rest()
        self.held.drop()
        self.gradients.close()
        self.barriers.close()
        if self._recorder is not None:
            self._recorder.close()
        if not self._final:
            self.manager.leave_ranks(_LEAVE_S)
        try:
            self.feeds.close()
            self.saves.close()
            if steps := self.manager.finish_mirror(_BRIEFLY_S):
                self.console.say(copying_line(self._address, self.manager.mirror, steps))
        finally:
            self.events.ended(self.engine.position.step, finished=self._final)
            with self.console.copying(self._address, self.manager.mirror):
                self.manager.close()
