"""`run.box`: named values that survive restarts."""

from __future__ import annotations

from typing import Any

from holdfast.errors import UsageError


class Box:
    """A namespace whose attributes are part of every checkpoint.

    Call it to declare defaults; it returns itself. A value that a checkpoint held wins
    over a default. A restored list, dict or set is filled into the declared one, so other
    references to it see the restored content.

    >>> box = Box()
    >>> state = box(best=float("inf"), history=[])
    >>> state.best = 0.25
    >>> box
    Box(best=0.25, history=[])
    """

    __slots__ = ("_defaults", "_values")

    def __init__(self) -> None:
        object.__setattr__(self, "_values", {})
        object.__setattr__(self, "_defaults", {})

    def __call__(self, **defaults: Any) -> Box:
        for name, value in defaults.items():
            _check(name)
            self._defaults[name] = value
            self._values.setdefault(name, value)
        return self

    def __getattr__(self, name: str) -> Any:
        # Names with _ are asked for by copy and pickle, before `_values` exists.
        values: dict[str, Any] = {} if name.startswith("_") else self._values
        try:
            return values[name]
        except KeyError:
            raise AttributeError(
                f"run.box has no {name!r}; declare it with run.box({name}=default)"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        _check(name)
        self._values[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self._values:
            raise AttributeError(f"run.box has no {name!r}")
        del self._values[name]
        self._defaults.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __dir__(self) -> list[str]:
        return sorted(self._values)

    def __repr__(self) -> str:
        return f"Box({', '.join(f'{name}={value!r}' for name, value in self._values.items())})"


def values_of(box: Box) -> dict[str, Any]:
    """The live dict behind `box`: what is captured, and what a restore fills."""
    return box._values


def redeclare(box: Box) -> None:
    """Add the defaults that a restored checkpoint did not have."""
    for name, value in box._defaults.items():
        box._values.setdefault(name, value)


def _check(name: str) -> None:
    if name.startswith("_"):
        raise UsageError(
            f"run.box cannot hold {name!r}: names that start with _ are its own",
            hint=f"Call it {name.strip('_') or 'value'!r}.",
        )
