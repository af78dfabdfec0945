"""Which parameter of a live optimizer is which of the one that was saved.

An optimizer knows its parameters by their order. Where the tracked modules tell more, that
counts: the checkpoint says which leaf each parameter was saved as (`leaves`), and a restore
says which leaf a live tensor is filled from. Where there are names, from
`Adam(model.named_parameters())`, they count next.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import index
from typing import Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from holdfast.core.adapters import Decoder, Encoder
from holdfast.core.types import Node
from holdfast.torch.dtypes import describe
from holdfast.torch.modules import bare
from holdfast.torch.saved import malformed, naturals
from holdfast.torch.sharded import is_sharded, place_of, sharded_memo
from holdfast.torch.tensors import (
    common_device,
    filled_from,
    has_storage,
    is_not_saved,
    memory_memo,
)

_Params = list[list[tuple[int, str, str]]]
"""Of each group, of each parameter: number, description, device."""


# -- capture ------------------------------------------------------------------


def describe_parameters(optimizer: Optimizer, encoder: Encoder) -> dict[str, Node]:
    """The keys `params` and `leaves` of its node. What holds the parameters is told of
    first: `leaves` knows what is encoded already."""
    encoder.leaves_of((), ())  # tensors that wait for others have their leaves now
    number = 0
    groups: list[Node] = []
    leaves: list[Node] = []
    numbers: dict[int, int] = {}
    names = _Names(common=encoder.ranks is not None)
    for group in optimizer.param_groups:
        described: list[Node] = []
        # As state_dict numbers them: a parameter listed twice has its first number.
        for param in group["params"]:
            described.append([numbers.setdefault(id(param), number), *_description(param, names)])
            number += 1
        groups.append(described)
        leaves.append(_leaves(group["params"], encoder))
    known = any(leaf is not None for group in leaves for leaf in group)
    return {"params": groups, **({"leaves": leaves} if known else {})}


class _Names(dict[Any, str]):
    """Of dtypes and devices: there are few of them, and thousands of parameters."""

    def __init__(self, common: bool) -> None:
        """`common`: the same in processes that each have a device of their own."""
        super().__init__()
        self._common = common

    def __missing__(self, key: torch.dtype | torch.device) -> str:
        name = str(key).removeprefix("torch.")
        if self._common and isinstance(key, torch.device):
            name = common_device(key, name)
        self[key] = name
        return name


def _description(param: torch.Tensor, names: _Names) -> list[Node]:
    if is_lazy(param):
        return ["uninitialized", [], names[param.device]]
    return [names[param.dtype], list(param.shape), names[param.device]]


def _leaves(params: list[torch.Tensor], encoder: Encoder) -> list[int | None]:
    """Of each parameter: the leaf that holds it and nothing else, if it was encoded."""
    memories: dict[torch.device, dict[int, Any]] = {}
    found: list[int | None] = []
    for param in params:
        leaf = None
        if is_sharded(param):
            leaf = sharded_memo(param.device, encoder).get(place_of(param))
        elif has_storage(param):
            memory = memories.get(param.device)
            if memory is None:
                memory = memories[param.device] = memory_memo(param.device, encoder)
            known = memory.get(param.untyped_storage().data_ptr())
            if type(known) is tuple:
                tensor, node, _, _ = known
                # Its storage may hold more, of which this is a part.
                if tensor is param or (tensor.shape, tensor.dtype) == (param.shape, param.dtype):
                    leaf = None if "offset" in node else node.get("leaf")
        found.append(leaf)
    return found


# -- restore ------------------------------------------------------------------


class Pair(NamedTuple):
    """A live parameter, and what was saved of it."""

    number: int
    """In the state_dict that was saved."""
    device: str
    """Where it was."""
    param: torch.Tensor


class Pairing:
    """Which parameters are the same, here and in the checkpoint."""

    def __init__(
        self,
        pairs: list[list[Pair]],
        groups: list[int | None],
        fresh: list[torch.Tensor],
        gone: set[int],
    ) -> None:
        self.pairs = pairs
        """Of each live group."""
        self.groups = groups
        """The saved group that each live one goes on from."""
        self.fresh = fresh
        """Live parameters of which nothing was saved."""
        self._gone = gone

    @property
    def complete(self) -> bool:
        """Whether all are the same, here and there, group by group."""
        in_order = self.groups == list(range(len(self.groups)))
        return in_order and not self.fresh and not self._gone

    def is_gone(self, key: object) -> bool:
        """Whether a key of the saved state is a parameter that is not here."""
        return key in self._gone


def pair_parameters(
    node: dict[str, Node],
    names: list[list[str] | None] | None,
    live: Optimizer,
    path: str,
    decoder: Decoder,
) -> Pairing | None:
    """Pair them, and report what differs. None where nothing tells which are the same.

    `names` are those that each saved group has, if it has any; None if it saved no groups.
    """
    saved = _read_params(node.get("params"), path)
    if names is not None and len(names) != len(saved):
        raise malformed(path, "its groups are not those of its parameters")
    leaves = _read_leaves(node.get("leaves"), saved, path)
    counts = [len(group) for group in saved]
    live_counts = [len(group["params"]) for group in live.param_groups]
    known = list(_known(saved, leaves, names or [None] * len(saved)))
    here = list(_here(live, decoder))
    in_order = counts == live_counts
    matched = _by_what_is_known(known, here)
    if in_order:
        moved = next((i for i, one in matched.items() if one.number != known[i].number), None)
        if moved is None:
            matched = {
                at: one for at, one in enumerate(known) if not is_not_saved(here[at].param, decoder)
            }
        elif here[moved].path:
            # As many parameters, and not in the order in which they were. With names, the
            # line about them says it.
            was = next((i for i, one in matched.items() if one.number == known[moved].number), None)
            decoder.changed(
                f"{path}/{_place(moved, live_counts)}",
                f"the state of {here[was].path!r}" if was is not None else "another's state",
                f"that of {here[moved].path!r}",
            )
    fitting: dict[int, _Known] = {}
    for at, one in matched.items():
        param = here[at].param
        if is_lazy(param) or one.words.startswith("uninitialized") or one.words == describe(param):
            fitting[at] = one
        else:
            decoder.changed(f"{path}/{_place(at, live_counts)}", one.words, describe(param))
    if not in_order:
        same = f", {len(fitting)} of them the same" if fitting else ""
        decoder.changed(f"{path}/param_groups", _count(counts), _count(live_counts) + same)
        if not fitting:
            return None
    return _pairing(fitting, here, saved, live_counts)


class _Known(NamedTuple):
    number: int
    words: str
    device: str
    leaf: int | None
    name: str


class _Here(NamedTuple):
    param: torch.Tensor
    leaf: int | None
    """From which it is filled in this restore, if it is known."""
    path: str
    name: str


def _known(
    saved: _Params, leaves: list[list[int | None]] | None, names: list[list[str] | None]
) -> Iterator[_Known]:
    for number, group in enumerate(saved):
        named = names[number]
        for position, (key, words, device) in enumerate(group):
            leaf = leaves[number][position] if leaves is not None else None
            name = named[position] if named is not None and len(named) == len(group) else ""
            yield _Known(key, words, device, leaf, bare(name))


def _here(live: Optimizer, decoder: Decoder) -> Iterator[_Here]:
    for group in live.param_groups:
        names = group.get("param_names")
        for position, param in enumerate(group["params"]):
            in_memory = has_storage(param) or is_sharded(param)
            leaf, path = filled_from(param, decoder) if in_memory else (None, "")
            yield _Here(param, leaf, path, bare(names[position]) if names else "")


def _by_what_is_known(known: list[_Known], here: list[_Here]) -> dict[int, _Known]:
    """Number of a live parameter -> the saved one that has its leaf, or else its name."""
    by_leaf = {one.leaf: one for one in known if one.leaf is not None}
    by_name = {one.name: one for one in known if one.name}
    found: dict[int, _Known] = {}
    for at, one in enumerate(here):
        match = by_leaf.get(one.leaf) if one.leaf is not None else None
        if match is None and one.name:
            match = by_name.get(one.name)
        if match is not None:
            found[at] = match
    return found


def _pairing(
    fitting: dict[int, _Known], here: list[_Here], saved: _Params, live_counts: list[int]
) -> Pairing:
    group_of = {number: g for g, group in enumerate(saved) for number, _, _ in group}
    pairs: list[list[Pair]] = []
    groups: list[int | None] = []
    start = 0
    for g, count in enumerate(live_counts):
        ones = [(i, fitting[i]) for i in range(start, start + count) if i in fitting]
        pairs.append([Pair(one.number, one.device, here[i].param) for i, one in ones])
        origins = {group_of[one.number] for _, one in ones}
        # An empty group, too, has hyperparameters.
        same = g if len(saved) == len(live_counts) else None
        groups.append(origins.pop() if len(origins) == 1 else same)
        start += count
    fresh = [one.param for at, one in enumerate(here) if at not in fitting]
    gone = set(group_of).difference(one.number for one in fitting.values())
    return Pairing(pairs, groups, fresh, gone)


def _place(at: int, counts: list[int]) -> str:
    for group, count in enumerate(counts):
        if at < count:
            return f"param_groups/{group}/params/{at}"
        at -= count
    raise IndexError(at)


def _read_params(node: Node, path: str) -> _Params:
    try:
        return [
            [
                (number, f"{dtype}[{', '.join(map(str, naturals(shape, path)))}]", str(device))
                for number, dtype, shape, device in group
            ]
            for group in node
        ]
    except (TypeError, ValueError):
        raise malformed(path, "its parameters are malformed") from None


def _read_leaves(node: Node, params: _Params, path: str) -> list[list[int | None]] | None:
    if node is None:
        return None
    try:
        leaves = [[leaf if leaf is None else index(leaf) for leaf in group] for group in node]
    except TypeError:
        leaves = []
    if [len(group) for group in leaves] != [len(group) for group in params]:
        raise malformed(path, "the leaves of its parameters are malformed")
    return leaves


def _count(counts: list[int]) -> str:
    groups = "1 group" if len(counts) == 1 else f"{len(counts)} groups"
    return f"{groups} of {' + '.join(map(str, counts)) or '0'} parameters"
