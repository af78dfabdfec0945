"""`holdfast init`: where the file goes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Command, failed

SLURM = ("init", "slurm")
K8S = ("init", "k8s", "--image", "a/b:1")
TRAIN = ("--", "python", "train.py", "--json")


def test_it_prints_or_writes_the_same(tmp_path: Path, holdfast_cli: Command) -> None:
    file = tmp_path / "job.sh"
    text = holdfast_cli(*SLURM, *TRAIN).out
    assert text.endswith("-- python train.py --json\n")
    done = holdfast_cli(*SLURM, "-o", file, *TRAIN)
    assert (done.status, done.out) == (0, f"Wrote {file}. Start it with: sbatch {file}\n")
    assert file.read_text() == text
    value = holdfast_cli(*SLURM, "--json", *TRAIN).json
    assert value == {"ok": True, "kind": "slurm", "file": None, "text": text}


def test_nothing_is_overwritten_without_force(tmp_path: Path, holdfast_cli: Command) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("mine")
    assert "exists" in failed(holdfast_cli(*K8S, "-o", file, *TRAIN), 2)
    assert file.read_text() == "mine"
    assert holdfast_cli(*K8S, "-o", file, "--force", *TRAIN).status == 0
    assert file.read_text() == holdfast_cli(*K8S, *TRAIN).out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("init", "slurm"), "Missing argument 'COMMAND...'"),
        (("init", "pbs", *TRAIN), "'pbs' is not one of 'slurm', 'k8s'"),
        (("init", "k8s", *TRAIN), "k8s needs --image"),
        ((*SLURM, "--image", "a", *TRAIN), "--image is for k8s"),
        ((*SLURM, "--service-account", "a", *TRAIN), "--service-account is for k8s"),
        ((*K8S, "--array", "1", *TRAIN), "--array is for slurm"),
        ((*SLURM, "--time", "1m", *TRAIN), "--time: "),
        ((*SLURM, "--grace", "x", *TRAIN), "--grace: "),
        ((*SLURM, "--name", "a b", *TRAIN), "bad name: 'a b'"),
        ((*SLURM, "--partition", "a\n#SBATCH --x", *TRAIN), "bad partition"),
        ((*SLURM, "--array", "x", *TRAIN), "bad array"),
        ((*K8S, "--storage", "1 GB", *TRAIN), "bad storage"),
        ((*K8S, "--claim", "a/b", *TRAIN), "bad claim"),
        ((*K8S, "--run", "runs/x", *TRAIN), "a pod cannot keep a run"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], says: str, holdfast_cli: Command) -> None:
    assert says in failed(holdfast_cli(*words), 2)


def test_its_errors_as_json(holdfast_cli: Command) -> None:
    done = holdfast_cli("init", "slurm", "--json", "--name", "a b", *TRAIN)
    assert done.status == done.json["exit_code"] == 2
    assert done.json["error"] == "bad name: 'a b'"
