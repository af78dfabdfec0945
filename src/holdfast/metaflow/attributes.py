"""Chosen attributes of a flow's `self`, as part of what is saved: `@checkpoint(attributes=…)`."""

from __future__ import annotations

from collections.abc import Collection, MutableMapping
from typing import Any, cast

from holdfast.core.encode import TreeEncoder
from holdfast.core.types import Node
from holdfast.errors import StateError, UnsupportedValue
from holdfast.run.variables import Variables

# What a restore fills, and cannot make.
_FILLED = frozenset(
    # Tags of nodes.
    [
        "object",
        "torch.module",
        "torch.optimizer",
        "torch.object",
        "file",
        "dir",
        "jax.node",
        "jax.nnx",
    ]
)


class Attributes(Variables):
    """Those of `names` that there are.

    They are assigned anew, before the step's code has run: so they are what can be made from a
    checkpoint alone. An artifact of an earlier step counts once this step has used it; until
    then it is what it was.

    >>> namespace = {"epoch": 3, "other": 1}
    >>> Attributes(namespace, ["epoch", "history"]).state_dict()
    {'epoch': 3}
    """

    __slots__ = ("settled",)

    def __init__(self, namespace: MutableMapping[str, Any], names: Collection[str] = ()) -> None:
        self._namespace = namespace
        self._names = tuple(names)
        self.settled = False
        """They are newer than what a restore would put back."""

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are chosen, whether there are such attributes or not."""
        return self._names

    def state_dict(self) -> dict[str, Any]:
        """Raises StateError for a value that could not be put back."""
        values = super().state_dict()
        _check(values)
        return values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Assign those in `state`; names that are not chosen any more are passed over."""
        if not self.settled:
            super().load_state_dict({k: v for k, v in state.items() if k in self._names})


def _check(values: dict[str, Any]) -> None:
    encoder = TreeEncoder()
    try:
        tree = cast(dict[str, Any], encoder.encode(values, ""))
    except UnsupportedValue as error:
        raise _refusal(error.path.partition("/")[0], f"a {error.kind}") from None
    finally:
        encoder.close()
    for name, node in tree["v"]:
        if kind := _filled(node):
            raise _refusal(name, kind)


def _filled(tree: Node) -> str:
    """What in `tree` only a restore in place could bring back; "" for nothing."""
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, list):
            nodes += cast(list[Node], node)
        elif isinstance(node, dict):
            tagged = cast(dict[str, Node], node)
            if tagged.get("!") in _FILLED:
                return f"a {tagged.get('type', tagged['!'])}".replace(":", ".")
            nodes += tagged.values()
    return ""


def _refusal(name: str, kind: str) -> StateError:
    return StateError(
        f"self.{name} cannot be saved with the checkpoint: it is or holds {kind}, which cannot "
        "be made again from what is stored",
        hint=f"Take {name!r} out of attributes= of @checkpoint. What has a state_dict: "
        f"current.checkpoint.run.track({name}=self.{name}), or keep self.state = "
        f"self.{name}.state_dict(); else keep it as numbers, text, lists, dicts or arrays.",
    )
