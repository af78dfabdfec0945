"""Steps that run on several nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.errors import StoreUnavailable
from holdfast.metaflow.gang import await_choice, publish
from holdfast.metaflow.places import Place, Root, RunName
from tests.metaflow.support import Metaflow


@pytest.mark.parametrize(("save", "number"), [("control", 3), ("all", 9)])
def test_all_nodes_go_on_from_what_the_control_node_has_saved(
    metaflow: Metaflow, save: str, number: int
) -> None:
    metaflow.run("gang", SAVE=save)
    nodes = [line for line in metaflow.told if "rank" in line]
    assert {line["identifier"] for line in nodes} == {"fit/task"}
    assert {line["loaded"] for line in nodes if line["attempt"] == 0} == {None}
    retried = [line for line in nodes if line["attempt"] == 1]
    assert {line["rank"] for line in retried} == {0, 1, 2}
    assert {line["loaded"] for line in retried} == {"0: 2"} == {line["who"] for line in retried}
    assert all("save() on the control node" in line["refused"] for line in nodes)
    assert len({line["key"] for line in retried}) == 1
    listed = [line["listed"] for line in metaflow.told if "listed" in line]
    assert listed == ([[0, 0, 0, 1, 1, 1, 2, 2, 2]] * 3 if save == "all" else [])
    keys = metaflow.told[-1]["keys"]
    assert len(set(keys)) == len(keys) == number
    assert metaflow.told[-1]["models"] == {f"{rank}: 2": rank for rank in range(number // 3)}


def test_a_node_waits_for_the_choice_and_takes_no_later_one(tmp_path: Path) -> None:
    root, place = Root(str(tmp_path)), Place("Flow", "fit", RunName("1"))
    slept: list[float] = []

    def chosen_meanwhile(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            publish(root, place, 1, None)

    assert await_choice(root, place, 1, sleep=chosen_meanwhile) is None
    assert len(slept) == 2
    with pytest.raises(StoreUnavailable, match="control node"):
        await_choice(root, place, 2, timeout_s=0.0, sleep=slept.append)
