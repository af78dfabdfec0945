"""What a start says about the differences from the last run, in a real program."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, "machine")
import torchvision  # a stand-in, for what no extra of ours brings
import holdfast
from holdfast.run import environment
environment._CPU_INFO = Path("machine/cpuinfo")

lr, items, stop = json.loads(sys.argv[1])
config = {"lr": lr, "seed": 1}
run = holdfast.Run("../run", every="epoch", config=config, allow_config_change=True)
run.track(weights=[0])
for epoch in run.epochs(None):
    if epoch == stop:
        run.manager.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    for item in run.batches(range(items)):
        pass
"""


class Project:
    """A script in a git repository, which is killed at an epoch and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        self.epoch = 0
        (self.folder / "machine").mkdir(parents=True)
        (self.folder / ".gitignore").write_text("machine\n")
        self.script = self.folder / "train.py"
        self.script.write_text(SCRIPT)
        self.install("0.9.1", "Xeon 8480")
        self.git("init", "-q")

    def install(self, torchvision: str, cpu: str) -> None:
        (self.folder / "machine" / "torchvision.py").write_text(f"__version__ = {torchvision!r}")
        (self.folder / "machine" / "cpuinfo").write_text(f"model name\t: {cpu}\n")

    def git(self, *words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.check_output(command, cwd=self.folder, text=True)

    def commit(self) -> str:
        self.git("add", ".")
        self.git("commit", "-qm", "x")
        return self.git("rev-parse", "HEAD")[:9]

    def edit(self, text: str) -> None:
        self.script.write_text(SCRIPT + text)

    def start(self, lr: float = 0.1, items: int = 3) -> list[str]:
        """Runs one epoch more. What it says beside the line about the checkpoint."""
        self.epoch += 1
        done = subprocess.run(
            [sys.executable, "-B", "train.py", f"[{lr}, {items}, {self.epoch}]"],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        first = "resumed ../run at step" if self.epoch > 1 else "no checkpoint in ../run"
        lines = done.stderr.splitlines()
        assert sum(line.startswith(first) for line in lines) == 1, lines
        return [line for line in lines if not line.startswith(first)]


def test_what_differs_from_the_last_run_is_said_once(tmp_path: Path) -> None:
    project = Project(tmp_path)
    one = project.commit()
    assert project.start() == []
    assert project.start() == []

    project.edit("# a comment")
    assert project.start() == [f"since the last run: code {one} -> {one} (edited)"]
    assert project.start() == []
    project.edit("# another comment")
    assert project.start() == [
        f"since the last run: code {one} (edited) -> {one} (edited otherwise)"
    ]
    two = project.commit()
    assert project.start() == [f"since the last run: code {one} (edited) -> {two}"]

    project.install("0.10.0", "EPYC 9654")
    assert project.start() == [
        "since the last run: cpu Xeon 8480 -> EPYC 9654; torchvision 0.9.1 -> 0.10.0"
    ]
    assert project.start(lr=0.2) == ["config changed since the last run: lr: 0.1 -> 0.2"]
    said = project.start(lr=0.2, items=5)
    assert "batches: 5 items in an epoch, 3 before" in said
    assert project.start(lr=0.2, items=5) == []
