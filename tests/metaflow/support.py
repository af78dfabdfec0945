"""Runs flows with a Metaflow of their own: nothing of the machine's is read or changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.metaflow.origins import origins_of
from holdfast.metaflow.places import Root

FLOWS = Path(__file__).parent / "flows"
_SECONDS = 120


@dataclass
class Ran:
    """What one command of Metaflow's did."""

    status: int
    output: str
    """What it has printed, both streams."""


@dataclass
class Metaflow:
    """A folder that flows run in. `told` is what their steps have written down for the test."""

    folder: Path
    datastore: Sequence[str] = ()
    """Options that choose another than the folder's own."""
    variables: dict[str, str] = field(default_factory=dict)
    bucket: Root | None = None
    """The datastore's root, if it is not in the folder."""

    def run(self, flow: str, *command: str, status: int | None = 0, **variables: str) -> Ran:
        """`python flow.py command…`, "run" without a command. Fails if it ends with another
        status; None: any."""
        process = self.start(flow, *command, **variables)
        output, _ = process.communicate(timeout=_SECONDS)
        if status is not None:
            assert process.returncode == status, output[-6000:]
        return Ran(process.returncode, output)

    def start(self, flow: str, *command: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                *(sys.executable, "-u", str(FLOWS / f"{flow}.py"), "--no-pylint"),
                *(*self.datastore, *(command or ("run",))),
            ],
            cwd=self.folder,
            env={**self.environment(), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that a test can end all of it
        )

    def environment(self) -> dict[str, str]:
        kept = ("HOME", "LANG", "AWS_", "COVERAGE", "HOLDFAST_NOTICES")
        self.temporary.mkdir(exist_ok=True)
        return {
            **{k: v for k, v in os.environ.items() if k.startswith(kept)},
            # Metaflow starts the nodes of a step with the first `python` there.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "METAFLOW_USER": "tester",
            "METAFLOW_HOME": str(self.folder / "settings"),
            "METAFLOW_DEFAULT_METADATA": "local",
            "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(self.folder),
            "TMPDIR": str(self.temporary),
            "TOLD": str(self.folder / "told"),
            **self.variables,
        }

    def origins(self, flow: str) -> dict[str, str]:
        """Which runs were resumes, and of which, as the datastore has it."""
        return origins_of(self.bucket or Root(str(self.folder / ".metaflow")), flow)

    @property
    def temporary(self) -> Path:
        """The folder for temporary files that the flows have."""
        return self.folder / "tmp"

    @property
    def told(self) -> list[dict[str, Any]]:
        """What `tell` of the flows was given, in the order of time."""
        path = self.folder / "told"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def forget(self) -> None:
        """Begin anew with what is told."""
        (self.folder / "told").unlink(missing_ok=True)
