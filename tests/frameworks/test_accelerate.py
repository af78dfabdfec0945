"""Loops with what Accelerate has prepared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader

import holdfast
from tests.support.jobs import Copying, Countdown, copied, fresh_address
from tests.support.tiny_transformers import Stream, Texts, plain


def loop(
    address: str, die: Any, *, stream: bool = False, accumulate: int = 1, **config: Any
) -> Any:
    """The losses, the weights, the moments, the rates and the order of the data."""
    set_seed(3)
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(**config),
    )
    model: Any = torch.nn.Sequential(
        torch.nn.Embedding(50, 4), torch.nn.Dropout(), torch.nn.Flatten(), torch.nn.Linear(32, 1)
    )
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler: Any = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    data: Any = Stream() if stream else Texts()
    loader: Any = DataLoader(data, batch_size=4, shuffle=not stream)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    steps = holdfast.Variables(vars(accelerator), "step")
    with holdfast.Run(address, every=1, quiet=True) as run:
        run.track(model=model, optimizer=optimizer, scheduler=scheduler, data=loader, steps=steps)
        seen = run.box(losses=[]).losses
        for _ in run.epochs(2):
            for batch in run.batches(loader):
                with accelerator.accumulate(model):
                    loss = model(batch["input_ids"]).square().mean()
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                seen.append((loss.item(), batch["input_ids"].tolist(), scheduler.get_last_lr()))
                die()
    return plain([seen, model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_seedable_sampler": True, "accumulate": 2},
        {"stream": True},
        {"stream": True, "dispatch_batches": False},
    ],
    ids=lambda settings: "-".join(map(str, settings)) or "plain",
)
def test_killed_anywhere(settings: dict[str, Any]) -> None:
    address = fresh_address()
    places = Copying(address)
    whole = loop(address, places, **settings)
    assert places.calls == 10
    assert whole[0][0] != whole[0][5]
    for place, left in enumerate(places.left):
        if place % 2 or place < 2:
            assert loop(left, Countdown(), **settings) == whole, f"killed at place {place}"


def test_state_is_that_of_what_was_prepared() -> None:
    """A checkpoint of prepared objects restores into bare ones, in place, and the other way."""
    accelerator = Accelerator(cpu=True)
    bare = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(bare, 0.9)
    optimizer, scheduler = accelerator.prepare(bare, schedule)
    address = fresh_address()
    with holdfast.CheckpointManager(address) as manager:
        manager.save(1, {"optimizer": optimizer, "scheduler": scheduler}).result()
        for into in (
            {"optimizer": bare, "scheduler": schedule},
            {"optimizer": optimizer, "scheduler": scheduler},
        ):
            before = dict(into)
            bare.param_groups[0]["lr"] = 3.0
            schedule.last_epoch = 7
            manager.restore(into=into)
            assert all(into[name] is before[name] for name in into)
            assert bare.param_groups[0]["lr"] == 0.1
            assert schedule.last_epoch == 0
    assert copied(address)


def test_an_optimizer_that_is_tracked_bare_is_tracked(capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(2, 2)
    bare = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer = Accelerator(cpu=True).prepare(bare)
    run = holdfast.Run(fresh_address())
    run.track(model=model, optimizer=bare)
    for _ in run.range(1):
        optimizer.zero_grad()
    run.close()
    assert "not tracked" not in capsys.readouterr().err
