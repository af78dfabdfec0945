"""Mirrors in tests: failures are tried again at once, and nothing waits for long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.manager import mirror
from tests.mirror.support import Line


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(mirror, "LONGEST_RETRY_S", 0.02)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Line]]:
    """`lines(address)`: the link to the mirror there, which tests can cut."""
    open_store, made = mirror.open_store, dict[str, Line]()

    def line(address: str) -> Line:
        return made.setdefault(address, Line(open_store(address)))

    def opened(address: str) -> object:
        return made.get(address) or open_store(address)

    monkeypatch.setattr(mirror, "open_store", opened)
    yield line
    for each in made.values():
        each.mend()


@pytest.fixture(params=["folder", "memory"])
def there(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "mirror")
    return f"memory://{tmp_path.parent.name}-{tmp_path.name}"
