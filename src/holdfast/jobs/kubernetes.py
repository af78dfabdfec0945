"""A Job for Kubernetes whose pods get SIGTERM, have time to save, and come again."""

from __future__ import annotations

import json
import posixpath
import re

from holdfast.errors import UsageError
from holdfast.jobs.job import PORT, STORAGE, Job

_BUCKET = re.compile(r"(?:s3|gs|az)://")
_MOUNT = "/runs"
_AFTER_S = 10  # for what `holdfast run` does between its SIGKILL and its end


def kubernetes_manifest(
    job: Job, *, image: str, storage: str = STORAGE, claim: str = "", account: str = ""
) -> str:
    """The manifest, to be given to `kubectl apply -f`. All words but those of `job` must have
    been checked. `claim` names a volume that is there already; else one of `storage` is asked
    for, where the run is in no bucket. Raises UsageError for a run that no pod can find."""
    mount = _mount_of(job.run)
    parts: list[str] = []
    if mount and not claim:
        claim = f"{job.name}-runs"[-63:].lstrip("-")
        parts.append(_claim(claim, storage, many=job.nodes > 1))
    if job.nodes > 1:
        parts.append(_service(job))
    parts.append(_job(job, image, mount, claim if mount else "", account))
    return "---\n".join(parts)


def quoted(text: str) -> str:
    r"""`text` as YAML has it. A JSON string is one, but for what lies beyond 16 bits.

    >>> print(quoted('a "b" \n 😀'))
    "a \"b\" \n \U0001f600"
    """
    parts = re.split("([\U00010000-\U0010ffff])", text)
    escaped = (
        f"\\U{ord(part):08x}" if i % 2 else json.dumps(part)[1:-1].replace("\x7f", "\\u007f")
        for i, part in enumerate(parts)
    )
    return f'"{"".join(escaped)}"'


def argument(text: str) -> str:
    """`text` as a word of `command`, in which Kubernetes would replace `$(NAME)`.

    >>> print(argument("$(HOME) $$"))
    "$$(HOME) $$$$"
    """
    return quoted(text.replace("$", "$$"))


def _mount_of(run: str) -> str:
    """Where a volume is mounted for a run at this address; "" for one in a bucket."""
    if not run:
        return _MOUNT
    if _BUCKET.match(run):
        return ""
    folder = posixpath.dirname(posixpath.normpath(run))
    if not run.startswith("/") or folder == "/":
        raise UsageError(
            f"a pod cannot keep a run at {run!r}",
            hint="A folder in a volume, as /runs/mnist, or a bucket: s3://bucket/mnist",
        )
    return folder


def _claim(name: str, storage: str, *, many: bool) -> str:
    mode = "ReadWriteMany" if many else "ReadWriteOnce"
    return f"""\
# Outlives the pods, and the Job.
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {quoted(name)}
spec:
  accessModes: [{quoted(mode)}]
  resources:
    requests:
      storage: {quoted(storage)}
"""


def _service(job: Job) -> str:
    return f"""\
# Names for the pods: {job.name}-0.{job.name} is where their processes meet.
apiVersion: v1
kind: Service
metadata:
  name: {quoted(job.name)}
spec:
  clusterIP: "None"
  publishNotReadyAddresses: true
  selector:
    batch.kubernetes.io/job-name: {quoted(job.name)}
"""


def _job(job: Job, image: str, mount: str, claim: str, account: str) -> str:
    name = quoted(job.name)
    # Its own SIGKILL comes first, so that it ends in order.
    grace = f"{max(1, job.grace_s - _AFTER_S)}s"
    words = ["holdfast", "run", "--grace", grace, "--", *job.command]
    lines = [
        "apiVersion: batch/v1",
        "kind: Job",
        "metadata:",
        f"  name: {name}",
        "spec:",
    ]
    if job.nodes > 1:
        lines += [
            "  # A pod for each node, each with its number in JOB_COMPLETION_INDEX.",
            '  completionMode: "Indexed"',
            f"  completions: {job.nodes}",
            f"  parallelism: {job.nodes}",
        ]
    if job.time_s is not None:
        lines += [
            "  # Of all pods together; then they get SIGTERM.",
            f"  activeDeadlineSeconds: {max(1, round(job.time_s))}",
        ]
    lines += [
        "  # `holdfast run` starts the training again by itself. A pod fails when it gave up.",
        "  backoffLimit: 3",
        "  podFailurePolicy:",
        "    rules:",
        "      # Saved after a signal: it goes on in another pod, and is no failure.",
        '      - action: "Ignore"',
        "        onExitCodes:",
        f"          containerName: {name}",
        '          operator: "In"',
        "          values: [75]",
        "      # The node was taken away, drained or preempted.",
        '      - action: "Ignore"',
        "        onPodConditions:",
        '          - type: "DisruptionTarget"',
        '            status: "True"',
        "      # Wrong arguments, or no such program: they do not get better.",
        '      - action: "FailJob"',
        "        onExitCodes:",
        f"          containerName: {name}",
        '          operator: "In"',
        "          values: [2, 126, 127]",
        "  # One process writes a run: the next pod waits until this one has ended.",
        '  podReplacementPolicy: "Failed"',
        "  template:",
        "    spec:",
        "      # podFailurePolicy wants it.",
        '      restartPolicy: "Never"',
        "      # From SIGTERM to SIGKILL: longer than a save. `holdfast doctor RUN` says how long.",
        f"      terminationGracePeriodSeconds: {job.grace_s}",
    ]
    if account:
        lines += [f"      serviceAccountName: {quoted(account)}"]
    if job.nodes > 1:
        lines += [f"      subdomain: {name}"]
    lines += [
        "      containers:",
        f"        - name: {name}",
        f"          image: {quoted(image)}",
        "          # No shell: it would keep SIGTERM. As process 1 `holdfast run` passes it on.",
        "          command:",
        *(f"            - {argument(word)}" for word in words),
        *_environment(job, grace),
    ]
    if job.gpus:
        lines += [
            "          resources:",
            "            limits:",
            f"              nvidia.com/gpu: {job.gpus}",
        ]
    if claim:
        where = f" {quoted(job.run)} is here." if job.run else " Its runs belong here."
        lines += [
            f"          #{where}",
            "          volumeMounts:",
            '            - name: "runs"',
            f"              mountPath: {quoted(mount)}",
            "      volumes:",
            '        - name: "runs"',
            "          persistentVolumeClaim:",
            f"            claimName: {quoted(claim)}",
        ]
    return "\n".join([*lines, ""])


def _environment(job: Job, grace: str) -> list[str]:
    values = {"HOLDFAST_GRACE": grace}
    # torchrun takes from these variables what no option says.
    if job.torchrun:
        values["PET_NPROC_PER_NODE"] = str(job.gpus or 1)
    if job.torchrun and job.nodes > 1:
        values |= {
            "PET_NNODES": str(job.nodes),
            "PET_RDZV_BACKEND": "c10d",
            "PET_RDZV_ID": job.name,
            "PET_RDZV_ENDPOINT": f"{job.name}-0.{job.name}:{PORT}",
        }
    lines = [
        "          # Inside the pod nothing says how long it has: so the run knows what fits.",
        "          env:",
    ]
    for key, value in values.items():
        lines += [f"            - name: {quoted(key)}", f"              value: {quoted(value)}"]
    return lines
