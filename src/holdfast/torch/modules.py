"""Modules: their state_dict, restored into the live parameters and buffers.

    {"!": "torch.module", "type": "package:Class", "v": node of state_dict()}

What state_dict leaves out (non-persistent buffers, training mode) is not in it; see also
`attributes.py`.
Names are those of the wrapped module: the segment that DistributedDataParallel,
DataParallel, torch.compile or activation checkpointing puts in front is dropped at save, and
`module.`, `_orig_mod.`, `_checkpoint_wrapped_module.` and `_fsdp_wrapped_module.` are ignored when
names are compared.

Where several processes save together the parameters of a module are one for all of them:
DTensors by their mesh, and others as replicas, unless the encoder says that they are `own`.
Buffers are each process's own: the statistics of BatchNorm are.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from holdfast.core.adapters import NOTHING, Decoder, Encoder
from holdfast.core.classes import type_name
from holdfast.core.leaves import settle
from holdfast.core.types import Node
from holdfast.errors import StateError, UnsupportedValue
from holdfast.torch import fsdp1
from holdfast.torch.dtypes import describe, name_of
from holdfast.torch.saved import malformed
from holdfast.torch.sharded import is_sharded, local_of, mark_shared, place_of
from holdfast.torch.tensors import has_storage, note_not_saved

_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", fsdp1.WRAPPED)
_EXTRA = "_extra_state"  # the name that torch gives to what get_extra_state returns
# Modules are loaded in place only if these methods come from torch itself: there, they
# only copy into the parameters and buffers.
_KNOWN = ("torch.nn.", "torch._dynamo.", "torch.optim.")
_LOADING = ("load_state_dict", "state_dict", "_load_from_state_dict", "_save_to_state_dict")
_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_hooks")
# Hooks of these modules change names, or bring FSDP's parameters to where they are sharded
# (as `to_sharded` does) and look whether others were put in their place.
_CHECKPOINTING = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
_KNOWN_HOOKS = (
    "torch.distributed.fsdp._fully_shard.",
    "torch.distributed._composable.fsdp.",
    "torch.distributed.fsdp._state_dict_utils",  # of FSDP1, which is not asked: see fsdp1
    _CHECKPOINTING,
)


# -- capture ------------------------------------------------------------------


def encode_module(module: torch.nn.Module, path: str, encoder: Encoder) -> Node:
    to_sharded(module)
    saved = _state_of(module, path)
    if encoder.ranks is not None:
        _mark_parameters(module, saved.values(), path, encoder)
    dropped = _wrapper_prefixes(module)
    for name in saved:
        if not isinstance(name, str):
            raise UnsupportedValue(
                path,
                f"module whose state_dict has the key {name!r}",
                hint="Its keys must be strings.",
            )
    state: OrderedDict[str, Any] = OrderedDict(saved)
    if dropped:
        state = OrderedDict((_without(name, dropped), value) for name, value in saved.items())
    metadata = getattr(saved, "_metadata", None)
    if metadata:
        renamed = {_without(name, dropped): dict(entry) for name, entry in metadata.items()}
        state._metadata = renamed  # type: ignore[attr-defined]
    node = encoder.encode(state, path)
    return {"!": "torch.module", "type": type_name(class_of(module)), "v": node}


def _state_of(module: torch.nn.Module, path: str) -> Any:
    """What its state_dict() returns; with FSDP1's parameters as they are here."""
    if not _has_fsdp1(module, path):
        return module.state_dict()
    tensors, extras = live_state(module)
    state: OrderedDict[str, Any] = OrderedDict(
        (name, value if is_sharded(value) else value.detach()) for name, value in tensors.items()
    )
    state.update((name, part.get_extra_state()) for name, part in extras.items())
    versions = {name: {"version": part._version} for name, part in module.named_modules()}
    state._metadata = versions  # type: ignore[attr-defined]
    return state


def _has_fsdp1(module: torch.nn.Module, path: str) -> bool:
    """Raises StateError or UnsupportedValue for what cannot be saved and restored of it."""
    found = fsdp1.check(all_parts(module), path)
    if found and not plain_loading(module):
        raise UnsupportedValue(
            path,
            "module in FullyShardedDataParallel (FSDP1) with a state_dict of its own",
            hint=fsdp1.INSTEAD,
        )
    return found


def _mark_parameters(
    module: torch.nn.Module, saved: Iterable[Any], path: str, encoder: Encoder
) -> None:
    """Those of `saved`, what state_dict() returned, that are parameters."""
    if encoder.own is not None and encoder.own(path):
        return
    # By their memory: hooks may give them other names. What is empty has none, and no bytes.
    parameters = {_memory(parameter) for parameter in module.parameters()}
    mark_shared(
        (
            value
            for value in saved
            if _memory(value) in parameters
            or (isinstance(value, torch.Tensor) and not is_lazy(value) and not value.numel())
        ),
        encoder,
    )
    mark_shared(module.parameters(), encoder)  # for optimizers, whose state belongs to them


