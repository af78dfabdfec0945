"""`holdfast run`: start a command, watch it, and start it again.

`machine` decides, as a pure function of what happened; `shell` starts processes, waits and
sends signals. The program's side is `holdfast.manager.heartbeat`.
"""

from __future__ import annotations

from holdfast.supervise.machine import Settings as Settings
from holdfast.supervise.rules import Rules as Rules
from holdfast.supervise.shell import Outcome as Outcome
from holdfast.supervise.shell import supervise as supervise

__all__ = ["Outcome", "Rules", "Settings", "supervise"]
