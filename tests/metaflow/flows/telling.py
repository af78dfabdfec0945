"""What the flows beside this file have in common."""

from __future__ import annotations

import json
import os
import signal


def tell(**what: object) -> None:
    """Write a line for the test, whole even where several tasks do."""
    with open(os.environ["TOLD"], "a", encoding="utf-8") as file:
        file.write(json.dumps(what) + "\n")


def attempts() -> int:
    """How many have told their number."""
    if not os.path.exists(os.environ["TOLD"]):
        return 0
    with open(os.environ["TOLD"], encoding="utf-8") as file:
        return sum("attempt" in json.loads(line) for line in file)


def die() -> None:
    """As the machine would have it."""
    os.kill(os.getpid(), signal.SIGKILL)
