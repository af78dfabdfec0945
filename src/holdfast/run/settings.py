"""How a run behaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.core.group import Group
from holdfast.core.schedule import Schedule


@dataclass(frozen=True)
class Settings:
    """How a run behaves; the arguments of `Run` of the same names."""

    config: Any = None
    allow_config_change: bool = False
    on_finish: str | None = None
    """As a retention policy that `prune` takes."""
    late: tuple[str, ...] = ()
    override: tuple[str, ...] = ()
    rename: Mapping[str, str] | None = None
    strict: bool = True
    allow_pickle: bool = False
    exit_code: int = 75
    """Of a process that was asked to stop."""
    grace_s: float | None = None
    """For how long it may live after a signal; None if nobody said."""
    group: Group | bool | None = None
    """The ranks that train together; None: those that a framework has connected, False: none."""
    hold: Schedule | None = None
    """When to keep a copy of the state in memory."""
