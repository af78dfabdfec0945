"""Builds Holdfast's wheel, and environments that it is installed in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def copy_of_sources(into: Path) -> Path:
    """What a build needs, in a folder of its own: a build writes beside its sources, where
    other tests look."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, into)
    unwanted = shutil.ignore_patterns("*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", into / "src", ignore=unwanted)
    return into


def build_wheel(sources: Path, into: Path) -> Path:
    """The one wheel in the folder `into` afterwards."""
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(into), str(sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = into.glob("*.whl")
    return path


@dataclass(frozen=True)
class Environment:
    """A virtual environment. Nothing of the one that runs the tests can be imported there."""

    home: Path

    @classmethod
    def new(cls, home: Path) -> Environment:
        venv.create(home)
        return cls(home)

    @property
    def python(self) -> str:
        return str(self.home / "bin" / "python")

    def install(self, *what: str) -> None:
        """`pip install`, with the versions that the tests run with. By the pip that there is: to
        put one into an environment takes seconds."""
        pip = [sys.executable, "-m", "pip", "--python", self.python]
        options = ["--quiet", "--disable-pip-version-check"]
        constraints = ["--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([*pip, "install", *options, *constraints, *what], check=True)

    def run(self, *arguments: str, cwd: Path, **variables: str) -> str:
        """`python arguments…`; what it printed. Fails if it does."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "METAFLOW"))}
        done = subprocess.run(
            [self.python, *arguments],
            cwd=cwd,
            env={**kept, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout
