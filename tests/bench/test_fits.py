"""What is measured in the loops of frameworks, with a clock and a disk that are told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bench import fits


def test_a_save_is_measured_by_the_steps_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, written, pending = 0.0, 0, 0
    monkeypatch.setattr(fits, "time", SimpleNamespace(perf_counter=lambda: now_s))
    monkeypatch.setattr(fits, "_written", lambda: written)
    meter = fits.Meter({"every": 10, "count": 3})

    def settle() -> None:
        nonlocal written, pending, now_s
        written, pending = written + pending, 0
        now_s += 100  # nobody's time

    meter.settle = settle
    for step in range(meter.steps):
        meter.step()
        now_s += 1
        if step % 10 == 9:
            now_s += 2  # in front of the next step
            pending += 7
        if step % 10 == 0 and step:
            now_s += 0.5  # beside the save
        if step == 31:
            now_s += 50  # once, another program's
    assert meter.result() == {"lost": 2.5, "written": 7}
