"""Putting this batch job into Slurm's queue again."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

_TIMEOUT_S = 60.0


def job_of(environment: Mapping[str, str]) -> str:
    """The name of this job, or of this task of a job array; "" outside of Slurm, and in all
    tasks of a step but its first: a job is put into the queue once.

    >>> job_of({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"})
    '7_2'
    """
    if environment.get("SLURM_PROCID", "0") != "0":
        return ""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return environment.get("SLURM_JOB_ID", "")


def requeue(job: str) -> str:
    """Ask Slurm for it; what is to be said about it. Never raises."""
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"job {job} could not be requeued: {error}"
    if done.returncode:
        return f"job {job} could not be requeued: {done.stdout.strip() or done.returncode}"
    return f"job {job} is in the queue again"
