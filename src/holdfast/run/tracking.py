"""The objects of a run by name, and which of them a checkpoint holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from holdfast.core import frameworks
from holdfast.errors import StructureMismatch, UntrackedParameters, UsageError
from holdfast.run.box import Box, redeclare, values_of

BOX = "box"

# What cannot be filled in place: a restored value would never reach the program.
_VALUES = (bool, int, float, complex, str, bytes, type(None), frozenset)
_MOST_SHOWN = 80  # letters of such a value in a message


class Tracked:
    """Names to live objects. The run's box is one of them once it holds something.

    Loaders are tracked for their place in the data, which is part of the loop's
    position: they are not in the state.
    """

    def __init__(self, box: Box, late: Collection[str], rename: Mapping[str, str]) -> None:
        self._box = box
        self._late = frozenset(late)
        self._rename = dict(rename)
        self._objects: dict[str, Any] = {}
        self._fed: list[Any] = []
        """Objects whose position the loops save."""
        self._complete = False
        """Nothing was tracked since `check_complete` found all that belongs together."""

    def add(self, objects: Mapping[str, Any]) -> list[str]:
        """Track `objects`; the names that were not tracked before."""
        for name, value in objects.items():
            if name == BOX:
                raise UsageError(
                    "'box' is the name under which run.box is saved",
                    hint="Track the object under another name.",
                )
            if isinstance(value, _VALUES):
                shown = repr(value) if len(repr(value)) <= _MOST_SHOWN else "..."
                raise UsageError(
                    f"cannot track {name}={shown}: a {type(value).__name__} cannot be "
                    "restored in place",
                    hint=f"Keep it in the box: state = run.box({name}={shown}); "
                    f"then use state.{name}.",
                )
            if frameworks.is_replaced(value):
                raise UsageError(
                    f"cannot track {name}: a {type(value).__name__} is a value, and a step makes "
                    "a new one instead of changing it",
                    hint=f"Keep it in the box: state = run.box({name}={name}); then "
                    f"state.{name} = step(state.{name}).",
                )
        fresh = [name for name in objects if name not in self._objects]
        self._objects.update(objects)
        self._complete = False
        return fresh

    def expect(self, names: Iterable[str]) -> None:
        """`names` are declared late, too."""
        self._late |= frozenset(names)

    def feed(self, loader: Any) -> None:
        """`loader` is iterated by a loop of the run, which saves its position."""
        if not any(known is loader for known in self._fed):
            self._fed.append(loader)

    @property
    def objects(self) -> Mapping[str, Any]:
        """Everything tracked, loaders too."""
        return self._objects

    def kept(self) -> tuple[list[Any], list[Any]]:
        """What the state is made of, and the loaders that loops have iterated over."""
        return list(self.state().values()), list(self._fed)

    def loaders(self) -> list[str]:
        """Names that are not in the state because a loop saves their position."""
        return sorted(name for name, value in self._objects.items() if self._is_fed(value))

    def _is_fed(self, value: Any) -> bool:
        return any(known is value for known in self._fed) or _is_data_loader(value)

    def state(self) -> dict[str, Any]:
        """What to capture."""
        state = {name: value for name, value in self._objects.items() if not self._is_fed(value)}
        if values := values_of(self._box):
            state[BOX] = values
        return state

    def targets(self, saved: Collection[str], loaders: Collection[str]) -> dict[str, Any]:
        """What to restore from a checkpoint that holds the names `saved`.

        Includes tracked names that it lacks (the restore reports them), but not those
        declared late, nor loaders, whichever side regards them as such.
        """
        here = self.saved_here(saved)
        targets = {
            name: value
            for name, value in self._objects.items()
            if not self._is_fed(value)
            and not (name in loaders and name not in here)
            and not (name in self._late and name not in here)
        }
        if BOX in here:
            targets[BOX] = values_of(self._box)
        return targets

    def unclaimed(self, saved: Collection[str]) -> list[str]:
        """Names in the checkpoint that nobody tracks here."""
        claimed = {*self._objects, BOX}
        return sorted(self.saved_here(saved) - claimed)

    def saved_here(self, saved: Collection[str]) -> set[str]:
        """The names that what was saved as `saved` has in this program."""
        return {self._rename.get(name, name) for name in saved}

    def renames_in(self, saved: Collection[str], loaders: Collection[str]) -> dict[str, str]:
        """The renames that a restore from this checkpoint is given: those of what it holds,
        and those of what nobody knows, which the restore refuses.

        The others were done before, in a program that is started again with the same
        `rename`; are of a loader; or are of what is tracked late and was not yet saved.
        Raises UsageError if nobody can tell whether one was done before.
        """
        for old, new in self._rename.items():
            if old != new and old in saved and new in saved:
                raise UsageError(
                    f"rename={{{old!r}: {new!r}}} is not clear: the checkpoint has both names",
                    hint="Use a name that was never saved. To swap two, give both a new one.",
                )
        elsewhere = {*loaders, *self._late}
        return {
            old: new
            for old, new in self._rename.items()
            for top in [old.partition("/")[0]]
            if top in saved or self._names_since(top).isdisjoint({*saved, *elsewhere})
        }

    def _names_since(self, name: str) -> set[str]:
        """`name`, and what it was called after each rename."""
        names = {name}
        while (name := self._rename.get(name, name)) not in names:
            names.add(name)
        return names

    def fresh(self, saved: Collection[str]) -> list[str]:
        """Tracked names that the checkpoint does not have."""
        return sorted(set(self.state()) - self.saved_here(saved))

    def check_claimed(self, saved: Collection[str], address: str) -> None:
        """Raises StructureMismatch for saved names that nobody tracks and that were not
        declared late."""
        unclaimed = [name for name in self.unclaimed(saved) if name not in self._late]
        if not unclaimed:
            return
        saved_as = {new: old for old, new in self._rename.items() if old in saved}
        names = ", ".join(
            f"{name!r} (saved as {saved_as[name]!r})" if name in saved_as else repr(name)
            for name in unclaimed
        )
        here = self.saved_here(saved)
        awaited = self._late - self._objects.keys() - here - set(saved)
        fresh = sorted({*self.fresh(saved), *awaited})
        # To be pasted in place of what was given: whole.
        late = sorted({*self._late, *unclaimed} - (set(saved_as.values()) - here))
        hint = f"Track them before the loop, or say late={late!r} if they come later."
        if len(unclaimed) == len(fresh) == 1:
            # In place of a rename of what the checkpoint does not hold (a misspelt name).
            rename = {old: new for old, new in self._rename.items() if new != fresh[0]}
            old = saved_as.get(unclaimed[0], unclaimed[0])
            hint = f"If it was renamed: rename={ {**rename, old: fresh[0]}!r}. " + hint
        elif fresh:
            names_here = ", ".join(map(repr, fresh))
            hint = f"If they were renamed: rename={{old: new}}; new here: {names_here}. " + hint
        raise StructureMismatch(
            f"the checkpoint of {address} holds {names}, which nothing tracks here",
            unexpected=unclaimed,
            hint=hint,
        )

    def advice(self, saved: Collection[str]) -> str:
        """What to do if a restore into `targets` found differences."""
        new = [name for name in self.fresh(saved) if name not in (BOX, *self._late)]
        hint = ""
        if new:
            late = sorted({*self._late, *new})
            hint = f"What is new starts as it is if you declare it: Run(..., late={late!r}). "
        return hint + (
            "Run(..., strict=False) leaves all that differs as it is; what has another name "
            'now: Run(..., rename={"saved": "live"}), e.g. {"model/head": "model/top"}.'
        )

    def check_complete(self, adapters: Iterable[Any], *, saving: bool = False) -> None:
        """Raises UntrackedParameters if tracked optimizers train what nothing tracked
        saves. Before the first save it waits for what was declared late."""
        if self._complete or (not saving and not self._late <= self._objects.keys()):
            return
        state = self.state()
        found: list[str] = []
        for adapter in adapters:
            if verb := getattr(adapter, "untracked_parameters", None):
                found.extend(verb(state))
        if found:
            raise UntrackedParameters(found)
        self._complete = True

    def adopt(self, restored: Mapping[str, Any]) -> None:
        """After a restore into `targets`: what it made of them.

        Raises StructureMismatch if a tracked object was replaced instead of filled,
        since the program would go on with the old one.
        """
        redeclare(self._box)
        replaced = [
            name
            for name, value in restored.items()
            if name in self._objects
            and value is not self._objects[name]
            and not isinstance(value, tuple)
        ]
        if replaced:
            lines = "\n  ".join(
                f"{name}: saved as {_describe(restored[name])}, "
                f"tracked as {_describe(self._objects[name])}"
                for name in replaced
            )
            raise StructureMismatch(
                f"these tracked objects cannot take what was saved:\n  {lines}",
                changed=replaced,
                hint="Make them like those of the last run, or track what holds them: a dict "
                "or an object with state_dict.",
            )


def _describe(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__


def _is_data_loader(value: Any) -> bool:
    """A plain torch DataLoader, also as Accelerate prepares it: it has no state of its own to
    save."""
    kinds = [(kind.__module__, kind.__name__) for kind in type(value).__mro__]
    if ("accelerate.data_loader", "DataLoaderAdapter") in kinds:
        return True
    if hasattr(value, "state_dict"):
        return False
    return any(
        name == "DataLoader" and module.startswith("torch.utils.data") for module, name in kinds
    )


def untracked_line(
    adapters: Iterable[Any], scope: Mapping[str, Any], tracked: Any, late: Collection[str]
) -> str:
    """What to say of objects in `scope` that belong to tracked ones but are not tracked, nor
    will be `late`; "" if there are none.

    Asks each loaded framework that knows how (an optimizer whose parameters are a
    tracked model's, …).
    """
    found: list[str] = []
    for adapter in adapters:
        if verb := getattr(adapter, "find_untracked", None):
            found.extend(name for name in verb(scope, tracked) if name not in late)
    if not found:
        return ""
    arguments = ", ".join(f"{name}={name}" for name in found)
    return f"{', '.join(found)} will not be saved: not tracked; add run.track({arguments})"
