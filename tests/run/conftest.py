"""Runs that a test abandons, as a killed process would, are put away after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import holdfast.run.run as runs
from holdfast.errors import HoldfastError


@pytest.fixture(autouse=True)
def put_away_open_runs() -> Iterator[None]:
    yield
    for reference in list(runs._open_runs.values()):
        run = reference()
        if run is not None:
            try:
                run.close()
            except HoldfastError:
                pass  # the test was about a save that failed
