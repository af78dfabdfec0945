"""A Trainer whose model is sharded (`fsdp=True`), killed anywhere and started again; in other
layouts, too. Accelerate offers no FSDP without an accelerator: here it is told to."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, state
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel, TrainerCallback

import holdfast
from holdfast.cli import main
from tests.frameworks.test_transformers_ranks import (
    Signalled,
    Steps,
    adapted,
    killed,
    killed_by_the_kernel,
    stopped,
)
from tests.support.damage import damage_newest
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.jobs import Killed, steps_of
from tests.support.tiny_transformers import Fixed, plain, tiny_model, train
from tests.support.trainer_ranks import call, copied, values

SHARDED: dict[str, Any] = {
    "transformer_layer_cls_to_wrap": ["GPT2Block"],
    "sync_module_states": False,  # which needs an accelerator
}
FSDP2: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, **SHARDED}}
FSDP1: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 1, **SHARDED}}


def on_cpu() -> None:
    """In this process, from now on."""
    made = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = init
    sharded = FullyShardedDataParallel.__init__

    def on_the_cpu(self: Any, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        # Accelerate gives "cpu:0", which FSDP1 takes for another device.
        sharded(self, *args, device_id=torch.device("cpu"), **kwargs)

    FullyShardedDataParallel.__init__ = on_the_cpu  # type: ignore[method-assign]


def killed_sharded(folder: str, every: int, settings: dict[str, Any]) -> list[Any]:
    on_cpu()
    without = train(None, **settings)
    whole, *again = killed(folder, every, settings)
    assert without == whole, "a training is the same without Holdfast"
    return [whole, *again]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({**FSDP2, "eval_strategy": "epoch"}, id="FSDP2"),
        pytest.param(
            {**FSDP2, "model": adapted, "gradient_accumulation_steps": 2},
            id="FSDP2, LoRA",
            marks=pytest.mark.slow,
        ),
        pytest.param(FSDP1, id="FSDP1", marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere(settings: dict[str, Any], tmp_path: Path) -> None:
    for whole, *again in values(call(killed_sharded, 2, str(tmp_path), 3, settings)):
        assert len(again) >= 2
        for made, outcome in again:
            assert made < whole["state"][0]
            assert outcome == whole, f"with {made} steps to make"


# -- in other layouts, and by other rules ----------------------------------------------------

SETTINGS: dict[str, Any] = {"num_train_epochs": 3, "per_device_train_batch_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {"FSDP2": FSDP2, "FSDP1": FSDP1, "plain": {}}


class Dying(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def trained(address: str, layout: str, die_at: int | None) -> Any:
    on_cpu()
    settings = {**SETTINGS, **LAYOUTS[layout]}
    if die_at is None:
        steps = Steps()
        return train(address, steps, **settings), steps.count
    with pytest.raises(Killed):
        train(address, Dying(die_at), **settings)
    return None


@pytest.mark.slow
def test_on_another_number_of_ranks_and_in_another_layout(tmp_path: Path) -> None:
    """Sharded on two, whole on one, sharded otherwise on two, on each the rest of the samples;
    and once more where nothing is left to do."""
    address = str(tmp_path / "run")
    # An epoch of 18 samples has 5 steps on two ranks, and 9 on one.
    call_values(2, address, "FSDP2", 3)
    call_values(1, address, "plain", 6)
    call_values(2, address, "FSDP1", 11)
    whole = call_values(2, address, "FSDP2", None)
    assert whole[0][0]["weights"] == whole[1][0]["weights"]
    assert whole[0][0]["state"][1] == 3.0
    others = ((2, "plain"), (2, "FSDP1"), (2, "FSDP2")) if EXHAUSTIVE else ()
    for size, layout in ((1, "plain"), *others):
        for outcome, made in call_values(size, address, layout, None):
            assert made == 0
            assert outcome["weights"] == whole[0][0]["weights"], layout


def call_values(size: int, *args: Any) -> list[Any]:
    return values(call(trained, size, *args))


def rules(folder: str, layout: str) -> dict[str, Any]:
    on_cpu()
    found: dict[str, Any] = {}
    settings: dict[str, Any] = {**LAYOUTS[layout], "eval_strategy": "epoch", "num_train_epochs": 3}
    settings["max_grad_norm"] = 0.5  # less than there is
    whole = train(f"{folder}/whole", **settings)
    stopped_at = stopped(f"{folder}/stopped", Signalled(1, 2), run={"every": None}, **settings)
    found["weights"] = whole["weights"]
    found["stopped"] = stopped_at, train(f"{folder}/stopped", **settings) == whole
    # The Trainer has begun at the newest one by the time that it turns out to be damaged.
    damaged = copied(f"{folder}/whole", f"{folder}/damaged")
    if dist.get_rank() == 0:
        with holdfast.CheckpointManager(damaged) as manager:
            manager.prune("last=2")
        damage_newest(Path(damaged))
    dist.barrier()
    found["damaged"] = train(damaged, **settings) == whole
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["FSDP2", "FSDP1"] if EXHAUSTIVE else ["FSDP2"])
def test_rules(layout: str, tmp_path: Path) -> None:
    for found in values(call(rules, 2, str(tmp_path), layout)):
        assert found["stopped"] == (75, True)
        assert found["damaged"]
    folder = tmp_path / "model"
    assert main(["export", str(tmp_path / "whole"), str(folder), "--to", "hf"]) == 0
    assert plain(dict(GPT2LMHeadModel.from_pretrained(folder).state_dict())) == found["weights"]


def best_of(folder: str) -> Any:
    on_cpu()
    best: dict[str, Any] = {
        **FSDP2,
        "eval_strategy": "epoch",
        "num_train_epochs": 3,
        "output_dir": f"{folder}/own",
        "save_strategy": "epoch",
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # the first
        "load_best_model_at_end": True,
        "run": {"keep": "last=1 best=1:eval_loss:max"},
    }
    one = train(f"{folder}/best", **best)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(f"{folder}/own")
    dist.barrier()
    return [one, train(f"{folder}/best", **best)]


@pytest.mark.slow
def test_the_best_model(tmp_path: Path) -> None:
    """Not of FSDP1: the Trainer's own save of that dies of a segmentation fault on the CPU."""
    for one, again in values(call(best_of, 2, str(tmp_path))):
        assert one["best"][1] == 3
        assert again["weights"] == one["weights"]


