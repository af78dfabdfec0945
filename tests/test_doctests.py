"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parent.parent / "src"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def module_names() -> list[str]:
    """Modules with an example that can run. Those without are not even imported."""
    example = re.compile(r"^ *>>> (?!.*\+SKIP)", re.MULTILINE)
    paths = [p for p in SOURCES.rglob("*.py") if example.search(p.read_text())]
    return sorted(".".join(p.relative_to(SOURCES).with_suffix("").parts) for p in paths)


@pytest.mark.parametrize("name", module_names())
def test_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name.removesuffix(".__init__"))
    found = doctest.testmod(module, optionflags=FLAGS)
    assert found.failed == 0
    assert found.attempted > 0
