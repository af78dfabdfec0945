"""Checkpoints in Metaflow's steps, beside those of `metaflow-checkpoint`.

Each turn is a run of a flow of its own, as users run it, with a datastore of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.cases.common import MB, Options, write_s
from bench.outcome import CEILING, Measure, Outcome
from tests.support.servers.s3 import moto
from tests.support.servers.service import Place

_FLOW = Path(__file__).parents[1] / "flows" / "saves.py"
_OTHER = "metaflow-checkpoint"
_NO_SYNC = f"{_OTHER}, as it returns"
_NONE = "no decorator"
_DIRECT = CEILING + "direct write"
_PUTS, _LISTED = 20, 1000


def other_is_installed() -> bool:
    """Whether the peer metaflow-checkpoint can take part."""
    return importlib.util.find_spec("metaflow_extensions.obcheckpoint") is not None


def flows(options: Options) -> Outcome:
    """Five saves of two sizes, saves of one byte in a bucket, a long list, a step's end."""
    sizes = {"small": max(1, options.mib // 5), "large": options.mib}
    outcome = Outcome(
        case="metaflow",
        title="Checkpoints in Metaflow's steps",
        state="a folder with one file",
        measures=[
            *(
                Measure(f"{key}_{size}", f"{title}, {mib} MiB", unit, plotted=unit == "s")
                for size, mib in sizes.items()
                for key, title, unit in (
                    ("five", "five saves, nothing changes", "s"),
                    ("disk", "disk of the five", "MB"),
                    ("changed", "one save, all has changed", "s"),
                )
            ),
            Measure("byte", "save of one byte, S3 on loopback", plotted=False),
            Measure("list", f"list of {_LISTED:,}", plotted=False),
            Measure("tail", "from a step's last line to the next step", plotted=False),
            Measure("tail_s3", "the same, S3 on loopback", plotted=False),
        ],
        notes=[
            f"Holdfast's saves are durable when they return; those of `{_OTHER}` are fsynced here "
            "in its first row, and are not in its second. Cards are off."
        ],
    )
    contenders = ["Holdfast", *([_OTHER] if other_is_installed() else [])]
    with ExitStack() as stack:
        service = stack.enter_context(moto())
        for turn, counts in enumerate(options.turns()):
            for name in contenders:
                found = _in_files(options, name, list(sizes.values()), first=counts and turn < 2)
                found |= _in_a_bucket(options, name, service.place())
                if counts:
                    _add(outcome, name, list(sizes), found)
            here, there = _run(options, _plan(_NONE)), _in_a_bucket(options, _NONE, service.place())
            if counts:
                outcome.add(_NONE, tail=here["tail"], tail_s3=there["tail_s3"])
    with options.scratch() as folder:
        for size, mib in sizes.items():
            outcome.add(_DIRECT, **{f"changed_{size}": write_s(folder, mib << 20)})
    _aim(outcome, sizes)
    return outcome


def _aim(outcome: Outcome, sizes: dict[str, int]) -> None:
    other = _OTHER
    for size, mib in sizes.items():
        for key, what, least in (
            ("five", "five saves, nothing changes", 2.0),
            ("changed", "one save, all has changed", 2.0),
            ("disk", "disk of the five", 4.9),
        ):
            ratio = outcome.ratio(other, "Holdfast", f"{key}_{size}")
            outcome.aim(f"{what}, {mib} MiB: {other}'s as a multiple", least, ratio)
    outcome.aim(
        f"save of one byte, S3 on loopback: {other}'s as a multiple",
        10.0,
        outcome.ratio(other, "Holdfast", "byte"),
    )
    for measure, where in (("tail", "a folder"), ("tail_s3", "S3 on loopback")):
        ours, none = outcome.median("Holdfast", measure), outcome.median(_NONE, measure)
        outcome.aim(
            f"a step's end, {where}: over that of a step without the decorator",
            0.5,
            None if ours is None or none is None else ours - none,
            at_least=False,
            unit="s",
        )


def _in_files(options: Options, name: str, sizes: list[int], *, first: bool) -> dict[str, Any]:
    listed = 0
    if first:  # the list is the same in all rounds
        listed = 20 if options.quick else _LISTED
    # The step whose end is timed saves little, as its folder is removed at its end.
    return _run(options, _plan(name)) | {
        key: value
        for key, value in _run(options, _plan(name, sizes=sizes, listed=listed)).items()
        if key != "tail"
    }


def _in_a_bucket(options: Options, name: str, place: Place) -> dict[str, Any]:
    plan = _plan(name, bytes=_PUTS, local=False)
    found = _run(
        options,
        plan,
        METAFLOW_DEFAULT_DATASTORE="s3",
        METAFLOW_DATASTORE_SYSROOT_S3=f"s3://{place.service.bucket}/{place.prefix}",
        METAFLOW_S3_ENDPOINT_URL=place.endpoint,
        **{k: v for k, v in place.service.environment().items() if v is not None},
    )
    return {"byte_in_s3": found.get("byte"), "tail_s3": found["tail"]}


def _plan(name: str, **what: Any) -> dict[str, Any]:
    nothing = {"sizes": [], "bytes": 3, "listed": 0, "local": True, "card": False}
    return {"with": name, **nothing, **what}


def _run(options: Options, plan: dict[str, Any], **variables: str) -> dict[str, Any]:
    """What the flow writes down."""
    if plan["with"] == _NONE:
        plan = {**plan, "bytes": 0}
    with options.scratch() as folder:
        result = folder / "result"
        done = subprocess.run(
            [sys.executable, str(_FLOW), "--no-pylint", "run"],
            cwd=folder,
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("METAFLOW_")},
                "PYTHONPATH": str(_FLOW.parents[2]),
                "METAFLOW_USER": "bench",
                "METAFLOW_HOME": str(folder / "settings"),
                "METAFLOW_DEFAULT_METADATA": "local",
                "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(folder),
                "TMPDIR": str(folder),
                "PLAN": json.dumps({**plan, "result": str(result)}),
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the flow failed: {done.stdout[-4000:]}")
        return json.loads(result.read_text())


def _add(outcome: Outcome, name: str, sizes: list[str], found: dict[str, Any]) -> None:
    for size, of_size in zip(sizes, found["sizes"], strict=True):
        five, changed, disk = of_size["five"], of_size["changed"], of_size["disk"]
        outcome.add(
            name, **{f"five_{size}": five, f"changed_{size}": changed, f"disk_{size}": disk / MB}
        )
        if name == _OTHER:
            five, changed = of_size["five_returned"], of_size["changed_returned"]
            outcome.add(_NO_SYNC, **{f"five_{size}": five, f"changed_{size}": changed})
    outcome.add(name, byte=found["byte_in_s3"], tail=found["tail"], tail_s3=found["tail_s3"])
    for seconds in found.get("list", []):
        outcome.add(name, list=seconds)
