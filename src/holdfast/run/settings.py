"""How a run behaves, and a save that it made: the values a `Session` works with."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.errors import HoldfastError


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


@dataclass
class Saved:
    """A save of this process, or the checkpoint that it resumed."""

    ticks: int
    """Bodies that were completed when it was taken."""
    pending: Any = None
    info: Any = None

    def done(self) -> bool:
        return self.info is not None or self.pending.done()

    def checkpoint(self) -> Any | None:
        """The checkpoint; None if the save failed. Waits for it."""
        if self.info is None:
            with contextlib.suppress(HoldfastError, OSError):
                self.info = self.pending.result()
        return self.info