def sharded_and_killed(address: str, rank: int | None) -> Any:
    on_cpu()
    return killed_by_the_kernel(address, rank, **FSDP2)


@pytest.mark.slow
def test_killed_by_the_kernel(tmp_path: Path) -> None:
    whole = values(call(sharded_and_killed, 2, str(tmp_path / "whole"), None))
    address = str(tmp_path / "run")
    ended = call(sharded_and_killed, 2, address, 0)
    assert [one.status for one in ended] == 2 * [-signal.SIGKILL]
    assert 3 <= steps_of(address)[-1] <= 4
    assert values(call(sharded_and_killed, 2, address, None)) == whole


# -- loops of one's own, with Accelerate ------------------------------------------------------


def looped(address: str, version: int, die_at: int | None = None) -> Any:
    """What a rank has at the end: its losses, and the whole weights and moments."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        sync_module_states=False if version == 1 else None,
    )
    for shared in (state.AcceleratorState, state.GradientState):
        shared._reset_state()
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    torch.manual_seed(3)
    model: Any = tiny_model()
    optimizer: Any = torch.optim.AdamW(model.parameters(), 0.01)
    loader: Any = DataLoader(Fixed(12), 2, shuffle=True)
    if version == 1:  # its parameters are those that an optimizer must get
        model = accelerator.prepare(model)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        optimizer, loader = accelerator.prepare(optimizer, loader)
    else:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[float] = []
    with holdfast.Run(address, every=1, keep=None, quiet=True) as run:
        run.track(model=model, optimizer=optimizer)
        kept = run.box(losses=losses)
        for _ in run.epochs(2):
            for batch in run.batches(loader):
                if run.step == die_at:
                    raise Killed
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                kept.losses = [*kept.losses, loss.item()]
        return kept.losses, plain(dict(model.state_dict())), plain(optimizer.state_dict())


def looped_and_killed(folder: str, version: int) -> Any:
    on_cpu()
    whole = looped(f"{folder}/whole", version)
    for die_at in (2, 4):
        with pytest.raises(Killed):
            looped(f"{folder}/run", version, die_at)
    return whole, looped(f"{folder}/run", version)


@pytest.mark.slow
@pytest.mark.parametrize("version", [2, 1] if EXHAUSTIVE else [2])
def test_a_loop_with_accelerate(version: int, tmp_path: Path) -> None:
    for whole, again in values(call(looped_and_killed, 2, str(tmp_path), version)):
        assert len(whole[0]) == 6
        assert again == whole
