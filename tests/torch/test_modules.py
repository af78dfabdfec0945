"""Modules: in place, through load_state_dict, wrappers, tied weights, reports."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import device_mesh
from torch.distributed.tensor import distribute_module

from holdfast.errors import StateError, StructureMismatch, UnsupportedValue
from holdfast.torch.modules import match_names, plain_loading
from tests.torch.roundtrip import Checkpoint, assert_same


def network() -> Any:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), flat=nn.Flatten(), head=nn.Linear(4, 2)
        )
    )


def named(**parts: nn.Module) -> Any:
    return nn.ModuleDict(parts)


def scrambled(module: nn.Module) -> Any:
    """A copy with other values everywhere."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.copy_(torch.full_like(tensor, 7))
    return other


def test_a_module_is_restored_into_the_tensors_that_it_has() -> None:
    saved, live = network(), scrambled(network())
    live.conv.weight.requires_grad_(False)
    live.to(memory_format=torch.channels_last)
    tensors = dict(live.state_dict(keep_vars=True).items())  # a copy
    before = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    Checkpoint({"model": saved}).restore({"model": live})
    assert plain_loading(live)
    after = live.state_dict(keep_vars=True)
    assert all(after[name] is tensors[name] for name in tensors)
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == before
    assert not live.conv.weight.requires_grad
    assert live.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert_same(dict(live.state_dict()), dict(saved.state_dict()))


def test_leaf_paths_are_readable() -> None:
    paths = [leaf.path for leaf in Checkpoint({"model": network()}).leaves]
    assert paths[:2] == ["model/conv.weight", "model/conv.bias"]


def test_without_a_target_it_is_the_state_dict_that_torch_would_load() -> None:
    saved = network()
    state = Checkpoint({"model": saved}).restore()["model"]
    assert_same(dict(state), dict(saved.state_dict()))
    assert list(state) == list(saved.state_dict())
    assert state._metadata == dict(saved.state_dict()._metadata)
    live = scrambled(saved)
    live.load_state_dict(state)
    assert_same(dict(live.state_dict()), dict(saved.state_dict()))


def test_a_dict_of_live_tensors_can_be_the_target() -> None:
    saved, live = network(), scrambled(network())
    target = live.state_dict()
    Checkpoint({"model": saved}).restore({"model": target})
    assert_same(dict(live.state_dict()), dict(saved.state_dict()))


# -- tied weights -----------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def test_tied_weights_are_stored_once_and_stay_tied() -> None:
    saved, live = Tied(), scrambled(Tied())
    checkpoint = Checkpoint({"model": saved})
    assert checkpoint.stored_bytes == 5 * 3 * 4
    checkpoint.restore({"model": live})
    assert live.head.weight is live.embedding.weight
    assert_same(dict(live.state_dict()), dict(saved.state_dict()))
    loaded = checkpoint.restore()["model"]
    assert loaded["head.weight"].data_ptr() == loaded["embedding.weight"].data_ptr()


def test_untied_weights_do_not_fit_a_tied_model() -> None:
    with pytest.raises(StructureMismatch, match=r"head\.weight.*not tied to 'm/embedding\.weight'"):
        Checkpoint({"m": Tied(tied=False)}).restore({"m": Tied()})


def test_weights_that_were_tied_do_not_fit_a_model_where_they_are_not() -> None:
    live = Tied(tied=False)
    checkpoint = Checkpoint({"m": Tied()})
    with pytest.raises(StructureMismatch, match=r"saved as tied to 'm/embedding\.weight'"):
        checkpoint.restore({"m": live})
    checkpoint.restore({"m": live}, strict=False)
    assert live.head.weight.tolist() == live.embedding.weight.tolist()


# -- wrappers -----------------------------------------------------------------------


