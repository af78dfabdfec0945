"""What docs/format.md says of torch's nodes is what is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from holdfast.torch.dtypes import DTYPES, STORED
from tests.torch.roundtrip import Checkpoint

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
SECTION = PAGE[PAGE.index("### PyTorch\n") : PAGE.index("### The runtime\n")]


def rows(heading: str) -> list[list[str]]:
    """Cells of the table whose first row is `heading`."""
    lines = SECTION[SECTION.index(heading) :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(text: str) -> list[str]:
    found: list[str] = []
    for name, _, last in re.findall(r"`(\w+)`( \.\.\. `(\w+)`)?", text):
        found.append(name)
        if last:  # `int1` ... `int7`
            stem = last.rstrip("0123456789")
            found += [f"{stem}{n}" for n in range(2, int(last.removeprefix(stem)) + 1)]
    return found


def test_the_leaf_of_every_dtype() -> None:
    said: dict[str, tuple[str, set[int]]] = {}
    for dtypes, leaf in rows("| `dtype` | leaf |"):
        stored = names(leaf)
        if stored == ["U8"] and "dimension" in leaf:
            sizes = set(map(int, re.findall(r" (\d+)", leaf.partition(":")[0])))
            said.update(dict.fromkeys(names(dtypes), ("U8", sizes)))
        else:
            said.update(zip(names(dtypes), [(name, set()) for name in stored], strict=True))
    assert set(said) == set(DTYPES)
    for name, dtype in DTYPES.items():
        stored, sizes = said[name]
        assert stored == STORED.get(dtype, "U8")
        assert (dtype in STORED) != (dtype.itemsize in sizes)


def keys_of(value: Any) -> set[str]:
    node = Checkpoint({"x": value}).tree["v"][0][1]
    assert f"`{node['!']}`" in SECTION
    return set(node) - {"!"}


@pytest.mark.usefixtures("world_of_one")
def test_the_keys_of_every_tag() -> None:
    told = {
        tag.strip("`"): set(re.findall(r"`(\w+)`", keys)) for tag, keys, _ in rows("| tag | other")
    }
    base = torch.arange(6.0)
    parameter = torch.nn.Parameter(torch.zeros(2, 3, 1).permute(2, 1, 0))
    model = torch.nn.LazyLinear(2)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    distributed = DTensor.from_local(base, init_device_mesh("cpu", (1,)))
    written: dict[str, set[str]] = {
        "torch.tensor": keys_of(parameter) | keys_of(model.weight) | keys_of(distributed),
        "torch.sparse": keys_of(torch.eye(2).to_sparse().requires_grad_()),
        "torch.module": keys_of(model),
        "torch.optimizer": keys_of(optimizer),
        "torch.object": keys_of(torch.optim.lr_scheduler.StepLR(optimizer, 1)),
        "torch.generator": keys_of(torch.Generator()),
        "torch.size": keys_of(torch.Size([1])),
        "torch.device": keys_of(torch.device("cpu")),
        "torch.name": keys_of(torch.float32),
    }
    views = Checkpoint({"x": base[:4], "y": base[2:]}).tree["v"]
    written["torch.tensor"] |= {key for _, node in views for key in node} - {"!"}
    assert written["torch.tensor"] | {"device"} == told["torch.tensor"]
    for tag, keys in written.items():
        assert keys <= told[tag], tag
    assert set(written) == set(told)


def test_the_example_of_an_order() -> None:
    tensor = torch.empty(8, 1, 3, 3, memory_format=torch.channels_last)
    order = Checkpoint({"x": tensor}).tree["v"][0][1]["order"]
    assert f"in `[8, 1, 3, 3]` as `channels_last` it is `{order}`" in SECTION
