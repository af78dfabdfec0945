"""`holdfast init`: job files that are what they say, whatever the words in them are."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.cli import main
from holdfast.errors import UsageError
from holdfast.jobs.job import (
    Job,
    check_array,
    check_image,
    check_name,
    check_storage,
    check_word,
    name_of,
)
from holdfast.jobs.kubernetes import kubernetes_manifest
from holdfast.jobs.slurm import slurm_script, time_limit

WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
NASTY = st.sampled_from(
    [
        "it's",
        '"',
        "$(HOME)",
        "$$",
        "a\nb",
        "\n#SBATCH --x",
        "---\n",
        "`id`",
        "\\",
        "",
        " ",
        "é😀\x85",
    ]
)
COMMANDS = st.lists(WORDS | NASTY, min_size=1, max_size=6).map(tuple)


def job(*command: str, **more: Any) -> Job:
    return Job(command or ("python", "train.py"), **{"name": "train", **more})


# -- Slurm ------------------------------------------------------------------------


def directives(script: str) -> list[str]:
    """As Slurm reads them: up to the first line that is neither blank nor a comment."""
    found: list[str] = []
    for line in script.split("\n"):
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            found.append(line.removeprefix("#SBATCH "))
    return found


def test_a_slurm_script() -> None:
    script = slurm_script(
        job(time_s=90_000.0, nodes=2, gpus=4, grace_s=120), partition="a100", array="0-9%4"
    )
    assert directives(script) == [
        "--job-name=train",
        "--partition=a100",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=4",
        "--time=1-01:00:00",
        "--array=0-9%4",
        "--requeue",
        "--signal=USR1@120",
        "--open-mode=append",
        "--output=%x-%A_%a.out",
    ]
    last = script.splitlines()[-1]
    assert last == "exec srun holdfast run --requeue --grace 120s -- python train.py"


# One process for many scripts: a shell takes milliseconds to start.
@settings(max_examples=25, deadline=None)
@given(COMMANDS, WORDS)
def test_whatever_the_command_is_slurm_gets_it(command: tuple[str, ...], run: str) -> None:
    script = slurm_script(Job(command, name="train", run=run))
    assert len(directives(script)) == 7
    assert all(line.isprintable() for line in script.split("\n"))
    show = 'srun() { printf "%s\\0" "$@"; }; exec() { "$@"; }\n'
    done = subprocess.run(["bash", "-c", show + script], capture_output=True, check=True)
    assert done.stderr == b""
    words = done.stdout.decode().split("\0")[:-1]
    first, second = words[: words.index("run") - 1], words[words.index("run") - 1 :]
    assert first == ["--nodes=1", "--ntasks=1", "holdfast", "doctor", *([run] if run else [])]
    assert second == ["holdfast", "run", "--requeue", "--grace", "90s", "--", *command]


FAKE_SRUN = """\
#!/bin/bash
while [[ $1 == --* ]]; do shift; done
[[ $2 == doctor ]] && { echo "$@" >> doctor.log; exit 1; }
export SLURM_PROCID=0 SLURM_STEP_ID=0
exec "$@"
"""
FAKE_SCONTROL = """\
#!/bin/bash
if [[ $1 == show ]]; then echo node-1; echo node-2; else echo "$@" >> scontrol.log; fi
"""
TRAIN = """\
import os, pathlib, sys, time
import holdfast
with holdfast.Run("run") as run:
    for step in run.range(3):
        met = os.environ.get("PET_RDZV_ENDPOINT", "") + str(sys.argv[1:])
        pathlib.Path(f"step-{step}").write_text(met)
        while step == 1 and not pathlib.Path("go-on").exists():
            time.sleep(0.02)
