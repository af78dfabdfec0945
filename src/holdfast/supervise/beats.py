"""What the processes of an attempt have told: their heartbeats, read from their files."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from holdfast.core.process import pid_exists
from holdfast.manager.heartbeat import LOOP_PHASES, RECORD_BYTES, Beat
from holdfast.supervise.machine import Begun, Life
from holdfast.supervise.processes import look


class Beats:
    """The heartbeats in one folder. A process has a file of its own, so that each rank of a
    `torchrun` is seen: a hang is when none of them gives a sign of life any more, since where
    one hangs the others come to wait for it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: dict[str, Beat] = {}

    def read(self) -> Life:
        """What they told until now."""
        for path in self._folder.glob("*.beat"):
            # One that is being written or has just been made is read the next time.
            with contextlib.suppress(OSError, msgspec.DecodeError), path.open("rb") as file:
                self._last[path.name] = msgspec.json.decode(file.read(RECORD_BYTES), type=Beat)
        if not self._last:
            return Life()
        beats = list(self._last.values())
        steps: dict[str, int] = {}
        for beat in beats:
            if beat.checkpoint_step is not None:
                known = steps.get(beat.address, beat.checkpoint_step)
                steps[beat.address] = max(known, beat.checkpoint_step)
        ahead = max(beats, key=lambda beat: beat.step)
        # Where `torchrun` has started others after them, those have not been asked to stop.
        newest_s = max(beat.began_s for beat in beats)
        left = [beat for beat in beats if beat.left and beat.left_s >= newest_s]
        return Life(
            beats=sum(beat.count for beat in beats),
            in_loop=any(beat.phase in LOOP_PHASES and _lives(beat.pid) for beat in beats),
            address=ahead.address,
            phase=ahead.phase,
            step=ahead.step,
            checkpoints=tuple(sorted(steps.items())),
            began=tuple(
                Begun(beat.address, beat.pid, beat.step, beat.phase not in LOOP_PHASES)
                for beat in beats
                if beat.phase not in ("starting", "restoring")
            ),
            left=max((beat.left for beat in left), default=0),
            notice=max((beat.notice for beat in left), default=""),
        )

    def pids(self) -> list[int]:
        """Of the processes that have told anything."""
        return [beat.pid for beat in self._last.values()]


def _lives(pid: int) -> bool:
    process = look(pid)
    return pid_exists(pid) if process is None else process.state not in "ZX"