class Wrapper(nn.Module):
    """Holds a module under the name that a real wrapper uses."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


WRAPPINGS: dict[str, Any] = {
    "plain": lambda module: module,
    "module": lambda module: Wrapper("module", module),
    "_orig_mod": lambda module: Wrapper("_orig_mod", module),
    "both": lambda module: Wrapper("module", Wrapper("_orig_mod", module)),
    "DataParallel": nn.DataParallel,
    "compiled": lambda module: compiled(module),
    "compiled parallel": lambda module: nn.DataParallel(compiled(module)),
}


@pytest.mark.parametrize("live_in", WRAPPINGS)
@pytest.mark.parametrize("saved_in", WRAPPINGS)
def test_prefixes_never_matter(saved_in: str, live_in: str) -> None:
    saved, live = network(), scrambled(network())
    checkpoint = Checkpoint({"m": WRAPPINGS[saved_in](saved)})
    checkpoint.restore({"m": WRAPPINGS[live_in](live)})
    assert_same(dict(live.state_dict()), dict(saved.state_dict()))


def test_real_wrappers_leave_no_trace_in_the_checkpoint() -> None:
    inner = network()
    names = list(inner.state_dict())
    for name in ("DataParallel", "compiled", "compiled parallel"):
        state = Checkpoint({"m": WRAPPINGS[name](inner)}).restore()["m"]
        assert list(state) == names
        assert set(state._metadata) == set(inner.state_dict()._metadata)


def test_a_compiled_part_of_a_model() -> None:
    saved, live = network(), scrambled(network())
    saved.head = compiled(saved.head)
    checkpoint = Checkpoint({"m": saved})
    assert "m/head.weight" in [leaf.path for leaf in checkpoint.leaves]
    checkpoint.restore({"m": live})
    assert live.head.weight.tolist() == saved.head.weight.tolist()


@pytest.mark.usefixtures("world_of_one")
def test_distributed_data_parallel() -> None:
    saved, live = network(), scrambled(network())
    wrapped = nn.parallel.DistributedDataParallel(saved)
    checkpoint = Checkpoint({"m": wrapped})
    assert checkpoint.leaves[0].path == "m/conv.weight"
    checkpoint.restore({"m": live})
    assert_same(dict(live.state_dict()), dict(saved.state_dict()))
    scrambled_again = scrambled(network())
    checkpoint.restore({"m": nn.parallel.DistributedDataParallel(scrambled_again)})
    assert_same(dict(scrambled_again.state_dict()), dict(saved.state_dict()))


class Special(nn.Parameter):
    """As vendors do, to carry attributes."""


def test_kinds_of_parameters_keep_their_class() -> None:
    saved, live = nn.Linear(2, 2), nn.Linear(2, 2)
    saved.weight, live.weight = Special(torch.ones(2, 2)), Special(torch.zeros(2, 2))
    saved.register_buffer("cache", nn.Buffer(torch.ones(2)))
    live.register_buffer("cache", nn.Buffer(torch.zeros(2)))
    weight = live.weight
    Checkpoint({"m": saved}).restore({"m": live})
    assert live.weight is weight
    assert_same(dict(live.state_dict()), dict(saved.state_dict()))
    assert type(Checkpoint({"p": saved.weight}).restore()["p"]) is nn.Parameter


@pytest.mark.usefixtures("world_of_one")
def test_distributed_tensors_of_one_process_are_as_plain_ones() -> None:
    mesh = device_mesh.init_device_mesh("cpu", (1,))
    distributed, plain = nn.Linear(2, 2), nn.Linear(2, 2)
    saved = plain.weight.detach().clone()
    distribute_module(distributed, mesh)
    Checkpoint({"m": plain}).restore({"m": distributed})
    scrambled(plain)
    checkpoint = Checkpoint({"m": distributed})
    live = nn.Linear(2, 2)
    checkpoint.restore({"m": live})
    assert torch.equal(live.weight, saved)
    assert type(checkpoint.restore()["m"]["weight"]) is torch.Tensor


def test_an_averaged_model_has_a_module_of_its_own() -> None:
    model = network()
    saved = torch.optim.swa_utils.AveragedModel(model)
    saved.update_parameters(scrambled(model))
    saved.update_parameters(model)
    live = torch.optim.swa_utils.AveragedModel(scrambled(model))
    checkpoint = Checkpoint({"ema": saved})
    checkpoint.restore({"ema": live})
    assert live.n_averaged == 2
    assert_same(dict(live.state_dict()), dict(saved.state_dict()))
    assert "module.conv.weight" in checkpoint.restore()["ema"]


def test_names_match_exactly_before_they_match_bare() -> None:
    assert match_names(["module.x", "x"], ["x", "module.x"]) == {"module.x": "module.x", "x": "x"}
    assert match_names(["module.x"], ["x"]) == {"module.x": "x"}
    assert match_names(["a._orig_mod.x"], ["module.a.x"]) == {"a._orig_mod.x": "module.a.x"}
    # Two candidates: neither is guessed.
    assert match_names(["x"], ["module.x", "_orig_mod.x"]) == {}
    assert match_names(["submodule.x"], ["x"]) == {}


# -- reports ------------------------------------------------------------------------


def test_everything_that_differs_is_in_one_report() -> None:
    saved = named(a=nn.Linear(2, 2), b=nn.Linear(2, 2), c=nn.Linear(3, 2))
    live = named(a=nn.Linear(2, 2).double(), c=nn.Linear(4, 2), d=nn.Linear(1, 1))
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    checkpoint = Checkpoint({"m": saved})
    with pytest.raises(StructureMismatch) as caught:
        checkpoint.restore({"m": live})
    assert caught.value.missing == ("m/d.weight", "m/d.bias")
    assert caught.value.unexpected == ("m/b.weight", "m/b.bias")
    assert caught.value.changed == (
        "m/a.weight: saved as float32[2, 2], live is float64[2, 2]",
        "m/a.bias: saved as float32[2], live is float64[2]",
        "m/c.weight: saved as float32[2, 3], live is float32[2, 4]",
    )
    assert_same(dict(live.state_dict()), before)
    checkpoint.restore({"m": live}, strict=False)
    assert live.c.bias.tolist() == saved.c.bias.tolist()
    assert_same(live.a.weight.data, before["a.weight"])


def test_parts_can_be_skipped_chosen_and_renamed() -> None:
    saved = named(old=nn.Linear(2, 2), head=nn.Linear(2, 2))
    live = named(new=nn.Linear(2, 2), head=nn.Linear(2, 5))
    checkpoint = Checkpoint({"m": saved})
    checkpoint.restore({"m": live}, rename={"m/old": "m/new"}, skip=["m/head"])
    assert live.new.weight.tolist() == saved.old.weight.tolist()
    other = named(old=nn.Linear(2, 2), head=nn.Linear(2, 2))
    head = other.head.weight.clone()
    checkpoint.restore({"m": other}, only=["m/old"])
    assert other.old.weight.tolist() == saved.old.weight.tolist()
    assert other.head.weight.tolist() == head.tolist()


def test_a_module_does_not_fit_something_else() -> None:
    with pytest.raises(StructureMismatch, match="a module"):
        Checkpoint({"m": network()}).restore({"m": torch.zeros(2)})
    with pytest.raises(StructureMismatch, match="Linear"):
        Checkpoint({"m": torch.zeros(2)}).restore({"m": nn.Linear(1, 1)})


# -- extra state, hooks, lazy modules ---------------------------------------------------


class Counting(nn.Module):
    def __init__(self, count: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        self.count = count
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("absent", None)

    def get_extra_state(self) -> Any:
        return {"count": self.count, "history": torch.arange(self.count), "text": "x" * 5000}

    def set_extra_state(self, state: Any) -> None:
        assert len(state["text"]) == 5000
        assert state["history"].tolist() == list(range(state["count"]))
        self.count = state["count"]


def test_extra_state_is_set_after_its_bytes_came() -> None:
    saved, live = nn.Sequential(Counting(3)), nn.Sequential(Counting())
    checkpoint = Checkpoint({"m": saved})
    assert plain_loading(live)
    checkpoint.restore({"m": live})
    assert live[0].count == 3
    assert "m/0.cache" not in [leaf.path for leaf in checkpoint.leaves]
    assert checkpoint.restore()["m"]["0._extra_state"]["count"] == 3


def test_missing_extra_state_is_reported() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2))

    with pytest.raises(StructureMismatch) as caught:
        Checkpoint({"m": Plain()}).restore({"m": Counting()})
    assert caught.value.missing == ("m/_extra_state",)
    with pytest.raises(StructureMismatch) as caught:
        Checkpoint({"m": Counting()}).restore({"m": Plain()})
    assert caught.value.unexpected == ("m/_extra_state",)


def test_extra_state_that_cannot_be_set_is_an_error() -> None:
    class OneWay(nn.Module):
        def get_extra_state(self) -> Any:
            return 1

    with pytest.raises(StateError, match="set_extra_state"):
        Checkpoint({"m": OneWay()}).restore({"m": OneWay()})


class Renaming(nn.Module):
    """Loads checkpoints of its past, in which the weight had another name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        self.loads = 0

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.loads += 1
        if f"{prefix}w" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}w")
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_a_module_with_its_own_loading_does_it_itself() -> None:
    saved, live = Renaming(), nn.DataParallel(Renaming())
    assert not plain_loading(live)
    weight = live.module.weight
    Checkpoint({"m": saved}).restore({"m": live})
    assert live.module.loads == 1
    assert live.module.weight is weight
    assert weight.tolist() == saved.weight.tolist()


