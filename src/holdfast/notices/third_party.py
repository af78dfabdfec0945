"""Notifiers of other packages: the entry points of the group `holdfast.notifiers`.

Each names a function without arguments that returns a `Notifier`, or None where it has nothing
to ask. HOLDFAST_NOTICES knows it by the entry point's name.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from holdfast.notices.detect import is_wanted
from holdfast.notices.notifier import Notifier

GROUP = "holdfast.notifiers"

logger = logging.getLogger("holdfast")


@cache
def third_party_notifiers() -> tuple[Notifier, ...]:
    """Imports code of others, once in a process. A broken one is logged, and left out."""
    made = (_made(entry) for entry in entry_points(group=GROUP) if is_wanted(entry.name))
    return tuple(notifier for notifier in made if notifier is not None)


def _made(entry: EntryPoint) -> Notifier | None:
    try:
        notifier = entry.load()()
    except Exception as error:  # noqa: BLE001 - code of others must not end a training
        logger.warning("the notifier %s (%s) is left out: %r", entry.name, entry.value, error)
        return None
    if notifier is None or isinstance(notifier, Notifier):
        return notifier
    logger.warning("the notifier %s (%s) is no Notifier: %r", entry.name, entry.value, notifier)
    return None
