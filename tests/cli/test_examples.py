"""The examples of `--help` and of the page are true: each is run on the fixed runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.cli import cli
from holdfast.errors import DIFFERENT
from tests.cli.conftest import Command
from tests.cli.named import make
from tests.cli.world import ROOT

PAGE = ROOT / "docs" / "cli.md"


def examples() -> list[str]:
    """Every `holdfast` line of the help texts and of the page's console blocks, once each."""
    found: list[str] = []
    for name, command in cli.commands.items():
        lines = re.findall(r"^  (holdfast .*)$", command.epilog or "", re.MULTILINE)
        assert lines, f"{name} --help has no example"
        found += lines
    found += re.findall(r"^\$ (holdfast .*)$", PAGE.read_text(), re.MULTILINE)
    return list(dict.fromkeys(line.partition("  #")[0].rstrip() for line in found))


@pytest.fixture(scope="session")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("named")
    make(folder)
    return folder


@pytest.mark.parametrize("line", examples())
def test_example(
    line: str,
    here: Path,
    named: Path,
    holdfast_cli: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(named, here, dirs_exist_ok=True)
    # `python` in an example is the one that runs this.
    monkeypatch.setenv(
        "PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    words = shlex.split(line)[1:]
    if words[0] == "run":  # in a process of its own, whose orphans it adopts
        ran = subprocess.run([sys.executable, "-m", "holdfast", *words], stderr=subprocess.PIPE)
        assert ran.returncode == 0, ran.stderr
        assert ran.stderr.startswith(b"holdfast run: attempt 1 began"), ran.stderr
        return
    if words[0] in ("export", "average"):
        (here / "model.safetensors").unlink()  # they write one
    done = holdfast_cli(*words)
    differs = line.startswith("holdfast diff")  # its examples compare what is not the same
    assert (done.status, done.err) == (DIFFERENT if differs else 0, ""), done
    assert done.out
