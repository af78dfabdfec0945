"""Models of several checkpoints, one after another or side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from holdfast.core.address import some_of
from holdfast.errors import StructureMismatch, UsageError, briefly
from holdfast.manager.info import CheckpointInfo
from holdfast.manager.members import Member, References, members
from holdfast.manager.restore import Wish

M = TypeVar("M")


class Ensemble(Generic[M]):
    """What `ensemble` gives: iterate over it, as often as you like."""

    def __init__(
        self,
        model: M,
        checkpoints: References,
        name: str,
        rename: Mapping[str, str],
        *,
        strict: bool,
        allow_pickle: bool,
    ) -> None:
        self._model = model
        self._name = name
        self._rename = dict(rename)
        self._strict = strict
        self._allow_pickle = allow_pickle
        with members(checkpoints) as found:
            self.infos: tuple[CheckpointInfo, ...] = tuple(member.info for member in found)
            """The checkpoints, in the order of the models."""

    def __len__(self) -> int:
        """How many models there are."""
        return len(self.infos)

    @property
    def refs(self) -> list[str]:
        """References that name them, by their ids."""
        return [f"{info.address}@{info.id}" for info in self.infos]

    def __iter__(self) -> Iterator[M]:
        """The model with the weights of one checkpoint after another. It is always the same
        object: use it before the next one is asked for. It keeps the last weights."""
        with members(self.refs) as found:
            for member in found:
                self._put(member, self._model)
                yield self._model

    @briefly
    def models(self, make: Callable[[], M]) -> list[M]:
        """All models at once, each a new one that `make` has made."""
        made: list[M] = []
        with members(self.refs) as found:
            for member in found:
                one = make()
                if any(one is other for other in made):
                    raise UsageError(
                        "make() returned the same model twice",
                        hint="It must build a new one at each call.",
                    )
                self._put(member, one)
                made.append(one)
        return made

    def _put(self, member: Member, model: M) -> None:
        *above, name = self._name.split("/")
        last: dict[str, Any] = {name: model}
        into = last
        for outer in reversed(above):
            into = {outer: into}
        wish = Wish(
            into,
            strict=self._strict,
            only=(self._name,),
            rename=self._rename,
            allow_pickle=self._allow_pickle,
            rng=False,
        )
        try:
            member.manager.put_into(member.info.id, wish)
        except StructureMismatch as error:
            if self._name in error.missing:
                there = list(member.manager.load(member.info.id))
                error.hint = f"{member.ref} holds {some_of(there)}: say which by name=…"
            raise
        if last[name] is not model:
            raise UsageError(
                f"{type(model).__name__} cannot be filled in place",
                hint="Give a module, or an object with state_dict and load_state_dict.",
            )


@briefly
def ensemble(
    model: M,
    checkpoints: References,
    *,
    name: str = "model",
    rename: Mapping[str, str] | None = None,
    strict: bool = True,
    allow_pickle: bool = False,
) -> Ensemble[M]:
    """The models of several checkpoints, in the memory of one.

    Iterating restores one checkpoint after another into `model` and yields it:

        for member in holdfast.ensemble(model, "runs/x@last=5"):
            predictions.append(member(batch))

    `ensemble(…).models(make)` gives all at once, each in a new model that `make()` returns.
    `checkpoints` are references as for `average`; which they are is decided here, once, and
    `Ensemble.infos` says it. `name` is the one that the model was tracked under, or a path
    (`"trainer/model"`, of Hugging Face's Trainer); `rename`,
    `strict` and `allow_pickle` are as for `CheckpointManager.restore`. Only what is below `name`
    is read, every byte verified; random states stay as they are.

    Raises NoStore, CheckpointNotFound, BadAddress; while iterating DamagedObject (an ensemble
    with fewer members would be another one), CheckpointRemoved, StructureMismatch.

    >>> import holdfast, numpy as np
    >>> with holdfast.CheckpointManager("memory://many") as ckpts:
    ...     for step in (1, 2, 3):
    ...         _ = ckpts.save(step, {"model": {"w": np.array([step])}}).result()
    >>> members = holdfast.ensemble({"w": np.array([0])}, "memory://many@last=2")
    >>> [int(model["w"][0]) for model in members]
    [2, 3]
    """
    return Ensemble(
        model, checkpoints, name, rename or {}, strict=strict, allow_pickle=allow_pickle
    )
