"""Training in several processes goes on where it was, down to bits; what saves rely on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule

from holdfast.core.group import Ranks
from holdfast.core.tree import TreeEncoder
from holdfast.errors import StateError
from holdfast.torch.gradients import Gradients
from holdfast.torch.memory import TensorSource
from holdfast.torch.overlap import Barrier
from holdfast.torch.untracked import find_untracked, untracked_parameters
from tests.support import ranks
from tests.support.joined import Captured, Joined, captured, restore
from tests.support.layouts import LAYOUTS, Net, full, full_state


def built(layout: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    make, _ = LAYOUTS[layout]
    model = make(Net(), distributed.get_world_size())
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def backward(model: Any, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(9, (2, 4), generator=generator)
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        backward(model, number)
        optimizer.step()
        optimizer.zero_grad()


def uninterrupted(layout: str) -> tuple[Captured, dict[str, torch.Tensor]]:
    model, optimizer = built(layout, 1)
    train(model, optimizer, range(2))
    piece = captured({"model": model, "optimizer": optimizer})
    train(model, optimizer, range(2, 4))
    return piece, full_state(model, optimizer)


def gone_on(layout: str, checkpoint: Joined) -> dict[str, torch.Tensor]:
    model, optimizer = built(layout, 2)
    restore(checkpoint, {"model": model, "optimizer": optimizer})
    train(model, optimizer, range(2, 4))
    return full_state(model, optimizer)


@pytest.mark.parametrize(
    ("layout", "size"),
    [("ddp", 2), ("fsdp", 4), ("fsdp_mixed", 2), ("hsdp", 4), ("fsdp_tp", 4), ("sequence", 2)],
)
def test_training_goes_on_with_the_same_bits(layout: str, size: int) -> None:
    results = ranks.call(uninterrupted, size, layout)
    checkpoint = Joined.of([piece for piece, _ in results])
    expected = results[0][1]
    for found in ranks.call(gone_on, size, layout, checkpoint):
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


# -- gradients ----------------------------------------------------------------------------------


def accumulated(layout: str, in_place: bool) -> tuple[Captured, dict[str, torch.Tensor]]:
    """Two backwards for a step; captured between them."""
    model, optimizer = built(layout, 1)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    watch = Gradients()
    watch.watch(state)
    for number in range(2):
        backward(model, number)
        assert watch.fresh()
    optimizer.step()
    assert not watch.fresh()
    optimizer.zero_grad(set_to_none=not in_place)
    backward(model, 2)
    assert watch.fresh()
    piece = captured({**state, "gradients": watch.state()})
    backward(model, 3)
    optimizer.step()
    watch.close()
    return piece, full_state(model, optimizer)


def accumulated_again(layout: str, checkpoint: Joined) -> dict[str, torch.Tensor]:
    model, optimizer = built(layout, 2)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "gradients": {}}
    watch = Gradients()
    watch.watch(state)
    restore(checkpoint, state)
    watch.restore(state["gradients"])
    backward(model, 3)
    optimizer.step()
    watch.close()
    return full_state(model, optimizer)


@pytest.mark.parametrize(
    ("layout", "in_place"), [("fsdp", False), ("fsdp", True), ("tp", False), ("ddp", False)]
)
def test_an_accumulation_goes_on_with_the_same_bits(layout: str, in_place: bool) -> None:
    results = ranks.call(accumulated, 2, layout, in_place)
    checkpoint = Joined.of([piece for piece, _ in results])
    for found in ranks.call(accumulated_again, 2, layout, checkpoint):
        assert all(torch.equal(found[name], value) for name, value in results[0][1].items())


def sums_to_come() -> tuple[Captured, list[str]]:
    """Gradients of replicated parameters are summands in each rank, until the step."""
    model, optimizer = built("sequence", 1)
    backward(model, 0)
    watch = Gradients()
    watch.watch({"optimizer": optimizer})
    kinds = [str(getattr(p.grad, "placements", "")) for p in model.parameters()]
    expected = {number: full(p.grad) for number, p in enumerate(model.parameters())}
    piece = captured(watch.state())
    watch.close()
    values, _ = restore(Joined.of(_gathered(piece)))
    fresh = values["optimizer"]["fresh"]
    assert all(torch.equal(fresh[str(number)], value) for number, value in expected.items())
    return piece, kinds


def _gathered(piece: Captured) -> list[Captured]:
    pieces: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(pieces, piece)
    return pieces


def test_sums_that_are_not_made_yet_are_made_for_a_save() -> None:
    (_, kinds), _ = ranks.call(sums_to_come, 2)
    assert any("Partial" in kind for kind in kinds)


def unreduced() -> str:
    model, optimizer = built("fsdp", 1)
    watch = Gradients()
    watch.watch({"model": model, "optimizer": optimizer})
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(False)
    backward(model, 0)
    assert watch.fresh()  # a save that is due waits
    with pytest.raises(StateError) as error:
        watch.state()
    model.set_requires_gradient_sync(True)
    backward(model, 1)
    assert watch.state()
    watch.close()
    return str(error.value)


def test_what_fsdp_has_not_reduced_is_not_lost_unseen() -> None:
    assert "set_requires_gradient_sync(True)" in ranks.call(unreduced, 2)[0]


# -- reading in place ---------------------------------------------------------------------------


def overlapping(layout: str) -> None:
    model, optimizer = built(layout, 1)
    state = {"model": model, "optimizer": optimizer}
    drained: list[int] = []
    barrier = Barrier(lambda: drained.append(1))
    barrier.watch(state)
    train(model, optimizer, range(1))
    encoder = TreeEncoder(ranks=Ranks(distributed.get_rank(), distributed.get_world_size()))
    encoder.encode(state, "")
    protected = barrier.protected()
    leaves = {leaf.path: leaf.source for leaf in encoder.leaves if leaf.source.nbytes}
    read_in_place = {path for path, source in leaves.items() if protected(source)}
    assert read_in_place == leaves.keys() - {"model/seen"}
    marks = {path: source.mark() for path, source in leaves.items()}
    for source in leaves.values():
        assert isinstance(source, TensorSource)

    def changed() -> set[str]:
        return {path for path, source in leaves.items() if source.mark() != marks[path]}

    del drained[:]
    backward(model, 1)
    with torch.no_grad():
        model(torch.zeros(2, 4, dtype=torch.long))
    assert changed() == set()  # gathered, used, and given back
    assert drained == []
    optimizer.step()
    assert drained == [1]
    assert changed() >= {path for path in leaves if "step" not in path} - {"model/seen"}
    barrier.close()


def touching(layout: str) -> set[str]:
    """Which parameters are not seen to change where samples of their bytes stay the same."""
    model, _ = built(layout, 1)
    encoder = TreeEncoder(ranks=Ranks(distributed.get_rank(), distributed.get_world_size()))
    encoder.encode({"model": model}, "")
    marks = {leaf.path: leaf.source.mark() for leaf in encoder.leaves}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1)
    return {leaf.path for leaf in encoder.leaves if leaf.source.mark() == marks[leaf.path]}


@pytest.mark.parametrize("layout", ["fsdp", "tp", "ddp"])
def test_a_change_between_steps_shows_in_a_version(layout: str) -> None:
    assert ranks.call(touching, 2, layout) == [{"model/seen"}] * 2


@pytest.mark.parametrize("layout", ["fsdp", "fsdp_offloaded", "tp", "ddp"])
def test_only_a_step_changes_what_is_read_in_place(layout: str) -> None:
    ranks.call(overlapping, 2, layout)


def watching() -> None:
    from holdfast.torch import attributes

    model, optimizer = built("fsdp", 1)
    tokens = torch.zeros(1, 2, dtype=torch.long)
    with torch.no_grad():
        model(tokens)
    assert untracked_parameters({"model": model, "optimizer": optimizer}) == []
    assert untracked_parameters({"optimizer": optimizer})
    assert find_untracked({"optimizer": optimizer}, {"model": model}) == ["optimizer"]
    found = attributes.read({"model": model})
    assert found["model/blocks.0.norm.eps"] == 1e-5
    assert found["model.training"] is True


def test_what_looks_for_untracked_objects_knows_fsdp() -> None:
    ranks.call(watching, 2)
