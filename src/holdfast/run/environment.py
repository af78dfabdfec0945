"""What a checkpoint records about where it was made, and how two of them differ.

Environment variables are never recorded: they hold secrets. Packages are listed only if
they are loaded. Nothing here raises: facts that cannot be had are left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import math
import os
import platform
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

import numpy as np

from holdfast.errors import ConfigChanged, UsageError

_PACKAGES = (
    "holdfast",
    "torch",
    "numpy",
    "jax",
    "keras",
    "tensorflow",
    "xgboost",
    "lightgbm",
    "sklearn",
    "transformers",
    "lightning",
    "accelerate",
    "datasets",
    "torchvision",
)
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}
_GIT_TIMEOUT_S = 5.0
# Without what a user's settings add to it: the same edits must give the same text.
_DIFF = ("diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color", "--full-index")
_CPU_INFO = Path("/proc/cpuinfo")


def collect() -> dict[str, Any]:
    """Facts about this process, as plain values."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cwd": _cwd(),
        "argv": [str(word) for word in sys.argv],
        "packages": _packages(),
        "cpu": _cpu(),
    }
    if git := _git():
        facts["git"] = git
    if device := _device():
        facts["device"] = device
    return facts


def _cwd() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""  # the folder was removed under us


def _packages() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        if name not in sys.modules:
            continue
        try:
            versions[name] = importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
        except importlib.metadata.PackageNotFoundError:
            version = getattr(sys.modules[name], "__version__", None)
            if version is not None:
                versions[name] = str(version)
    return versions


def _git() -> dict[str, Any]:
    """The commit of the program's folder (a script's own, else the current one)."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    folder = str(Path(main).resolve().parent) if main else _cwd()
    commit = _ask_git(folder, "rev-parse", "HEAD")
    if not commit:
        return {}
    status = _ask_git(folder, "status", "--porcelain", "--untracked-files=no")
    git: dict[str, Any] = {"commit": commit, "dirty": None if status is None else bool(status)}
    if status and (edits := _ask_git(folder, *_DIFF)):
        git["edits"] = hashlib.sha256(edits.encode()).hexdigest()[:16]
    return git


def _ask_git(folder: str, *words: str) -> str | None:
    command = ("git", "-C", folder, *words)
    # No locks: a background `git status` must not disturb the user's own git commands.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
    """The model of the processor: others sum in another order."""
    try:
        with _CPU_INFO.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == "model name" and value.strip():
                    return " ".join(value.split())
    except OSError:
        pass  # only Linux has it
    return platform.processor() or platform.machine()


def _device() -> str:
    """The accelerator in use. None is started up for the question: that would take
    memory on it and forbid forked workers."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    try:
        if cuda is not None and cuda.is_initialized():
            count = cuda.device_count()
            name = cuda.get_device_name(0)
            return name if count == 1 else f"{count} x {name}"
    except (RuntimeError, AssertionError, OSError):
        return ""
    return "cpu" if torch is not None else ""


# -- differences --------------------------------------------------------------


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a person should know has changed, in a few words each.

    >>> differences({"python": "3.11.2", "packages": {}}, {"python": "3.12.0", "packages": {}})
    ['python 3.11.2 -> 3.12.0']
    """
    keys = ("python", "device", "cpu")
    old = {key: before.get(key) for key in keys} | (before.get("packages") or {})
    new = {key: now.get(key) for key in keys} | (now.get("packages") or {})
    changed = (key for key in new if old.get(key) and new[key] and old[key] != new[key])
    found = _code_differs(before.get("git") or {}, now.get("git") or {})
    return found + [f"{key} {old[key]} -> {new[key]}" for key in changed]


def _code_differs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    if not (old.get("commit") and new.get("commit")):
        return []
    was, is_now = _revision(old), _revision(new)
    if old["commit"] == new["commit"]:
        if old.get("dirty") is None or new.get("dirty") is None:
            return []
        edits = (old.get("edits"), new.get("edits"))
        if was == is_now and all(edits) and edits[0] != edits[1]:
            is_now = _revision(new, "edited otherwise")
    return [f"code {was} -> {is_now}"] if was != is_now else []


def _revision(git: Mapping[str, Any], edited: str = "edited") -> str:
    return f"{git['commit'][:9]}{f' ({edited})' if git.get('dirty') else ''}"


# -- config -------------------------------------------------------------------


def plain_config(config: object) -> Any:
    """`config` as dicts, lists and plain values, so that two of them can be compared.

    Takes mappings, dataclasses, `argparse.Namespace`, and objects that turn themselves
    into a dict (`to_dict`, `model_dump`). Raises UsageError for other values.
    """
    return _plain(config, "config")


def _plain(value: Any, path: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such numbers: they would come back as null
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Namespace | SimpleNamespace):
        value = vars(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        for verb in ("model_dump", "to_dict"):
            if callable(convert := getattr(value, verb, None)):
                value = convert()
                break
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item, path) for item in value), key=repr)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, np.generic):
        return _plain(value.item(), path)
    raise UsageError(
        f"{path} is of type {type(value).__name__}, which cannot be compared with the last run's",
        hint="Put only names, numbers, lists and dicts into config=.",
    )


def config_diff(before: Any, now: Any) -> list[str]:
    """Lines like `lr: 0.1 -> 0.2`; none if the two are the same.

    >>> config_diff({"lr": 0.1, "data": {"seed": 1}}, {"lr": 0.2})
    ['data.seed: 1 -> (absent)', 'lr: 0.1 -> 0.2']
    """
    old, new = dict(_flatten(before, "")), dict(_flatten(now, ""))
    lines: list[str] = []
    for path in sorted(old.keys() | new.keys()):
        was, is_now = old.get(path, _ABSENT), new.get(path, _ABSENT)
        # repr: 1 and True, 1 and 1.0 are different settings; NaN is the same as NaN.
        if repr(was) != repr(is_now):
            lines.append(f"{path or 'config'}: {was!r} -> {is_now!r}")
    return lines


def checked_config(
    before: Any, now: Any, *, allow_change: bool, address: str
) -> tuple[Any, list[str]]:
    """(the config to go on with, what changed): `now`, or where a program gives none the one
    of the last run, to which later starts are held.

    Raises ConfigChanged if they differ and that is not allowed.
    """
    if before is None or now is None:
        return (before if now is None else now), []
    changes = config_diff(before, now)
    if changes and not allow_change:
        lines = "\n  ".join([f"{address} was started with another config:", *changes])
        raise ConfigChanged(
            lines,
            hint="Start it under another address, or go on with the new one: "
            "Run(..., allow_config_change=True).",
        )
    return now, changes


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


_ABSENT = _Absent()


def _flatten(value: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        prefix = f"{path}." if path else ""
        return [pair for key, item in value.items() for pair in _flatten(item, f"{prefix}{key}")]
    return [(path, value)]


def passing_folder_line(address: str, environ: Mapping[str, str] = os.environ) -> str:
    """What to say of an address in a folder that the next start of the program will not be in;
    "" if it is none. Ray gives its workers one, another one at each start."""
    if "://" in address or os.path.isabs(address) or "RAY_RAYLET_PID" not in environ:
        return ""
    try:
        folder = os.getcwd()
    except OSError:
        return ""
    if f"{os.sep}session_" not in folder:
        return ""
    return (
        f"{address} is in {folder}, and Ray gives its workers another folder at the next start: "
        "the run would begin anew. Name it by its whole path, or keep it in a bucket"
    )
