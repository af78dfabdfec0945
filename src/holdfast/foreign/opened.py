"""A foreign file or folder that is open: what it holds, its values, what can be checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self, cast

from holdfast.errors import DamagedObject
from holdfast.foreign.data import ForeignBytes, ForeignObject, ForeignTensor, Tree
from holdfast.foreign.described import ForeignFile

Leaf = ForeignTensor | ForeignBytes | ForeignObject

PLAIN_RATIO = 16
"""How many times its own size a file may grow: several tensors can name the same bytes."""
PACKED_RATIO = 1100
"""The same where it is compressed: deflate makes at most 1,032 bytes of one."""


@dataclass(frozen=True)
class Proof:
    """What `Foreign.check` can find out about a kind of file, in words, and what nothing can."""

    checked: tuple[str, ...]
    unchecked: tuple[str, ...]


@dataclass
class Foreign:
    """Use it as a context manager: tensors are read as long as it is open."""

    file: ForeignFile
    """What `describe` says."""
    proof: Proof
    build: Callable[[], Tree]
    """The values, for an import. Raises DamagedObject."""
    survey: Callable[[], Iterator[str]]
    """Reads what can be checked, and yields what is wrong."""
    content: Callable[[], Tree] | None = None
    """The values for a comparison, where those for an import say too little."""
    ratio: int = PLAIN_RATIO
    held: ExitStack = field(default_factory=ExitStack)

    def check(self) -> list[str]:
        """Read all that can be checked; what is wrong, in words."""
        found = list(self.file.problems)
        try:
            found += self.survey()
        except DamagedObject as error:
            found.append(error.reason)
        return list(dict.fromkeys(found))

    def tree(self) -> Tree:
        """Dicts, lists and plain values around tensors that are not read yet.

        Raises DamagedObject.
        """
        if self.file.problems:
            raise DamagedObject("the file", self.file.problems[0])
        return self.build()

    def compared(self) -> Tree:
        """As `tree`, for a comparison."""
        return self.content() if self.content is not None else self.tree()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.held.close()


def nothing_more() -> Iterator[str]:
    """For kinds whose description has looked at all that can be checked."""
    return iter(())


def flat(tree: Tree, most: int = 1_000_000) -> Iterator[tuple[str, Any]]:
    """Every tensor, object and plain value of a tree by its path, in its order.

    What occurs a second time is there as a text that says where it was first.
    """
    seen: dict[int, str] = {}
    waiting: list[tuple[str, Any]] = [("", tree)]
    while waiting and most:
        most -= 1
        path, value = waiting.pop()
        pairs: list[tuple[str, Any]] = []
        if isinstance(value, dict):
            known = cast("dict[Any, Any]", value)
            pairs = [(key_text(key), item) for key, item in known.items()]
        elif isinstance(value, list | tuple):
            pairs = [(str(i), item) for i, item in enumerate(cast("list[Any]", value))]
        if not pairs:
            yield path, value
        elif (first := seen.setdefault(id(cast("object", value)), path)) != path:
            yield path, f"<the same as {first or 'all of it'}>"
        else:
            waiting += [(f"{path}/{key}" if path else key, item) for key, item in reversed(pairs)]


def key_text(key: Any) -> str:
    """A string as it is, any other key so that `0` and `"0"` differ."""
    if isinstance(key, ForeignObject):
        return f"<{key.name}>"
    return key if isinstance(key, str) else f"[{key!r}]"


def objects_in(tree: Tree) -> list[tuple[str, str]]:
    """(path, name) of what no plain value could be made of."""
    found: list[tuple[str, str]] = []
    for path, value in flat(tree):
        if isinstance(value, ForeignObject):
            found.append((path, value.name))
    return found
