"""`Run`: the public face of the loop."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, get_args

from holdfast.core.codecs import codec_of
from holdfast.core.group import Group
from holdfast.core.retention import parse_keep
from holdfast.core.schedule import parse_every
from holdfast.errors import HoldfastError, RunClosed, UsageError, briefly
from holdfast.manager import CheckpointInfo, CheckpointManager
from holdfast.notices.grace import grace_s
from holdfast.run.arguments import (
    check_rename,
    exit_status,
    final_policy,
    hold_schedule,
    whole,
)
from holdfast.run.box import Box
from holdfast.run.console import Console
from holdfast.run.environment import plain_config
from holdfast.run.evaluation import Evaluates
from holdfast.run.feed import Policy
from holdfast.run.feeds import Mode
from holdfast.run.guard import Guarded
from holdfast.run.loop import IndexFeed, Loop
from holdfast.run.position import Label
from holdfast.run.publish import Publisher, parse_publish
from holdfast.run.readahead import Origin
from holdfast.run.rehearsal import Recorder, address_in, part_of_this_process
from holdfast.run.results import CallsStored, Durable
from holdfast.run.session import Session
from holdfast.run.settings import Settings
from holdfast.run.triggers import Triggers, auto_interval
from holdfast.stores.base import Store

logger = logging.getLogger("holdfast")

_open_runs: dict[str, weakref.ref[Run]] = {}


class Run(CallsStored, Evaluates):
    """A resumable run at `address`, a folder or a URL.

        run = holdfast.Run("runs/mnist", every="10min", keep="last=3 best=2:val_loss")
        run.track(model=model, optimizer=optimizer)
        for epoch in run.epochs(20):
            for x, y in run.batches(loader):
                run.log(loss=train_step(x, y))

    Start the same program again after any interruption: the tracked objects, the random
    states and the place in the loops are those of the newest intact checkpoint.

    every: when to save: steps (`500`), `"10min"`, `"epoch"`, `"auto"`, several; the end of
        the outermost loop and a preemption save always.
    mtbf, overhead: for `every="auto"`: the mean time between failures ("6h"; else learned from
        the run's history) and the share of the time that saves may take.
    keep: which checkpoints stay; a `best` rule also saves when its metric improves.
    config: plain settings, compared with the last run's; a difference raises
        ConfigChanged unless `allow_config_change`.
    on_finish: what to keep at the end, e.g. `"final best=1"`.
    publish: `"best:folder"` or `"latest:folder"`: an export that is always whole.
    data: what becomes of an interrupted epoch whose loader was changed: `"by-sample"` goes
        on behind the samples that were taken (in batches of the new size), and
        `"restart-epoch"` begins it anew. Else such a change is refused.
    late: names that will be tracked only after the loop has started.
    override: tracked objects, or settings of them (`"optimizer.lr"`), that keep what the
        program built them with where the checkpoint has something else. Such a difference
        raises ConfigChanged if it is not named here.
    strict, rename: as for `CheckpointManager.restore`.
    memory: the most that the blocks between the state and the disk take, in bytes or as
        text ("256MiB"). Copies of what cannot be read in place come on top.
    sparse_rows: paths of large tensors of which few rows change from save to save
        (`"model/embedding.weight"`): only the chunks of 64 KiB that changed are written.
    compress: `"zstd"`: store new bytes compressed where that makes them smaller. For slow
        links and small disks; it takes more of the processor.
    mirror: a second address, mostly a bucket, to which each checkpoint is copied in the
        background once it is committed. Where `address` has none, the run is brought back
        from there. It never holds training up; mirror_keep (by default as keep),
        mirror_bandwidth ("200MB/s") and mirror_wait, for how long `close` copies what is
        left ("5min"), are about it.
    exit_code: the status after SIGTERM, SIGINT or a notice was answered with a save: 1 to 255.
    grace: for how long this process may live after a signal, in seconds or as text ("2min"):
        as your scheduler is set up. No last save is begun that would not fit. Without it (and
        without the variable HOLDFAST_GRACE) 30 s are taken for usual, and a save is always tried.
    group: False for a process that saves by itself although a framework has connected it with
        others. By default all of them save together: see docs/distributed.md.
    per_rank: tracked objects, or paths in them, that differ from rank to rank where those of
        models and optimizers are the same on all: `["model"]` for models that train apart.
    hold: keep a copy of the state in memory, taken at the boundaries that it names: `"1min"`, `500`
        steps, True (each). After a request to stop it becomes a checkpoint if the loop does not
        come back to a boundary in time: a long evaluation, a loader that is stuck.
    quiet: print only what must not be missed.

    Use it as a context manager to close it; else it is closed when Python exits.
    """

    def __init__(
        self,
        address: str | os.PathLike[str],
        *,
        every: int | str | None = "10min",
        mtbf: float | str | None = None,
        overhead: float | str = "1%",
        keep: str | None = "last=3",
        config: object = None,
        allow_config_change: bool = False,
        on_finish: str | None = None,
        publish: str | None = None,
        take_over: bool = False,
        late: Collection[str] = (),
        override: Collection[str] = (),
        max_save_failures: int = 3,
        allow_pickle: bool = False,
        strict: bool = True,
        rename: Mapping[str, str] | None = None,
        data: Policy = "refuse",
        exit_code: int = 75,
        grace: float | str | None = None,
        hold: bool | int | str | None = None,
        group: Group | bool | None = None,
        per_rank: Collection[str] = (),
        quiet: bool = False,
        rewrite_every: int | None = None,
        memory: int | str = "256MiB",
        sparse_rows: Collection[str] = (),
        compress: str | None = None,
        mirror: str | os.PathLike[str] | None = None,
        mirror_keep: str | None = None,
        mirror_bandwidth: int | str | None = None,
        mirror_wait: float | str | None = None,
        store: Store | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for option, names in (
            ("late", late),
            ("override", override),
            ("per_rank", per_rank),
            ("sparse_rows", sparse_rows),
        ):
            if isinstance(names, str):
                raise UsageError(
                    f"{option}={names!r} is text, not a list of names", hint=f"{option}=[{names!r}]"
                )
        check_rename(rename or {})
        if data not in get_args(Policy):
            raise UsageError(
                f"data={data!r} is not known",
                hint='data="refuse", data="by-sample" or data="restart-epoch".',
            )
        codec_of(compress)  # before an older run of this program is closed
        auto = auto_interval(every, mtbf, overhead)
        part = part_of_this_process()
        if part is not None:
            address, store, every = address_in(part, os.fspath(address)), None, part.every
            keep = on_finish = publish = None
            mirror = mirror_keep = mirror_bandwidth = mirror_wait = None
        schedule = parse_every(every)
        policy = parse_keep(keep)
        publication = None if publish is None else parse_publish(publish)
        if publication is not None and publication.which == "best" and not policy.best:
            raise UsageError(
                f"publish={publish!r} needs to know what is best",
                hint='Add a rule to keep, e.g. keep="last=3 best=1:val_loss".',
            )
        settings = Settings(
            config=None if config is None else plain_config(config),
            allow_config_change=allow_config_change,
            on_finish=None if on_finish is None else final_policy(on_finish, policy),
            late=tuple(late),
            override=tuple(override),
            rename=dict(rename or {}),
            strict=strict,
            allow_pickle=allow_pickle,
            exit_code=exit_status(exit_code),
            grace_s=grace_s(grace),
            hold=hold_schedule(hold),
            group=group,
        )
        self.address = os.fspath(address)
        console = Console(quiet=quiet)
        key = _key(self.address)
        _close_older(key, self.address, console)
        manager = CheckpointManager(
            address,
            keep=keep,
            take_over=take_over,
            allow_pickle=allow_pickle,
            max_save_failures=max_save_failures,
            rewrite_every=rewrite_every,
            memory=memory,
            sparse_rows=sparse_rows,
            compress=compress,
            mirror=mirror,
            mirror_keep=mirror_keep,
            mirror_bandwidth=mirror_bandwidth,
            mirror_wait=mirror_wait,
            store=store,
            config=settings.config,
            per_rank=per_rank,
        )

        def publisher(manager: CheckpointManager) -> Publisher | None:
            if publication is None:
                return None
            choose = manager.latest
            if publication.which == "best":
                metric, mode = policy.best[0].metric, policy.best[0].mode
                choose = lambda: manager.best(metric, mode)  # noqa: E731
            return Publisher(publication.path, manager, choose)

        self.box = Box()
        """Named values that survive restarts: `run.box(best=inf)` declares them."""
        self.manager = manager
        """For what a loop does not need: tags, pins, listings."""
        self._session = Session(
            manager,
            Triggers(schedule, policy, manager.checkpoints, auto, self._say),
            self.box,
            settings,
            console,
            data=data,
            publisher=publisher,
            recorder=None if part is None else Recorder(part, self.address),
            clock=clock,
        )
        self._durable = Durable(
            manager,
            console,
            self._session.stopping,
            exit_code=exit_code,
            check=self._check_open,
        )
        self._closed = False
        self._pid = os.getpid()
        self._warned = False
        atexit.register(self._at_exit)
        _open_runs[key] = weakref.ref(self)

    # -- state -----------------------------------------------------------------------

    @briefly
    def track(self, **objects: Any) -> Self:
        """Make objects part of every checkpoint, by name; returns the run.

        Takes modules, optimizers, anything with `state_dict` and `load_state_dict`,
        tensors, arrays, generators, lists, dicts and nests of them: things that can be
        restored in place. Plain values belong in `run.box`. A name that was tracked
        before is replaced. After the loop has started, an object that the checkpoint
        holds is restored at once (declare the name: `Run(late=[…])`).
        """
        self._check_open()
        tracked = self._session.tracked
        fresh = tracked.add(objects)
        engine = self._session.engine
        if engine.started:
            self._session.restore_late(fresh if engine.landed else list(objects))
        return self

    @property
    def step(self) -> int:
        """Completed steps."""
        return self._session.engine.position.step

    @property
    def epoch(self) -> int:
        """The epoch in progress, from 0; the number of completed ones after the loop."""
        position = self._session.engine.position
        for frame in position.frames:
            if frame.label.kind == "epochs":
                return frame.completed
        for closed in reversed(position.done):
            if closed.label.kind == "epochs":
                return closed.completed
        return 0

    @property
    def batch(self) -> int:
        """The item in progress of the innermost open loop, from 0.

        Use it instead of `enumerate`, which counts from 0 again after a resume.
        """
        frames = self._session.engine.position.frames
        return frames[-1].completed if frames else 0

    @property
    def resumed(self) -> CheckpointInfo | None:
        """The checkpoint that this process goes on from; None if it starts from nothing.

        Before the loop starts: the one that it would go on from.
        """
        if not self._session.engine.started:
            found = self.manager.read_loop()
            return found.info if found else None
        return self._session.restores.resumed

    @property
    def finished(self) -> bool:
        """Whether the newest checkpoint is the last of a run that came to its end."""
        return self.manager.finished

    @property
    def metrics(self) -> dict[str, float]:
        """The newest value of each metric. Waits for the device if need be."""
        return self._session.metrics.latest()

    # -- loops -----------------------------------------------------------------------

    def epochs(self, n: int | None, *, name: str = "") -> Loop:
        """Epoch numbers from 0 to `n` - 1 (None: without end). Restores the state.

        The first call of `epochs`, `batches` or `range` prints where the run starts.
        """
        numbers = None if n is None else range(whole(n, "epochs"))
        return self._loop(Label("epochs", name), IndexFeed(numbers), True, sys._getframe(1))

    def range(self, *bounds: int, name: str = "", count: bool = True) -> Loop:
        """As `range(…)`: each item is a step, unless loops run inside or `count=False`."""
        feed = IndexFeed(range(*bounds))
        return self._loop(Label("range", name), feed, count, sys._getframe(1))

    def batches(
        self, *loaders: Any, name: str = "", count: bool = True, mode: Mode = "min"
    ) -> Loop:
        """The items of a loader; on resume those that follow the last completed step.

        Call it where the loop starts, once per epoch. With several loaders an item is a
        tuple of theirs: `mode="min"` ends with the shortest, `"cycle"` starts shorter
        ones again until the longest ends, `"max"` has None for those that have ended.
        """
        if not loaders:
            raise UsageError(
                "run.batches needs a loader", hint="for batch in run.batches(loader): ..."
            )
        self._check_open()
        feed = self._session.feeds.feed_for(loaders, mode)
        for loader in loaders:
            self._session.tracked.feed(loader)
        label = Label("batches", name)
        return self._loop(label, feed, count, sys._getframe(1), loaders, mode)

    def guard(self, items: Iterable[Any]) -> Guarded:
        """Iterate over `items` (an evaluation) with places to stop when a signal came.

        Nothing in it is counted or saved.
        """
        self._check_open()
        self.manager.drain()  # averaged weights may be swapped in for it
        return Guarded(self._session, items)

    @briefly
    def _loop(
        self,
        label: Label,
        feed: Any,
        count: bool,
        caller: Any,
        loaders: tuple[Any, ...] = (),
        mode: Mode = "min",
    ) -> Loop:
        self._check_open()
        if not self._warned:
            self._warned = True
            self._session.warn_untracked(caller.f_locals)
        engine = self._session.engine
        engine.start()
        origin = Origin(id(caller), caller.f_code, threading.get_ident())
        return Loop(engine, label, feed, counted=count, loaders=loaders, mode=mode, origin=origin)

    # -- saving ----------------------------------------------------------------------

    @briefly
    def log(self, **metrics: Any) -> None:
        """Record metrics of the step in progress; after a loop, of the last step.

        Takes numbers and one-element tensors, without waiting for a device. From any
        thread. They are saved with the step's checkpoint, if it gets one.
        """
        self._check_open()
        self._session.log(metrics)

    def save(self) -> None:
        """Save at the next boundary: when the step in progress is complete. From any
        thread."""
        self._check_open()
        self._session.triggers.want("asked")

    @briefly
    def finish(self) -> None:
        """The run is complete, whichever loops were left early: save it as finished."""
        self._check_open()
        self._session.finish()

    @briefly
    def close(self) -> None:
        """Flush pending saves and give the run up; without `finish`, a later start goes
        on. Raises SaveFailed if the newest save failed. May be called twice."""
        if self._closed or self._pid != os.getpid():
            return  # a forked child holds nothing
        self._closed = True
        atexit.unregister(self._at_exit)
        key = _key(self.address)
        if (reference := _open_runs.get(key)) is not None and reference() in (self, None):
            del _open_runs[key]
        try:
            self._session.close()
        except HoldfastError:
            raise
        except BaseException:
            self._closed = False  # a signal's handler: it may be called again
            raise

    def __enter__(self) -> Self:
        return self

    @briefly
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._closed:
            return
        if error is None:
            try:
                self._session.finish()
            finally:
                self.close()
            return
        try:
            self.close()
        except HoldfastError as second:
            logger.error("%s", second)  # the body's own error matters more

    def _at_exit(self) -> None:
        if self._pid != os.getpid():
            return
        try:
            self.close()
        except HoldfastError as error:
            self._session.console.loud(f"{self.address}: {error}")

    def _say(self, line: str) -> None:
        self._session.console.say(f"{self.address}: {line}")

    def _check_open(self) -> None:
        if self._closed:
            raise RunClosed(
                f"the run at {self.address} is closed",
                hint="Make a new Run: it goes on from the newest checkpoint.",
            )
        if self._pid != os.getpid():
            raise RunClosed(
                f"the run at {self.address} belongs to process {self._pid}, not to this child",
                hint="Use it in the process that made it.",
            )

    def __repr__(self) -> str:
        return f"<Run {self.address!r} at step {self.step:,}>"


def _key(address: str) -> str:
    return address if "://" in address else os.path.realpath(address)


def _close_older(key: str, address: str, console: Console) -> None:
    """A notebook cell that runs again makes a new Run while the old one is still open."""
    reference = _open_runs.pop(key, None)
    older = reference() if reference is not None else None
    if older is None or older._closed or older._pid != os.getpid():
        return
    console.say(f"{address}: closing the Run that this process opened before")
    try:
        older.close()
    except HoldfastError as error:
        console.loud(f"{address}: {error}")
