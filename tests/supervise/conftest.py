"""What a test that fails has left running is ended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.supervise.programs import Supervised


@pytest.fixture(autouse=True)
def _end_supervisors() -> Iterator[None]:
    yield
    for process in Supervised.started:
        if process.poll() is None:
            process.kill()  # what it has started dies with it
            process.wait()
    Supervised.started.clear()
