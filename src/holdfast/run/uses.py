"""What the body of a `for` does first with each of its variables: read or assign.

A variable that each body assigns before it reads it carries nothing from one to the next,
whatever it holds between them. The compiled code is read in the order in which it is
written, as if every branch were taken: what is assigned in one branch only counts as
assigned. So "read" can be relied on, and "assigned" is often said too soon.
"""

from __future__ import annotations

import dis
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from types import CodeType
from typing import Literal

from holdfast.run.callsite import loop_end

Use = Literal["read", "assigned"]

_OPERATIONS = re.compile(
    r"(LOAD|STORE|DELETE)_(?:FAST|NAME|GLOBAL|DEREF|CLASSDEREF|FROM_DICT_OR_\w+?)"
    r"(?:_(?:BORROW|CHECK))?(?=_LOAD|_STORE|$)"
)
"""In names of instructions; newer interpreters have some that are two at once."""
_FILLING = frozenset(
    {"copy_", "zero_", "fill_", "fill", "normal_", "uniform_", "random_", "bernoulli_"}
)
"""Methods of tensors and arrays that overwrite all elements."""


@lru_cache(maxsize=64)
def first_uses(code: CodeType, loop: int, now: int) -> Mapping[str, Use]:
    """What is done first with each variable that the body of the `for` at `loop` names,
    from the instruction after `now` on: to the body's end, and from its start to `now`.

    Functions that are made in the body count as called where they are made. Empty if
    there is no `for` at `loop`.
    """
    end = loop_end(code, loop)
    body = [one for one in dis.get_instructions(code) if end and loop <= one.offset < end]
    late = [one for one in body if one.offset > now]
    early = [one for one in body if one.offset <= now]
    found: dict[str, Use] = {}
    for name, use in [*_uses(code, late), *_uses(code, early)]:
        found.setdefault(name, use)
    return found


def _uses(code: CodeType, body: Sequence[dis.Instruction]) -> Iterator[tuple[str, Use]]:
    shared = {*code.co_cellvars, *code.co_freevars}
    for index, one in enumerate(body):
        if isinstance(one.argval, CodeType):
            yield from _uses_of_function(one.argval)
            continue
        names = _names(one)
        for place, (verb, name) in enumerate(zip(_verbs(one.opname), names, strict=False), 1):
            if verb != "LOAD":
                yield name, "assigned"
            elif "_FAST" in one.opname and name in shared:
                continue  # its cell, for a function that is made here
            elif place == len(names) and _is_filled(name, body[index + 1 : index + 20]):
                yield name, "assigned"
            else:
                yield name, "read"


def _names(one: dis.Instruction) -> tuple[str, ...]:
    return one.argval if isinstance(one.argval, tuple) else (one.argval,)


@lru_cache(maxsize=256)
def _verbs(opname: str) -> tuple[str, ...]:
    return tuple(_OPERATIONS.findall(opname))


def _uses_of_function(code: CodeType) -> Iterator[tuple[str, Use]]:
    own = {*code.co_varnames, *code.co_cellvars} - {*code.co_freevars}
    for name, use in _uses(code, list(dis.get_instructions(code))):
        if name not in own:
            yield name, use


def _is_filled(name: str, following: Sequence[dis.Instruction]) -> bool:
    """Whether the variable, just read, gets all its elements from elsewhere:
    `name[:] = ...`, `name[...] = ...`, `name.copy_(...)`."""
    if not following:
        return False
    if following[0].opname in ("LOAD_METHOD", "LOAD_ATTR"):
        if following[0].argval not in _FILLING:
            return False
        for one in following:
            if _verbs(one.opname) and name in _names(one):
                return False  # its old elements are among the arguments
            if one.opname == "POP_TOP":
                return True
        return False
    for one in following:
        if one.opname == "LOAD_CONST" and one.argval in (None, ..., slice(None)):
            continue
        if one.opname == "BUILD_SLICE":
            continue
        return one.opname in ("STORE_SUBSCR", "STORE_SLICE")
    return False
