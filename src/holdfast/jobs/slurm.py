"""A batch script for Slurm, in which signals reach the training and which comes again."""

from __future__ import annotations

import shlex

from holdfast.jobs.job import PORT, Job


def slurm_script(job: Job, *, partition: str = "", array: str = "") -> str:
    """The script, to be given to `sbatch`. `partition` and `array` must have been checked.

    Comments have lines of their own: not every version of Slurm takes them behind an option.
    """
    lines = ["#!/bin/bash", f"#SBATCH --job-name={job.name}"]
    if partition:
        lines.append(f"#SBATCH --partition={partition}")
    lines += [
        f"#SBATCH --nodes={job.nodes}",
        "# One `holdfast run` on each node: what it runs starts processes for the GPUs there.",
        "#SBATCH --ntasks-per-node=1",
    ]
    if job.gpus:
        lines.append(f"#SBATCH --gpus-per-node={job.gpus}")
    if job.time_s is not None:
        lines.append(f"#SBATCH --time={time_limit(job.time_s)}")
    if array:
        lines += ["# Each task of the array has a run of its own.", f"#SBATCH --array={array}"]
    lines += [
        "# Slurm may put the job back into its queue: when it preempts it, or a node fails.",
        "#SBATCH --requeue",
        "# So many seconds before the time limit: save, and end. Without B: it goes to the steps.",
        f"#SBATCH --signal=USR1@{job.grace_s}",
        "# When the job comes again its log goes on.",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output=%x-{'%A_%a' if array else '%j'}.out",
        "",
    ]
    lines += _meeting(job)
    doctor = " ".join(["holdfast doctor", *([bash_word(job.run)] if job.run else [])])
    command = " ".join(map(bash_word, job.command))
    return "\n".join(
        [
            *lines,
            "# Writes into the log what would lose work here.",
            f"srun --nodes=1 --ntasks=1 {doctor} || true",
            "",
            "# A step, since signals go to steps; `exec`, so that no shell keeps one of them.",
            "# --requeue: after a save for the time limit the job goes back into the queue.",
            f"exec srun holdfast run --requeue --grace {job.grace_s}s -- {command}",
            "",
        ]
    )


def bash_word(text: str) -> str:
    r"""`text` as one word of bash, in one printable line: Slurm refuses a script in which a
    line ends as in DOS, and a terminal would obey what else is in it.

    >>> print(bash_word("it's"), bash_word("a\n\x1b[1mb"))
    'it'"'"'s' $'a\n\x1b[1mb'
    """
    if text.isprintable():
        return shlex.quote(text)
    return f"$'{''.join(_escaped(char) for char in text)}'"


def _escaped(char: str) -> str:
    if char in "\\'":
        return f"\\{char}"
    if char == "\n":
        return r"\n"
    return char if char.isprintable() else "".join(f"\\x{byte:02x}" for byte in char.encode())


def time_limit(seconds: float) -> str:
    """As Slurm writes it, in whole minutes, of which it counts.

    >>> time_limit(86400 + 3600 + 61), time_limit(90)
    ('1-01:02:00', '0-00:02:00')
    """
    minutes = max(1, int(-(-seconds // 60)))
    return f"{minutes // 1440}-{minutes % 1440 // 60:02}:{minutes % 60:02}:00"


def _meeting(job: Job) -> list[str]:
    """torchrun takes what no option says from these variables."""
    if not job.torchrun:
        return []
    lines = [f"export PET_NPROC_PER_NODE={job.gpus or 1}"]
    if job.nodes > 1:
        lines += [
            "# The processes of all nodes meet on the first one.",
            'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "export PET_NNODES=$SLURM_NNODES PET_RDZV_BACKEND=c10d PET_RDZV_ID=$SLURM_JOB_ID",
            f"export PET_RDZV_ENDPOINT=$first:$(({PORT} + SLURM_JOB_ID % 1000))",
        ]
    return [*lines, ""]
