"""`Variables`: variables of a module, or attributes of an object, as tracked state."""

from __future__ import annotations

import inspect
import sys
from collections.abc import MutableMapping
from typing import Any

from holdfast.errors import UsageError


class Variables:
    """Some variables of a namespace, saved and restored by name.

    For programs that keep their state in global variables, or in attributes, and assign to
    them anew: a tracked object is filled in place, these are replaced.

        X, Y = get_batch()
        run.track(model=model, more=holdfast.Variables(globals(), "X", "Y", "best_val_loss"))
        run.track(trainer=holdfast.Variables(vars(trainer), "patience", "ema"))

    `namespace` is the dict that holds them: `globals()` or `vars(object)`. `locals()` of a
    function is a copy, and refused. A variable that does not exist yet is saved once it
    does; a restore that lacks one leaves it alone. Tensors come back on the device of the one
    that they replace, and without the graph that computed them.

    >>> best, patience = 0.5, 3
    >>> kept = Variables(globals(), "best", "patience")
    >>> kept.state_dict()
    {'best': 0.5, 'patience': 3}
    >>> kept.load_state_dict({"best": 0.25}); best
    0.25
    """

    # Not in a __dict__: whoever follows what tracked objects hold must not take the whole
    # namespace for tracked.
    __slots__ = ("_names", "_namespace")

    def __init__(self, namespace: MutableMapping[str, Any], *names: str) -> None:
        if not names:
            raise UsageError(
                "Variables needs the names to keep", hint='Variables(globals(), "best", "patience")'
            )
        if not isinstance(namespace, MutableMapping):
            raise UsageError(
                f"Variables needs the dict that holds the variables, not {namespace!r:.80}",
                hint="Variables(globals(), ...) or Variables(vars(object), ...)",
            )
        if _is_copy_of_locals(namespace):
            raise UsageError(
                "Variables(locals(), ...) in a function: locals() is a copy there, and nothing "
                "can be put back into it",
                hint="Keep them in the box, state = run.box(best=...), or in attributes.",
            )
        self._namespace = namespace
        self._names = names

    def state_dict(self) -> dict[str, Any]:
        """Those that exist, with their values."""
        return {name: self._namespace[name] for name in self._names if name in self._namespace}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Assign the values in `state`."""
        for name, value in state.items():
            self._namespace[name] = _placed(value, self._namespace.get(name))

    def __repr__(self) -> str:
        return f"Variables({', '.join(self._names)})"


def _is_copy_of_locals(namespace: MutableMapping[str, Any]) -> bool:
    # At module level, and in a class, locals() is the namespace itself.
    frame = sys._getframe(2)
    if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        return False
    variables = frame.f_locals
    return namespace.keys() == variables.keys() and all(
        namespace[name] is value for name, value in variables.items()
    )


def _placed(value: Any, live: Any) -> Any:
    """`value` on the device of the tensor that it replaces."""
    device = getattr(live, "device", None)
    if device is not None and getattr(value, "device", device) != device:
        return value.to(device)
    return value
