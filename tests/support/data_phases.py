"""Loaders with generators, and scripts that are stopped in each of their steps."""

from __future__ import annotations

import functools
import os
import signal
from typing import Any

import torch
from torch.utils.data import DataLoader

import holdfast
from tests.support.jobs import Script, fresh_address, kill_everywhere, process


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loader(n: int, generator: torch.Generator, **options: Any) -> DataLoader[Any]:
    return DataLoader(range(n), 2, shuffle=True, generator=generator, **options)  # type: ignore[arg-type]


def hidden(n: int) -> Any:
    """Makes a loader, once, that no variable reaches."""
    return functools.cache(lambda: loader(n, seeded()))


def stop() -> None:
    """A preemption in a body, where the run sees it."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        os.kill(os.getpid(), signal.SIGTERM)


def stop_everywhere(script: Script) -> None:
    """Preempt the script in each of its steps, every time it is started, until it ends."""
    whole: list[Any] = []
    with process():
        script(fresh_address(), lambda: None, whole)  # type: ignore[arg-type]
    address, starts, trace = fresh_address(), 0, list[Any]()
    for starts in range(1, 200):
        trace = []
        try:
            with process(starts):
                script(address, stop, trace)  # type: ignore[arg-type]
            break
        except SystemExit:
            continue
    assert trace == whole
    assert starts > 3


def check(script: Script) -> None:
    kill_everywhere(script)
    stop_everywhere(script)


def open_run(address: str, trace: list[Any]) -> holdfast.Run:
    return holdfast.Run(address, every=1, quiet=True).track(trace=trace)
