"""The lines that a run prints: to stderr, one thing each."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

from holdfast.core.units import format_ago
from holdfast.manager.progress import counted, working

_MOST_CHANGES = 10  # in one line


class Console:
    """Prints lines unless `quiet`; `loud` ones always. Of several ranks the first one prints,
    and of the others what is loud, with their number."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self.rank = 0

    @property
    def quiet(self) -> bool:
        return self._quiet or self.rank > 0

    def say(self, line: str) -> None:
        """What a person may want to know."""
        if not self.quiet:
            _print(line)

    def loud(self, line: str, *, each: bool = True) -> None:
        """What must not be missed. `each`: by any rank; else the first one says it for all."""
        if each or not self.rank:
            _print(f"rank {self.rank}: {line}" if self.rank else line)

    @contextlib.contextmanager
    def working(self, doing: str, done: str) -> Iterator[None]:
        """Show how far the save or restore in the block is, if it is a long one."""
        if self.quiet:
            with counted():
                yield
        else:
            with working(_safe(doing), done, self.say):
                yield

    def bringing_back(self, address: str, mirror: str) -> contextlib.AbstractContextManager[None]:
        """As `working`, of what a start finds in the mirror only."""
        doing = f"{address}: coming from its mirror"
        return self.working(doing, f"{address}: brought back from {mirror}")

    def copying(self, address: str, mirror: str) -> contextlib.AbstractContextManager[None]:
        """As `working`, of what the mirror lacks at the end."""
        doing = f"{address}: copying to its mirror"
        return self.working(doing, f"{address}: copied to {mirror}")

    def notice(self, line: str) -> None:
        """As `say`, from a signal handler: past Python's buffers, which may be in use."""
        if not self.quiet:
            with contextlib.suppress(OSError):
                os.write(2, f"{line}\n".encode(errors="backslashreplace"))


def _print(line: str) -> None:
    stream = sys.stderr
    try:
        # No `print`: Ray replaces that, and shows a line twice.
        stream.write(f"{_safe(line)}\n")
        stream.flush()
    except (OSError, ValueError, AttributeError):
        pass  # stderr is closed, or None: a job must not die of a line that nobody reads


def _safe(line: str) -> str:
    """Names and addresses may hold anything; a terminal must show escapes, not obey them."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in line)


def started_line(address: str, step: int | None, age_s: float = 0.0, *, source: str = "") -> str:
    """`source` is the mirror that it was found in, or that was asked in vain.

    >>> started_line("runs/gpt", 41200, 185)
    'resumed runs/gpt at step 41,200 (verified, saved 3 min ago)'
    >>> started_line("runs/gpt", 41200, 185, source="s3://b/gpt")
    'resumed runs/gpt at step 41,200 (from s3://b/gpt, verified, saved 3 min ago)'
    >>> started_line("runs/gpt", None)
    'no checkpoint in runs/gpt: starting at step 0'
    >>> started_line("runs/gpt", None, source="s3://b/gpt")
    'no checkpoint in runs/gpt nor in s3://b/gpt: starting at step 0'
    """
    if step is None:
        nor = f" nor in {source}" if source else ""
        return f"no checkpoint in {address}{nor}: starting at step 0"
    saved = format_ago(age_s)
    saved = "just now" if saved == "now" else saved
    found = f"from {source}, " if source else ""
    return f"resumed {address} at step {step:,} ({found}verified, saved {saved})"


def apart_line(size: int) -> str:
    """
    >>> apart_line(2)[:76]
    'each of 2 ranks has another address: it saves and resumes by itself, perhaps'
    """
    return (
        f"each of {size} ranks has another address: it saves and resumes by itself, perhaps at "
        "another step than the others; for one model give one address, else group=False"
    )


def node_disks_line(address: str, mirror: str) -> str:
    """
    >>> node_disks_line("/disk", "s3://b/g")
    '/disk is another folder on each node: the checkpoints are in s3://b/g, and parts of them here'
    """
    return (
        f"{address} is another folder on each node: the checkpoints are in {mirror}, and parts of "
        "them here"
    )


def order_line(name: str, why: str) -> str:
    """
    >>> order_line("model", "its parameters are others")
    'model: gradients are summed in another order than before, as its parameters are others'
    """
    return f"{name}: gradients are summed in another order than before, as {why}"


def thread_line(address: str) -> str:
    """
    >>> thread_line("runs/gpt")
    'runs/gpt: the loop is not on the main thread: signals will not be waited for'
    """
    return f"{address}: the loop is not on the main thread: signals will not be waited for"


def copying_line(address: str, mirror: str, steps: Sequence[int]) -> str:
    """
    >>> copying_line("runs/gpt", "s3://b/gpt", [300, 200])
    'runs/gpt: copying step 300 and 1 more to s3://b/gpt before this process ends'
    """
    more = f" and {len(steps) - 1:,} more" if len(steps) > 1 else ""
    return f"{address}: copying step {steps[0]:,}{more} to {mirror} before this process ends"


def differences_line(differences: Sequence[str]) -> str:
    """
    >>> differences_line(["torch 2.12.0 -> 2.13.0", "host a -> b"])
    'since the last run: torch 2.12.0 -> 2.13.0; host a -> b'
    """
    return f"since the last run: {'; '.join(differences)}"


def redrawn_line(passed: object, following: object) -> str:
    """
    >>> redrawn_line("epochs", "batches").partition(". ")[0]
    'random numbers are drawn between the epochs loop, which was left early, and the batches loop'
    """
    return (
        f"random numbers are drawn between the {passed} loop, which was left early, and the "
        f"{following} loop. Nobody saw when it was left, so they are not those of the first time. "
        "Write `for ... in run.epochs(...)`, without a variable that holds the iterator"
    )


def config_line(changes: Sequence[str]) -> str:
    """Of many changes the first.

    >>> config_line(["lr: 0.1 -> 0.2", "seed: 1 -> (absent)"])
    'config changed since the last run: lr: 0.1 -> 0.2; seed: 1 -> (absent)'
    """
    shown = list(changes[:_MOST_CHANGES])
    if len(changes) > len(shown):
        shown.append(f"and {len(changes) - len(shown)} more")
    return f"config changed since the last run: {'; '.join(shown)}"


def settings_line(overridden: Sequence[str]) -> str:
    """
    >>> settings_line(["optimizer.lr: 0.1 -> 0.2"])
    'not as in the checkpoint: optimizer.lr: 0.1 -> 0.2'
    """
    return f"not as in the checkpoint: {'; '.join(overridden)}"


def kept_line(different: Sequence[str]) -> str:
    """
    >>> kept_line(["sgd.lr: 0.1 -> 0.2"]).partition(";")[0]
    'as in the checkpoint, not as built now: sgd.lr: 0.1 -> 0.2'
    """
    return (
        f"as in the checkpoint, not as built now: {'; '.join(different)}; "
        "override= takes what is to be as built"
    )


def plural(number: int, noun: str) -> str:
    """
    >>> plural(1, "step"), plural(1200, "step")
    ('1 step', '1,200 steps')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
