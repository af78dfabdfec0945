"""Which tensors of a model with PEFT adapters are one adapter, and what its file calls them.

In the model an adapter's name is part of its tensors' names; in a file it is not, so that it
can be loaded under any:

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from holdfast.core.address import some_of
from holdfast.errors import UsageError

_ROOT = "base_model.model."
# Kind of adapter (`peft_type`) -> how its modules' names start.
_KINDS = {
    "LORA": "lora_",
    "LOHA": "hada_",
    "LOKR": "lokr_",
    "OFT": "oft_",
    "IA3": "ia3_",
    "LN_TUNING": "ln_tuning_",
}
_WHOLE = "modules_to_save"
_TOKENS = "trainable_tokens_delta"
# PEFT saves what is below these, where they are adapted, with the adapter.
_EMBEDDINGS = ("embed_tokens", "lm_head")


class _Part(NamedTuple):
    """A tensor's name, in parts around the module that holds one tensor for each adapter."""

    before: str
    holder: str
    adapter: str
    """"" = the name has none: it is what a file calls it already."""
    after: str

    @property
    def name(self) -> str:
        if self.holder == _WHOLE:
            return ".".join(filter(None, (self.before, self.after)))
        after = self.after
        if self.holder == "lora_magnitude_vector" and after == "weight":
            after = ""  # as it was before it was a module
        return ".".join(filter(None, (self.before, self.holder, after)))


def adapter_names(
    names: Iterable[str], config: Mapping[str, Any], adapter: str = ""
) -> dict[str, str]:
    """Name in the file -> name in the model, of the tensors of one adapter.

    `config` is its adapter_config.json. Raises UsageError for a kind of adapter that is not
    known here, for no adapter, and for several if `adapter` names none.

    >>> adapter_names(
    ...     ["base_model.model.q.base_layer.weight", "base_model.model.q.lora_A.default.weight"],
    ...     {"peft_type": "LORA"},
    ... )
    {'base_model.model.q.lora_A.weight': 'base_model.model.q.lora_A.default.weight'}
    """
    kind = str(config.get("peft_type"))
    if kind not in _KINDS:
        raise UsageError(
            f"adapter_config.json is of an adapter of kind {kind[:80]!r}",
            hint=f"This version exports {some_of(sorted(_KINDS))}. Others are written by PEFT: "
            "model.save_pretrained(folder).",
        )
    names = list(names)
    parts = {name: part for name in names if (part := _part(name, _KINDS[kind]))}
    there = list(dict.fromkeys(part.adapter for part in parts.values()))
    chosen = _chosen(there, adapter, kind)
    found = {part.name: name for name, part in parts.items() if part.adapter == chosen}
    bias = str(config.get("bias", "none"))
    found |= {
        name: name for name in names if name not in parts and _is_beside(name, parts, chosen, bias)
    }
    return {key if key.startswith("base_model.") else _ROOT + key: found[key] for key in found}


def _part(name: str, prefix: str) -> _Part | None:
    segments = name.split(".")
    for at, segment in enumerate(segments):
        if segment.startswith(prefix) or segment in (_WHOLE, _TOKENS):
            before, rest = ".".join(segments[:at]), segments[at + 1 :]
            if not rest or rest in (["weight"], ["bias"]):
                return _Part(before, segment, "", ".".join(rest))
            return _Part(before, segment, rest[0], ".".join(rest[1:]))
    return None


def _chosen(there: list[str], adapter: str, kind: str) -> str:
    named = [name for name in there if name]
    if not there or (adapter and named and adapter not in named):
        what = f"no adapter {adapter!r}" if adapter else f"no tensor of an adapter of kind {kind}"
        raise UsageError(
            f"the model has {what}",
            hint=f"It has {some_of(named)}." if named else "Name the model: --only NAME.",
        )
    if len(named) > 1 and not adapter:
        raise UsageError(
            f"the model has {len(named)} adapters: {some_of(named)}",
            hint="Name one: --adapter NAME, adapter= in Python.",
        )
    return adapter if adapter in named else there[0] if not named else named[0]


def _is_beside(name: str, parts: Mapping[str, _Part], adapter: str, bias: str) -> bool:
    """Whether a tensor of the base model is saved with the adapter."""
    if bias == "all" and (name == "bias" or name.endswith(".bias")):
        return True
    module, layer, what = name.rpartition(".base_layer.")
    if not layer or not (
        (bias.endswith("_only") and what == "bias") or module.rpartition(".")[2] in _EMBEDDINGS
    ):
        return False
    return any(part.before == module and part.adapter == adapter for part in parts.values())
