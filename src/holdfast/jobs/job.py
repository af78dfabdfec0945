"""What a job file is to be written for, checked: nothing in it can end a line of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.errors import UsageError

GRACE_S = 90
STORAGE = "100Gi"
PORT = 29500
"""Where the processes of torchrun meet."""

# A label of DNS (RFC 1123), which both clusters take for a name.
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_IMAGE = re.compile(r"[\w.:/@-]+", re.ASCII)
_WORD = re.compile(r"[\w.,+@%-]+", re.ASCII)
_ARRAY = re.compile(r"\d+(?:-\d+(?::\d+)?)?(?:,\d+(?:-\d+(?::\d+)?)?)*(?:%\d+)?", re.ASCII)
_STORAGE = re.compile(r"[1-9]\d*(?:\.\d+)?(?:[EPTGMK]i|[EPTGMk])?", re.ASCII)


@dataclass(frozen=True)
class Job:
    """Raises UsageError for what no job file can hold."""

    command: tuple[str, ...]
    name: str
    time_s: float | None = None
    """The time limit; None: none is asked for."""
    nodes: int = 1
    gpus: int = 0
    """Of each node."""
    grace_s: int = GRACE_S
    """From the signal to the end."""
    run: str = ""
    """The address of the run, if it is known."""

    def __post_init__(self) -> None:
        if not self.command:
            raise UsageError("there is no command", hint="… -- python train.py")
        for word in self.command:
            _text(word, "the command")
        _text(self.run, "the run's address")
        check_name(self.name, "name")

    @property
    def torchrun(self) -> bool:
        """Whether the command starts the processes of a node by itself."""
        return self.command[0].rpartition("/")[2] == "torchrun"


def name_of(command: Sequence[str]) -> str:
    """A name for the job: the script's, as far as a name can hold it.

    >>> name_of(["torchrun", "--nproc-per-node", "8", "src/Train_GPT.py", "--lr", "1"])
    'train-gpt'
    >>> name_of(["./run"])
    'run'
    """
    script = next((word for word in command if word.endswith(".py")), command[0] if command else "")
    plain = re.sub(r"[^a-z0-9]+", "-", script.rpartition("/")[2].removesuffix(".py").lower())
    return plain[:63].strip("-") or "train"


def check_name(text: str, what: str) -> str:
    """`text`, if it is a name of DNS, as Kubernetes wants them. Raises UsageError."""
    return _check(text, _NAME, what, "Lower-case letters, digits and '-', at most 63.")


def check_word(text: str, what: str) -> str:
    """`text`, if it is a name as Slurm has them. Raises UsageError."""
    return _check(text, _WORD, what, "Letters, digits, and '.', ',', '+', '@', '%', '-', '_'.")


def check_image(text: str) -> str:
    """`text`, if it may be the name of an image. Raises UsageError."""
    return _check(text, _IMAGE, "image", "For example registry.example.com/team/train:1.0")


def check_array(text: str) -> str:
    """`text`, if it names the tasks of an array. Raises UsageError."""
    return _check(text, _ARRAY, "array", "For example 0-9, 1,3,5 or 0-99%10.")


def check_storage(text: str) -> str:
    """`text`, if it is a size as Kubernetes writes them. Raises UsageError."""
    return _check(text, _STORAGE, "storage", "For example 100Gi or 2Ti.")


def _check(text: str, pattern: re.Pattern[str], what: str, hint: str) -> str:
    if not pattern.fullmatch(text):
        raise UsageError(f"bad {what}: {text!r}", hint=hint)
    return text


def _text(text: str, what: str) -> None:
    """A file is UTF-8, and no argument of a program has a NUL."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{what} is no text: {text!r}", hint="A job file is UTF-8: rename what is not."
        ) from None
    if "\0" in text:
        raise UsageError(f"{what} has a NUL: {text!r}", hint="No program can be given one.")