def to_sharded(module: torch.nn.Module) -> None:
    """Make FSDP's parameters the sharded ones again: after an evaluation the root's are
    left as they were used. No process speaks to another."""
    fsdp1.reshard(all_parts(module))
    if _loaded("torch.distributed.fsdp", "FSDPModule") is not None:
        for part in all_parts(module):
            if is_fsdp(part):
                part.reshard()  # type: ignore[operator]


def is_fsdp(module: torch.nn.Module) -> Any:
    """Whether `fully_shard` was called for this very module."""
    sharded = _loaded("torch.distributed.fsdp", "FSDPModule")
    return sharded is not None and isinstance(module, sharded)


def class_of(module: torch.nn.Module) -> type:
    """Of a module that `fully_shard` has given another class: the one that it was made of."""
    kind = type(module)
    # It stands behind the class that was made and FSDPModule.
    return kind.__mro__[getattr(kind, "_orig_cls_mro_index", 2)] if is_fsdp(module) else kind


def _loaded(module: str, name: str) -> Any:
    """A class of a module that takes long to import; None if nobody has imported it."""
    return getattr(sys.modules.get(module), name, None)


def _wrapper_prefixes(module: torch.nn.Module) -> set[str]:
    """Names of modules that a wrapper holds, like `module` or `encoder._orig_mod`."""
    # Importing the compiler takes seconds; without it nothing is compiled.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    kinds: dict[str, Any] = {
        "_orig_mod": getattr(compiler, "OptimizedModule", ()),
        "_checkpoint_wrapped_module": _loaded(_CHECKPOINTING, "ActivationWrapper") or (),
        "module": (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel),
        fsdp1.WRAPPED: fsdp1.wrapper(),
    }
    every = tuple(kinds.values())
    found: set[str] = set()
    if not any(isinstance(part, every) for part in all_parts(module)):
        return found  # the names of thousands of modules take longer than their tensors
    for name, part in module.named_modules(remove_duplicate=False):
        found.update(_join(name, held) for held, kind in kinds.items() if isinstance(part, kind))
    return found


