"""What `@checkpoint` is given: in the code, or by `--with checkpoint:…` as text."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.metaflow.support import Metaflow

_ENDED = 1
_OLD = {"by": "first", "count": 2}


def _run(metaflow: Metaflow, options: str, by: str, **variables: str) -> list[dict[str, Any]]:
    """What a run of it tells: each attempt what it loaded, then what it can list."""
    metaflow.forget()
    command = ["run", "--with", "retry", f"--with=checkpoint{options}"]
    metaflow.run("plain", *command, status=0, BY=by, **variables)
    return metaflow.told


def test_without_options(metaflow: Metaflow) -> None:
    first, retried, end = _run(metaflow, "", "first", FAILS="1")
    assert (first["loaded"], retried["loaded"]) == (None, _OLD)
    assert end["counts"] == [2, 1, 0, 2, 1, 0]
    assert _run(metaflow, "", "second")[0]["loaded"] is None  # "fresh"


@pytest.mark.parametrize("none", ["none", "None", "null"])
def test_nothing_is_loaded(metaflow: Metaflow, none: str) -> None:
    options = f":load_policy={none},keep=last=2,show_card=FALSE,temp_dir_root={none}"
    first, retried, end = _run(metaflow, options, "first", FAILS="1")
    assert (first["loaded"], retried["loaded"]) == (None, None)
    assert end["counts"] == [2, 1]


def test_eager_loads_what_an_earlier_run_in_the_namespace_has(metaflow: Metaflow) -> None:
    eager = ":load_policy=eager,show_card=yes"
    assert _run(metaflow, eager, "first")[0]["loaded"] is None
    assert _run(metaflow, eager, "other", METAFLOW_USER="somebody")[0]["loaded"] is None
    first, retried, _ = _run(metaflow, eager, "second", FAILS="1")
    assert first["loaded"] == _OLD
    assert retried["loaded"] == {"by": "second", "count": 2}


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("load_policy=newest", "load_policy of @checkpoint on step end must be one of"),
        ("keep=lots=2", "keep of @checkpoint on step end must be understood"),
        ("keep=3", "keep of @checkpoint on step end must be a rule"),
        ("show_card=perhaps", "show_card of @checkpoint on step end must be True or False"),
        ("every=year", "every of @checkpoint on step end must be understood"),
        ("attributes=3", "attributes of @checkpoint on step end must be names such as"),
        ("attributes=a b", "must be what the step assigns to self ('a b' is no name of an"),
        ("attributes=ok,start", "('start' is a parameter, a step or another part of the flow"),
        ("often=1", "does not support the attribute 'often'"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(
    metaflow: Metaflow, option: str, said: str
) -> None:
    output = metaflow.run("plain", "run", f"--with=checkpoint:{option}", status=_ENDED).output
    assert said in " ".join(output.split())
    assert not metaflow.told
    assert "Task is starting" not in output


def test_a_step_that_is_spun_has_checkpoints(metaflow: Metaflow) -> None:
    """And what Metaflow allows there by itself is allowed still."""
    metaflow.run("counting")
    metaflow.forget()
    metaflow.run("counting", "spin", "start")
    assert metaflow.told[0] == {**metaflow.told[0], "attempt": 0, "loaded": 0}
    asked = "from metaflow import metaflow_config as c; print(*c.SPIN_ALLOWED_DECORATORS)"
    names = subprocess.run(
        [sys.executable, "-c", asked],
        env=metaflow.environment(),
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert {"card", "conda", "timeout", "checkpoint", "model"} <= set(names)
