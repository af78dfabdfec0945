"""What is recorded with a checkpoint."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import holdfast
from holdfast.errors import UsageError
from holdfast.metaflow.reference import Reference, metrics_of, plain_metadata
from tests.metaflow.tasks import task, written

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), values, max_size=4))
def test_plain_values_stay_what_they_are(metadata: dict[str, Any]) -> None:
    assert plain_metadata(metadata) == metadata
    assert all(math.isfinite(number) for number in metrics_of(metadata).values())


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array(7.5), 7.5),
        (torch.tensor(0.25, requires_grad=True), 0.25),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        ([np.float32(1), {"x": (torch.tensor(2),)}], [1.0, {"x": [2]}]),
        (MappingProxyType({"a": OrderedDict(b=1)}), {"a": {"b": 1}}),
        ({1: "a", 2.5: "b", np.int64(9): "d"}, {"1": "a", "2.5": "b", "9": "d"}),
        (10**400, 10**400),
        ("\udcff", "\udcff"),
    ],
)
def test_numbers_of_others_become_pythons(tmp_path: Path, value: object, plain: object) -> None:
    fit = task(tmp_path / "ds")
    saved = fit.save(written(tmp_path / "x"), metadata={"v": value})
    assert saved.metadata == {"v": plain}
    assert type(saved.metadata["v"]) is type(plain)
    assert fit.list() == [saved]
    fit.close()


def test_numbers_that_are_none_survive(tmp_path: Path) -> None:
    """And are no metrics: nothing is best by them."""
    odd = {"nan": math.nan, "inf": np.float32("-inf"), "loss": 0.5, "on": True, "a/b": 1}
    fit = task(tmp_path / "ds")
    reference = fit.save(written(tmp_path / "x"), metadata=odd)
    (listed,) = fit.list()
    assert math.isnan(listed.metadata["nan"])
    assert listed.metadata["inf"] == -math.inf
    fit.close()
    assert holdfast.open(reference.url).info.metrics == {"loss": 0.5}


class Mine:
    def __str__(self) -> str:
        return "a thing of mine"


deep: list[Any] = []
for _ in range(100_000):
    deep = [deep]
circular: dict[str, Any] = {}
circular["self"] = circular


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"x": Mine()}, "a thing of mine"),
        ({"x": {1, 2}}, "set"),
        ({"x": b"bytes"}, "bytes"),
        ({"x": 1j}, "complex"),
        ({"x": np.array([1j])}, "complex"),
        ({"x": np.longdouble(1)}, "longdouble"),
        ({"x": datetime.now(UTC)}, "datetime"),
        ({(1, 2): 3}, r"key \(1, 2\)"),
        ({None: 3}, "key None"),
        ({1: 2, "1": 3}, "the same as text"),
        ({"x": "y" * 20_000}, "20,0.. bytes"),
        ({"x": np.zeros(10_000)}, "bytes"),
        ({"x": deep}, "plain values"),
        (circular, "plain values"),
        ([1, 2], "plain values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_recorded_is_an_error_and_saves_nothing(
    tmp_path: Path, metadata: Any, told: str
) -> None:
    fit = task(tmp_path / "ds")
    with pytest.raises(UsageError, match=told) as raised:
        fit.save(written(tmp_path / "x"), metadata=metadata)
    assert raised.value.hint
    assert not (tmp_path / "ds").exists()


@pytest.mark.parametrize("name", ["v1.2", "a/b", "../../up", "größe", "", " ", "@latest", "a\0b"])
def test_any_text_is_a_name(tmp_path: Path, name: str) -> None:
    fit = task(tmp_path / "ds")
    saved = fit.save(written(tmp_path / "x", a="1"), name=name)
    fit.close()
    assert [each.name for each in fit.list()] == [name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ds", "x"]
    fit.load(saved, written(tmp_path / "y"))
    assert (tmp_path / "y/a").read_text() == "1"


def test_a_name_has_a_length(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too long"):
        task(tmp_path / "ds").save(written(tmp_path / "x"), name="n" * 100_000)
    assert not (tmp_path / "ds").exists()


def test_a_reference_is_plain_and_comes_back(tmp_path: Path) -> None:
    fit = task(tmp_path / "ds")
    reference = fit.save(written(tmp_path / "x"), metadata={"epoch": 3})
    fit.close()
    passed_on = json.loads(json.dumps(reference.to_dict()))
    assert Reference.of(passed_on) == Reference.of(reference) == reference
    del passed_on["url"]
    for wrong in (passed_on, {"key": "mf.checkpoints/x"}, "mf.holdfast", None, 7):
        with pytest.raises(UsageError, match="no checkpoint"):
            Reference.of(wrong)


def test_what_a_newer_version_records_hides_nothing(tmp_path: Path) -> None:
    fit = task(tmp_path / "ds")
    fit.save(written(tmp_path / "x"))
    fit.close()
    run = tmp_path.joinpath("ds", *fit.place.parts, "main")
    with holdfast.CheckpointManager(run, keep=None) as manager:
        line, _, note = manager.checkpoints()[0].note.partition("\n")
        newer = json.dumps({**json.loads(note), "new": 1, "key": "x"})
        manager.save(2, {"files": 1}, note=f"{line}\n{newer}", block=True)
        manager.save(3, {"files": 1}, note="not ours", block=True)
        manager.save(4, {"files": 1}, note="x\n[1]", block=True)
    assert [each.version_id for each in fit.list()] == [2, 1]