"""


@pytest.mark.parametrize("array", [pytest.param("", marks=pytest.mark.slow), "0-3"])
def test_the_script_passes_the_signal_on_and_queues_again(tmp_path: Path, array: str) -> None:
    """Slurm's signal, to the step as to the batch script, comes to the training; when that
    has saved, the job goes back into the queue."""
    tools = tmp_path / "tools"
    tools.mkdir()
    holdfast = f'#!/bin/bash\nexec {sys.executable} -m holdfast "$@"\n'
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL), ("holdfast", holdfast)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    # By its name a torchrun, which gets its meeting point from the environment.
    (tools / "torchrun").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (tools / "torchrun").chmod(0o755)
    (tmp_path / "train.py").write_text(TRAIN)
    script = slurm_script(job("torchrun", "train.py", "it's", nodes=2), array=array)
    (tmp_path / "job.sh").write_text(script)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "1007",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node-[1-2]",
        **({"SLURM_ARRAY_JOB_ID": "1000", "SLURM_ARRAY_TASK_ID": "2"} if array else {}),
    }
    said = tmp_path / "said"
    with (
        said.open("w") as errors,
        subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment, stderr=errors) as batch,
    ):
        try:
            until(lambda: (tmp_path / "step-1").exists())
            batch.send_signal(signal.SIGUSR1)
            until(lambda: "SIGUSR1: finishing this step, then saving" in said.read_text())
            (tmp_path / "go-on").touch()
            assert batch.wait(timeout=60) == 75, said.read_text()
        finally:
            batch.kill()
    assert (tmp_path / "step-1").read_text() == 'node-1:29507["it\'s"]'
    queued = "1000_2" if array else "1007"
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {queued}\n"
    assert (tmp_path / "doctor.log").read_text() == "holdfast doctor\n"
    # As Slurm does it, when the job's turn comes again.
    again = ["bash", "job.sh"]
    assert subprocess.run(again, cwd=tmp_path, env=environment, timeout=60).returncode == 0
    assert (tmp_path / "step-2").exists()
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {queued}\n", "it is done"


def until(true: Any) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- Kubernetes -------------------------------------------------------------------


def expanded(word: str) -> str:
    """What Kubernetes makes of a word of `command`: `$$` is `$`, `$(NAME)` a variable."""
    text, i = "", 0
    while i < len(word):
        if word[i] == "$" and word[i + 1 : i + 2] == "$":
            i += 1
        else:
            assert word[i : i + 2] != "$(", f"a variable in {word!r}"
        text += word[i]
        i += 1
    return text


def documents(text: str) -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all(text)}


@settings(max_examples=80, deadline=None)
@given(COMMANDS, WORDS)
def test_whatever_the_command_is_kubernetes_gets_it(command: tuple[str, ...], run: str) -> None:
    made = Job(command, name="train", run=f"/runs/{run}x")
    text = kubernetes_manifest(made, image="a/b:1")
    assert text.isascii()
    pod = documents(text)["Job"]["spec"]["template"]["spec"]
    words = [expanded(word) for word in pod["containers"][0]["command"]]
    assert words == ["holdfast", "run", "--grace", "80s", "--", *command]


def test_a_manifest() -> None:
    """The names are those of the API: batch/v1 Job, v1 PersistentVolumeClaim."""
    text = kubernetes_manifest(
        job("torchrun", "train.py", run="/data/runs/gpt", time_s=3600.0, gpus=8), image="a/b:1"
    )
    found = documents(text)
    assert found["PersistentVolumeClaim"] == {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "train-runs"},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "100Gi"}},
        },
    }
    assert found["Job"] == {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "train"},
        "spec": {
            "activeDeadlineSeconds": 3600,
            "backoffLimit": 3,
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "Ignore",
                        "onExitCodes": {"containerName": "train", "operator": "In", "values": [75]},
                    },
                    {
                        "action": "Ignore",
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    },
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": "train",
                            "operator": "In",
                            "values": [2, 126, 127],
                        },
                    },
                ]
            },
            "podReplacementPolicy": "Failed",
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": 90,
                    "containers": [
                        {
                            "name": "train",
                            "image": "a/b:1",
                            "command": [
                                *("holdfast", "run", "--grace", "80s", "--"),
                                *("torchrun", "train.py"),
                            ],
                            "env": [
                                {"name": "HOLDFAST_GRACE", "value": "80s"},
                                {"name": "PET_NPROC_PER_NODE", "value": "8"},
                            ],
                            "resources": {"limits": {"nvidia.com/gpu": 8}},
                            "volumeMounts": [{"name": "runs", "mountPath": "/data/runs"}],
                        }
                    ],
                    "volumes": [
                        {"name": "runs", "persistentVolumeClaim": {"claimName": "train-runs"}}
                    ],
                }
            },
        },
    }


def test_several_nodes_and_a_claim_that_is_there() -> None:
    text = kubernetes_manifest(job("torchrun", "x.py", nodes=4), image="a", claim="mine")
    found = documents(text)
    assert set(found) == {"Service", "Job"}
    assert found["Service"]["spec"]["clusterIP"] == "None"
    assert found["Service"]["spec"]["selector"] == {"batch.kubernetes.io/job-name": "train"}
    spec = found["Job"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == "train"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "mine"
    variables = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
    assert variables["PET_RDZV_ENDPOINT"] == "train-0.train:29500"
    assert variables["PET_NNODES"] == "4"


def test_a_run_in_a_bucket_needs_no_volume() -> None:
    text = kubernetes_manifest(job(run="s3://bucket/gpt"), image="a", account="trainer")
    found = documents(text)
    assert set(found) == {"Job"}
    pod = found["Job"]["spec"]["template"]["spec"]
    assert "volumes" not in pod
    assert "volumeMounts" not in pod["containers"][0]
    assert pod["serviceAccountName"] == "trainer"


@pytest.mark.parametrize("run", ["runs/gpt", "/gpt", "memory://x"])
def test_runs_that_no_pod_can_keep(run: str) -> None:
    with pytest.raises(UsageError, match="a pod cannot keep a run"):
        kubernetes_manifest(job(run=run), image="a")


# -- the page ---------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clusters.md"
SHOWN = re.compile(r"(<!-- shown: ([^\n]*) -->\n```\w+\n)(.*?)(```\n)", re.DOTALL)


def test_the_page_shows_what_is_printed(
    capsys: pytest.CaptureFixture[str], pytestconfig: pytest.Config
) -> None:
    """`--snapshot-update` writes it anew."""

    def printed(match: re.Match[str]) -> str:
        assert main(["init", *shlex.split(match[2])]) == 0
        return match[1] + capsys.readouterr().out + match[4]

    text = PAGE.read_text()
    page, count = SHOWN.subn(printed, text)
    assert count == 2
    if pytestconfig.getoption("update_snapshots"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page


# -- words ------------------------------------------------------------------------


@given(WORDS.filter(bool) | NASTY.filter(bool))
@settings(deadline=None)
def test_a_word_in_a_file_stays_one(text: str) -> None:
    for check in (check_array, check_image, check_storage):
        try:
            assert check(text) == text
        except UsageError:
            continue
        assert not set(text) & set("\n\r\t \"'#\\`$\x85\u2028")
    for name in (check_name, check_word):
        try:
            assert name(text, "name") == text
        except UsageError:
            continue
        assert not set(text) & set("\n\r\t \"'#\\`$\x85\u2028")


@given(st.lists(WORDS | NASTY, min_size=1).map(tuple))
def test_every_command_gives_a_name(command: tuple[str, ...]) -> None:
    assert Job(command, name=name_of(command)).name


@pytest.mark.parametrize(
    "make",
    [
        lambda: Job((), name="x"),
        lambda: Job(("a\0b",), name="x"),
        lambda: Job(("\udcff",), name="x"),
        lambda: Job(("a",), name="x", run="\udcff"),
        lambda: Job(("a",), name="Train"),
        lambda: Job(("a",), name="a\nb"),
        lambda: Job(("a",), name="a" * 64),
        lambda: check_storage("0Gi"),
        lambda: check_array("1-"),
    ],
)
def test_what_no_file_can_hold_is_refused(make: Any) -> None:
    with pytest.raises(UsageError) as refused:
        make()
    assert refused.value.hint


@pytest.mark.parametrize("seconds", [1, 59, 60, 61, 3599, 86_400, 10**6])
def test_a_time_limit_is_never_shorter(seconds: int) -> None:
    days, _, rest = time_limit(seconds).partition("-")
    hours, minutes, _ = rest.split(":")
    given = ((int(days) * 24 + int(hours)) * 60 + int(minutes)) * 60
    assert 0 <= given - seconds < 60
    assert (int(hours) < 24, int(minutes) < 60) == (True, True)