def all_parts(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """As `modules()`, several times as fast."""
    seen = {module}
    pending = [module]
    while pending:
        part = pending.pop()
        yield part
        for child in part._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                pending.append(child)


def parts(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """As `named_modules()`, without wrappers and their segments in names."""
    dropped = _wrapper_prefixes(module)
    wrappers = {name.rpartition(".")[0] for name in dropped}
    for name, part in module.named_modules():
        if name not in wrappers:
            yield _without(name, dropped), part


def _without(name: str, dropped: set[str]) -> str:
    """`name` without the segments that end one of the names in `dropped`."""
    if not dropped:
        return name
    segments = name.split(".")
    kept = (
        segment
        for end, segment in enumerate(segments, 1)
        if ".".join(segments[:end]) not in dropped
    )
    return ".".join(kept)


def _join(prefix: str, name: str, separator: str = ".") -> str:
    return f"{prefix}{separator}{name}" if prefix else name


# -- names --------------------------------------------------------------------


def bare(name: str) -> str:
    """`name` without wrappers' segments, wherever they are.

    >>> bare("module.encoder._orig_mod.weight")
    'encoder.weight'
    """
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPERS)


def match_names(saved: Iterable[str], live: Iterable[str]) -> dict[str, str]:
    """Saved name -> live name. Equal names match first, then bare ones, where only
    one name on each side has it (a model may have `module.x` beside `x`)."""
    saved, live = list(saved), set(live)
    matched = {name: name for name in saved if name in live}
    free: dict[str, list[str]] = {}
    for name in live.difference(matched):
        free.setdefault(bare(name), []).append(name)
    rest: dict[str, list[str]] = {}
    for name in saved:
        if name not in matched:
            rest.setdefault(bare(name), []).append(name)
    for key, names in rest.items():
        if len(names) == 1 and len(free.get(key, ())) == 1:
            matched[names[0]] = free[key][0]
    return matched


# -- restore ------------------------------------------------------------------


def decode_module(node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
    """Into the live module `target`, or the state_dict that was saved if there is none."""
    if not isinstance(target, torch.nn.Module):
        live_dict = target if isinstance(target, dict) else NOTHING
        return decoder.decode(node.get("v"), live_dict, path)
    state = _entries(node.get("v"), path)
    _has_fsdp1(target, path)
    to_sharded(target)
    if plain_loading(target):
        _restore_in_place(target, state, path, decoder)
    else:
        _restore_by_loading(target, node, state, path, decoder)
    return target


def _entries(node: Node, path: str) -> dict[str, Node]:
    pairs = node.get("v") if isinstance(node, dict) and node.get("!") == "odict" else None
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
    ):
        raise malformed(path, "its entries are malformed")
    found = dict(pairs)
    if len(found) != len(pairs):
        raise malformed(path, "two of its entries have one name")
    return found


def plain_loading(module: torch.nn.Module) -> bool:
    """Whether loading a state_dict does no more than copy into the parameters and
    buffers and call set_extra_state, so that it can be done leaf by leaf."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    for part in module.modules():
        for hooks in _HOOKS:
            if not all(map(_is_known_hook, (getattr(part, hooks, None) or {}).values())):
                return False
        if not _is_torchs_own(part, _LOADING):
            return False
        tensors: list[Any] = [*part._parameters.values(), *part._buffers.values()]
        if any(map(is_lazy, tensors)):
            return False
    return True


def _is_known_hook(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)  # torch wraps those that want the module
    return (getattr(hook, "__module__", None) or "").startswith(_KNOWN_HOOKS)


def _is_torchs_own(module: torch.nn.Module, methods: Iterable[str]) -> bool:
    kind = type(module)
    return all(
        getattr(getattr(kind, name), "__module__", "").startswith(_KNOWN)
        and name not in module.__dict__
        for name in methods
    )


def _restore_in_place(
    module: torch.nn.Module, state: dict[str, Node], path: str, decoder: Decoder
) -> None:
    tensors, extras = live_state(module)
    matched = match_names(state, [*tensors, *extras])
    needed = _needed(tensors, matched)
    _report_names(state, {**needed, **extras}, matched, path, decoder)
    first: dict[Any, str] = {}
    for name, node in state.items():
        live_name = matched.get(name)
        if live_name is None:
            continue
        live_path = _join(path, live_name, "/")
        if live_name in tensors:
            tied = first.setdefault(_leaf(node), live_name)
            if tied != live_name and _apart(tensors[tied], tensors[live_name]):
                # Equal now, but they would go different ways from here.
                saved = f"tied to {_join(path, tied, '/')!r}"
                decoder.changed(live_path, saved, f"{describe(tensors[live_name])}, not tied to it")
            decoder.decode(node, tensors[live_name], live_path)
        else:
            _into_extra_state(node, extras[live_name], live_path, decoder)


def _needed(live: Mapping[str, Any], matched: dict[str, str]) -> dict[str, Any]:
    """What must be in the checkpoint: of tied weights one name is enough, as in files by
    safetensors."""
    filled = {_memory(live[name]) for name in matched.values() if name in live}
    return {name: value for name, value in live.items() if _memory(value) not in filled}


def _memory(tensor: Any) -> Any:
    """Equal for tensors that are the same elements."""
    if is_sharded(tensor):
        return place_of(tensor)
    if not isinstance(tensor, torch.Tensor) or not has_storage(tensor) or not tensor.numel():
        return id(tensor)
    place = (tensor.device, tensor.data_ptr(), tensor.storage_offset())
    return (*place, tensor.shape, tensor.stride(), tensor.dtype)


def _leaf(node: Node) -> Any:
    """The leaf of a node that holds one tensor; for others something of their own."""
    whole = isinstance(node, dict) and node.get("!") == "torch.tensor" and "offset" not in node
    leaf = node.get("leaf") if whole else None
    return leaf if isinstance(leaf, int) else ("none", id(node))


def _apart(one: torch.Tensor, other: torch.Tensor) -> bool:
    if is_sharded(one) and is_sharded(other):
        one, other = local_of(one), local_of(other)
    if one is other or one.layout is not torch.strided or other.layout is not torch.strided:
        return False
    return one.shape == other.shape and _start(one) != _start(other)


def _start(tensor: torch.Tensor) -> int:
    return local_of(tensor).data_ptr() if is_sharded(tensor) else tensor.data_ptr()


def live_state(
    module: torch.nn.Module,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.nn.Module]]:
    """What state_dict names: live tensors, and the modules with extra state."""
    tensors: dict[str, torch.Tensor] = {}
    extras: dict[str, torch.nn.Module] = {}
    to_sharded(module)
    flat = fsdp1.parameters(module)
    for prefix, part in module.named_modules(remove_duplicate=False):
        own: dict[str, Any] = part._parameters
        if flat:
            own = {**own, **flat.get(id(part), {})}
        for name, tensor in own.items():
            if tensor is not None and not (flat and fsdp1.is_flat(tensor)):
                tensors[_join(prefix, name)] = tensor
        for name, tensor in part._buffers.items():
            if tensor is not None and name not in part._non_persistent_buffers_set:
                tensors[_join(prefix, name)] = tensor
        if type(part).get_extra_state is not torch.nn.Module.get_extra_state:
            extras[_join(prefix, _EXTRA)] = part
    return tensors, extras


def saves_more(module: torch.nn.Module) -> bool:
    """Whether the state of this very module may hold more than `live_state` finds."""
    kind = type(module)
    return (
        kind.get_extra_state is not torch.nn.Module.get_extra_state
        or bool(module._state_dict_hooks)
        or not _is_torchs_own(module, ("state_dict", "_save_to_state_dict"))
    )


def _into_extra_state(node: Node, module: torch.nn.Module, path: str, decoder: Decoder) -> None:
    if type(module).set_extra_state is torch.nn.Module.set_extra_state:
        raise StateError(
            f"{path!r} cannot be restored: {type_name(type(module))} has get_extra_state() "
            "but no set_extra_state()",
            hint="Define set_extra_state(self, state).",
        )
    state = decoder.decode(node, NOTHING, path)
    decoder.finish(lambda: module.set_extra_state(settle(state)))


def _report_names(
    saved: Iterable[str],
    live: Mapping[str, object],
    matched: dict[str, str],
    path: str,
    decoder: Decoder,
) -> None:
    found = set(matched.values())
    for name, value in live.items():
        if name not in found:
            decoder.missing(_join(path, name, "/"))
            note_not_saved(value, decoder)
    for name in saved:
        if name not in matched:
            decoder.unexpected(_join(path, name, "/"))


# -- through load_state_dict --------------------------------------------------


def _restore_by_loading(
    module: torch.nn.Module,
    node: dict[str, Node],
    saved: dict[str, Node],
    path: str,
    decoder: Decoder,
) -> None:
    """Through the module's own load_state_dict: it has hooks, its own loading, or
    parameters that get their shape from the checkpoint."""
    live = module.state_dict(keep_vars=True)
    matched = match_names(saved, live)
    _report_names(saved, _needed(live, matched), matched, path, decoder)
    state: OrderedDict[str, Any] = OrderedDict()
    for name, value in saved.items():
        # Names that nobody has are passed on too: hooks may know them. They come to
        # be loaded only if the caller allowed differences.
        live_name = matched.get(name, name)
        live_path = _join(path, live_name, "/")
        fresh = decoder.decode(value, NOTHING, live_path)
        current = live.get(live_name)
        if is_lazy(fresh) and (current is None or is_lazy(current)):
            continue  # nothing was there yet, and nothing is now
        if _differs(fresh, current):
            decoder.changed(live_path, _words(fresh), _words(current))
            continue
        state[live_name] = fresh
    attributes = node["v"].get("attrs")
    saved_attributes = {} if attributes is None else decoder.decode(attributes, NOTHING, path)
    metadata = saved_attributes.get("_metadata")
    if isinstance(metadata, dict):
        state._metadata = _renamed_metadata(module, metadata)  # type: ignore[attr-defined]
    decoder.finish(lambda: _load(module, state, path))


def _differs(fresh: object, current: object) -> bool:
    if not isinstance(current, torch.Tensor):
        return False  # an extra state, or a name that only hooks know
    if not isinstance(fresh, torch.Tensor) or is_lazy(fresh) or fresh.dtype != current.dtype:
        return True
    return not is_lazy(current) and fresh.shape != current.shape


def _words(value: Any) -> str:
    if is_lazy(value):
        return f"uninitialized {name_of(value.dtype)}"
    return describe(value) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def _renamed_metadata(module: torch.nn.Module, saved: dict[str, Any]) -> OrderedDict[str, Any]:
    """The metadata by the live modules' names."""
    # Of a wrapper and what it wraps the inner entry counts: the longer name.
    by_bare_name = {bare(name): entry for name, entry in sorted(saved.items())}
    renamed: OrderedDict[str, Any] = OrderedDict()
    for name, _ in module.named_modules(remove_duplicate=False):
        entry = saved.get(name, by_bare_name.get(bare(name)))
        if isinstance(entry, dict):
            renamed[name] = entry
    return renamed


def _load(module: torch.nn.Module, state: OrderedDict[str, Any], path: str) -> None:
    for name, value in state.items():
        state[name] = settle(value)
    try:
        # Names were compared before; here they may differ only if that is allowed.
        module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise StateError(
            f"load_state_dict of {type_name(type(module))} at {path!r} failed: {error}",
            hint="Its parameters may be partly restored: do not go on with this model.",
        ) from error
