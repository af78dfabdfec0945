"""What ranks have alike is written once, by all of them together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from holdfast.errors import SaveFailed
from holdfast.manager.manager import CheckpointManager
from holdfast.repo.repo import Repo
from holdfast.stores.memory import MemoryStore
from tests.support.thread_ranks import ThreadGroup, all_ranks, run_ranks

SIZE = 3


def trained(seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(seed)
    # Above 8 MiB, so that it has several chunks.
    model = torch.nn.Sequential(torch.nn.Linear(1700, 1700), torch.nn.BatchNorm1d(1700))
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_models_and_optimizers_are_divided(first: str) -> None:
    store = MemoryStore("here")

    def save(group: ThreadGroup) -> None:
        model, optimizer = trained()
        model[1].running_mean.fill_(group.ranks.rank)  # pyright: ignore
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if first == "optimizer":
            state = dict(reversed(state.items()))
        with CheckpointManager("", store=store, group=group) as ckpts:
            ckpts.save(1, state, rng=False).result()

    all_ranks(SIZE, save)
    repo = Repo(store)
    [record] = repo.records()
    manifest = repo.manifest(record)
    own = {leaf.path for leaf in manifest.leaves if leaf.path.startswith("@")}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert own == {f"@{rank}/model/1.{name}" for rank in (1, 2) for name in buffers}
    written: dict[str, int] = {}
    for name, nbytes in record.packs.items():
        rank = name.rsplit("-", 2)[1]
        written[rank] = written.get(rank, 0) + nbytes
    whole = 3 * 1700 * 1702 * 4
    assert sum(written.values()) < 1.05 * whole
    # To the chunk of 8 MiB.
    assert max(written.values()) - min(written.values()) < 2 * (8 << 20)


def test_models_that_differ_are_not_mixed_up() -> None:
    store = MemoryStore("here")

    def save(group: ThreadGroup) -> None:
        model, _ = trained(group.ranks.rank)
        with CheckpointManager("", store=store, group=group) as ckpts:
            ckpts.save(1, {"model": model, "epoch": 0}, rng=False).result()

    results = run_ranks(SIZE, save)
    assert [type(result) for result in results] == [SaveFailed] * SIZE
    assert "other values in model" in str(results[0])
    assert "per_rank=['model']" in str(results[0])
    assert Repo(store).records() == ()


def test_models_of_each_rank_come_back() -> None:
    store = MemoryStore("here")

    def save(group: ThreadGroup) -> bool:
        model, optimizer = trained(group.ranks.rank)
        state = {"model": model, "optimizer": optimizer}
        with CheckpointManager("", store=store, group=group, per_rank=["model"]) as ckpts:
            ckpts.save(1, state, rng=False).result()
            fresh, other = trained(9)
            ckpts.restore({"model": fresh, "optimizer": other}, rng=False)
            moments = zip(model.parameters(), fresh.parameters(), strict=True)
            same_moments = all(
                torch.equal(optimizer.state[mine]["exp_avg"], other.state[theirs]["exp_avg"])
                for mine, theirs in moments
            )
            return same_moments and all(
                torch.equal(mine, theirs)
                for mine, theirs in zip(
                    model.state_dict().values(), fresh.state_dict().values(), strict=True
                )
            )

    assert all_ranks(SIZE, save) == [True] * SIZE