def test_old_names_reach_the_modules_own_loading_if_differences_are_allowed() -> None:
    past = nn.ParameterDict({"w": torch.ones(2)})
    live = Renaming()
    with pytest.raises(StructureMismatch):
        Checkpoint({"m": past}).restore({"m": live})
    assert live.loads == 0
    Checkpoint({"m": past}).restore({"m": live}, strict=False)
    assert live.weight.tolist() == [1, 1]


def test_hooks_run() -> None:
    saved, live = network(), scrambled(network())
    calls: list[str] = []
    live.register_load_state_dict_pre_hook(lambda *_: calls.append("pre"))
    live.register_load_state_dict_post_hook(lambda *_: calls.append("post"))
    assert not plain_loading(live)
    Checkpoint({"m": saved}).restore({"m": live})
    assert calls == ["pre", "post"]
    assert_same(dict(live.state_dict()), dict(saved.state_dict()))


def test_a_shape_that_differs_is_reported_before_hooks_run() -> None:
    live = nn.Linear(3, 2)
    live.register_load_state_dict_post_hook(lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(StructureMismatch, match=r"float32\[2, 2\], live is float32\[2, 3\]"):
        Checkpoint({"m": nn.Linear(2, 2)}).restore({"m": live})


def test_an_error_of_the_modules_own_loading_is_explained() -> None:
    live = nn.Linear(2, 2)

    def refuse(*_: Any) -> None:
        raise RuntimeError("not today")

    live.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(StateError, match=r"Linear at 'm' failed: not today"):
        Checkpoint({"m": nn.Linear(2, 2)}).restore({"m": live})


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_lazy_modules() -> None:
    saved = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    unseen = Checkpoint({"m": saved})
    saved(torch.randn(2, 4))
    seen = Checkpoint({"m": saved})

    live = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    parameter = live[0].weight
    seen.restore({"m": live})
    assert live[0].weight is parameter
    assert parameter.shape == (3, 4)
    assert parameter.requires_grad
    assert_same(dict(live.state_dict()), dict(saved.state_dict()))

    still_lazy: Any = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    unseen.restore({"m": still_lazy})
    assert nn.parameter.is_lazy(still_lazy[0].weight)
    with pytest.raises(StructureMismatch, match="uninitialized"):
        unseen.restore({"m": saved})


def test_uninitialized_parameters_are_never_written_in_place() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.UninitializedParameter()

    assert not plain_loading(nn.Sequential(Late()))


def test_normalised_weights() -> None:
    def make() -> Any:
        spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), spectral)

    saved, live = make(), scrambled(make())
    saved(torch.randn(2, 4))
    Checkpoint({"m": saved}).restore({"m": live})
    assert_same(dict(live.state_dict()), dict(saved.state_dict()))


