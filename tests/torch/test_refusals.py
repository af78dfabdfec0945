"""What is said about PyTorch's objects that cannot be saved, restored or resumed: the place,
and a way out that works."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, TensorDataset

import holdfast
from holdfast.errors import HoldfastError, LoopError, StateError, UnsupportedValue
from tests.support.jobs import fresh_address, killed_at, process
from tests.support.refusals import Refusal


def save(value: Any) -> None:
    with holdfast.CheckpointManager(fresh_address()) as manager:
        manager.save(1, {"x": value}, block=True)


def restore(saved: Any, live: Any) -> None:
    with holdfast.CheckpointManager(fresh_address()) as manager:
        manager.save(1, {"x": saved}, block=True)
        manager.restore({"x": live})


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch will drop them
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


class Wrapped(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


class OneWay(nn.Module):
    def get_extra_state(self) -> Any:
        return 1


class OddKeys(nn.Module):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {1: torch.zeros(2)}


class Refusing(nn.Linear):
    def _load_from_state_dict(self, *args: Any) -> None:
        raise RuntimeError("not today")


class RefusingSGD(torch.optim.SGD):
    def load_state_dict(self, state_dict: Any) -> None:
        raise ValueError("not today")


class RefusingSchedule(lr_scheduler.StepLR):
    def load_state_dict(self, state_dict: Any) -> None:
        raise KeyError("not today")


def optimizer(kind: type[torch.optim.Optimizer] = torch.optim.SGD) -> torch.optim.Optimizer:
    return kind([nn.Parameter(torch.ones(1))], lr=0.1)  # type: ignore[call-arg]


class Shrinking(SequentialSampler):
    length = 8

    def __iter__(self) -> Iterator[int]:
        return iter(range(type(self).length))

    def __len__(self) -> int:
        return 8


class Stream(IterableDataset[int]):
    length = 8

    def __iter__(self) -> Iterator[int]:
        return iter(range(type(self).length))


def shorter(kind: Any, make: Callable[[], DataLoader[Any]]) -> None:
    try:
        address = killed_at(3, lambda run: run.batches(make()))
        kind.length = 2
        next(holdfast.Run(address, quiet=True).batches(make()))
    finally:
        kind.length = 8


CASES: dict[str, tuple[Callable[[], Any], type[HoldfastError], str, str]] = {
    "nested tensor": (
        lambda: save(nested()),
        UnsupportedValue,
        "cannot save 'x': it is a nested tensor",
        "Save its parts: list(tensor.unbind()).",
    ),
    "quantized tensor": (
        lambda: save(quantized()),
        UnsupportedValue,
        "cannot save 'x': it is a quantized tensor (qint8)",
        "Save tensor.int_repr() with its scale and zero point.",
    ),
    "tensor without data": (
        lambda: save(torch.ones(2, device="meta")),
        UnsupportedValue,
        "without data",
        "Materialise it first, e.g. module.to_empty(device='cpu') and load its weights.",
    ),
    "another layout": (
        lambda: save(torch.zeros(2).to_mkldnn()),
        UnsupportedValue,
        "cannot save 'x': it is a tensor with layout _mkldnn",
        "Save it as a dense tensor: .to_dense().",
    ),
    "tensor of another class": (
        lambda: save(torch.ones(2).as_subclass(Wrapped)),
        UnsupportedValue,
        "test_refusals.Wrapped, not in this version",
        "e.g. tensor.as_subclass(torch.Tensor)",
    ),
    "into another class": (
        lambda: restore(torch.ones(2), torch.ones(2).as_subclass(Wrapped)),
        StateError,
        "test_refusals.Wrapped, not in this version",
        "Restore into plain tensors, before they are wrapped.",
    ),
    "into a tensor without memory": (
        lambda: restore(torch.ones(2), torch.ones(2, device="meta")),
        StateError,
        "cannot restore into 'x': it is on the meta device, without memory",
        "Call module.to_empty(device=...) before the restore.",
    ),
    "keys": (
        lambda: save(OddKeys()),
        UnsupportedValue,
        "cannot save 'x': it is a module whose state_dict has the key 1",
        "Its keys must be strings.",
    ),
    "extra state": (
        lambda: restore(OneWay(), OneWay()),
        StateError,
        "OneWay has get_extra_state() but no set_extra_state()",
        "Define set_extra_state(self, state).",
    ),
    "a module that refuses": (
        lambda: restore(nn.Linear(1, 1), Refusing(1, 1)),
        StateError,
        "Refusing at 'x' failed: not today",
        "Its parameters may be partly restored: do not go on with this model.",
    ),
    "an optimizer that refuses": (
        lambda: restore(optimizer(RefusingSGD), optimizer(RefusingSGD)),
        StateError,
        "RefusingSGD at 'x' failed: not today",
        "The optimizer may be partly restored: do not go on with it.",
    ),
    "a schedule that refuses": (
        lambda: restore(
            RefusingSchedule(optimizer(), 1),
            RefusingSchedule(optimizer(), 1),
        ),
        StateError,
        "RefusingSchedule at 'x' failed: 'not today'",
        "It may be partly restored: do not go on with it.",
    ),
    "fewer samples": (
        lambda: shorter(
            Shrinking, lambda: DataLoader(TensorDataset(torch.ones(8)), sampler=Shrinking(range(8)))
        ),
        LoopError,
        "DataLoader has only 2 batches now; 3 had been taken",
        "Put its data and sampler back as they were.",
    ),
    "a shorter stream": (
        lambda: shorter(Stream, lambda: DataLoader(Stream(), batch_size=1)),
        LoopError,
        "the dataset of DataLoader has only 2 batches now; 3 had been taken",
        "Put its data back as it was.",
    ),
}


@pytest.mark.parametrize("refusal", CASES.values(), ids=CASES)
def test_what_a_refusal_says(refusal: tuple[Any, ...]) -> None:
    Refusal(*refusal).check()


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (nested(), lambda value: list(value.unbind())),
        (quantized(), lambda value: [value.int_repr(), value.q_scale(), value.q_zero_point()]),
        (torch.zeros(2).to_mkldnn(), lambda value: value.to_dense()),
        (OneWay(), lambda value: value.state_dict()["_extra_state"]),
    ],
    ids=["nested", "quantized", "mkldnn", "extra state"],
)
def test_what_the_hints_advise_can_be_saved(value: Any, plain: Callable[[Any], Any]) -> None:
    save(plain(value))


class Own(DataLoader[Any]):
    def __iter__(self) -> Any:
        return super().__iter__()


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda: Own(Stream(), num_workers=1, persistent_workers=True),
            "Own has an __iter__ of its own and persistent_workers=True: random numbers drawn in "
            "its workers go on from epoch to epoch and cannot be replayed",
        ),
        (
            lambda: DataLoader(TensorDataset(torch.ones(4)), num_workers=1, in_order=False),
            "DataLoader has in_order=False: Holdfast delivers its batches in order, because an "
            "order that depends on timing cannot be resumed",
        ),
        (
            lambda: DataLoader(Stream(), num_workers=1, persistent_workers=True),
            "DataLoader: workers of an IterableDataset start anew in each epoch in spite of "
            "persistent_workers=True, so that the epoch can be replayed",
        ),
    ],
    ids=["own iter", "out of order", "persistent stream"],
)
def test_what_is_said_of_a_loader_once(
    make: Callable[[], DataLoader[Any]], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    loader = make()
    run = holdfast.Run(fresh_address(), quiet=True)
    with process():
        for _ in run.epochs(2):
            for _ in run.batches(loader):
                pass
    assert [record.getMessage() for record in caplog.records] == [line]
    run.close()
