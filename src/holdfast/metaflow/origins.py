"""Which run resumes which, also for runs that have saved nothing.

The folders of runs say it, but a run that ends before a task of it has saved leaves none; what
resumes that run must find its way back to what was saved before it all the same. Metaflow
itself keeps the origin of tasks that have begun, in a metadata service or on one machine, and
none of the run.

    <datastore root>/mf.holdfast/<flow>/run-origins/<run>..<origin>

are empty objects whose names say all, written once by each `resume`, before any task begins.
"""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any

from holdfast.metaflow.places import FOLDER, Root, RunName, key_part
from holdfast.stores.open import open_store

_FOLDER = "run-origins"
"""Beside the folders of the steps, whose names have no dash."""


def keep_origin(flow_datastore: Any, flow: str, run: RunName) -> None:
    """Write down which run it resumes, if it does.

    With Metaflow's own client, as the process that runs a flow on other machines may have no
    other. Raises what that raises; no task could begin then.
    """
    if run.origin:
        path = f"{FOLDER}/{key_part(flow)}/{_FOLDER}/{run.part}"
        flow_datastore._storage_impl.save_bytes([(path, io.BytesIO())])


def origins_of(root: Root, flow: str) -> dict[str, str]:
    """For each run of the flow that was a `resume`, the run that it resumed. Raises StoreError."""
    found: dict[str, str] = {}
    for each in open_store(root.address(FOLDER, key_part(flow), _FOLDER)).list(""):
        with suppress(ValueError):  # somebody else's
            name = RunName.parse(each.key)
            found[name.run] = name.origin
    return found