def test_recurrent_and_attention_modules() -> None:
    def make() -> Any:
        layer = nn.TransformerEncoderLayer(4, 2, 8)
        return nn.ModuleList([nn.LSTM(3, 4, 2), layer, nn.MultiheadAttention(4, 2, kdim=3, vdim=3)])

    saved, live = make(), scrambled(make())
    assert plain_loading(live)
    Checkpoint({"m": saved}).restore({"m": live})
    assert_same(dict(live.state_dict()), dict(saved.state_dict()))
    sequence = torch.randn(5, 1, 3)
    assert_same(live[0](sequence)[0], saved[0](sequence)[0])


def test_metadata_follows_the_names_of_the_live_module() -> None:
    seen: list[Any] = []

    class Versioned(nn.Linear):
        _version = 5

        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
            seen.append(metadata.get("version"))
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    checkpoint = Checkpoint({"m": nn.DataParallel(nn.Sequential(Versioned(2, 2)))})
    for live in (nn.Sequential(Versioned(2, 2)), Wrapper("module", nn.Sequential(Versioned(2, 2)))):
        checkpoint.restore({"m": live})
    assert seen == [5, 5]


def test_keys_must_be_strings() -> None:
    class Odd(nn.Module):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {1: torch.zeros(2)}

    with pytest.raises(UnsupportedValue, match="key 1"):
        Checkpoint({"m": Odd()})


def test_a_value_without_a_name_for_it_keeps_the_path_in_its_error() -> None:
    class Strange(nn.Module):
        def get_extra_state(self) -> Any:
            return object()

    with pytest.raises(UnsupportedValue) as caught:
        Checkpoint({"m": nn.Sequential(Strange())})
    assert caught.value.path == "m/0._extra_state"
