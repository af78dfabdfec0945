"""What a run says about variables that change and are not saved."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

import numpy as np
import pytest

import holdfast
from tests.support.jobs import fresh_address

_LINE = re.compile(r"changed since the loop began and in no checkpoint: (.*); run\.track")


def told(script: str, capfd: pytest.CaptureFixture[str], **names: Any) -> list[str]:
    """What the script's run names. It calls `Run()`, at an address of its own."""
    address = fresh_address()

    def make(**settings: Any) -> holdfast.Run:
        return holdfast.Run(address, **{"every": 3, **settings})

    scope = {"__name__": "script", "np": np, "Run": make, **names}
    exec(compile(dedent(script), "script.py", "exec"), scope)
    lines = _LINE.findall(capfd.readouterr().err)
    assert len(lines) <= 1, "it is said once"
    return re.findall(r"[^,(]+\([^)]*\)|\d+ more", lines[0].replace("), ", ")")) if lines else []
