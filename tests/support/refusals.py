"""What a refusal says: its type, and the words of its message and of its hint."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from holdfast.errors import HoldfastError


class Refusal(NamedTuple):
    """One way to be refused, and what is said then."""

    provoke: Callable[[], Any]
    kind: type[HoldfastError]
    message: str
    hint: str

    def check(self) -> None:
        with pytest.raises(HoldfastError) as caught:
            self.provoke()
        assert type(caught.value) is self.kind
        assert self.message in caught.value.message
        assert self.hint in caught.value.hint
        assert "Hint:" not in caught.value.message


def hinted(hint: str, option: str) -> Any:
    """The value of an option as the hint prints it, to be pasted."""
    found = re.search(rf"{option}=(\[.*?\]|{{.*?}})", hint)
    assert found is not None, hint
    return ast.literal_eval(found[1])
