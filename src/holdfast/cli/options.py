"""What the commands share: options, and opening the run that an argument names."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from holdfast.cli.render import shown
from holdfast.core.address import Reference, parse_reference, printable, shell_word
from holdfast.errors import BadAddress, DamagedObject, HoldfastError
from holdfast.manager.progress import working

if TYPE_CHECKING:
    from holdfast.manager.listing import Listing

_F = TypeVar("_F", bound=Callable[..., Any])


def json_option(command: _F) -> _F:
    """`--json`, the same in every command."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")(
        command
    )


def whole_run(text: str) -> str:
    """The address in `text`, where one checkpoint of it would make no sense."""
    reference = parse_reference(text)
    if reference.explicit:
        raise BadAddress(
            f"{text!r} names a checkpoint; a run is wanted",
            hint=f"Write {reference.address}, or {text}/ if the '@' is part of the name.",
        )
    return reference.address


@contextmanager
def opened(address: str) -> Iterator[Listing]:
    """The run at `address`, for looking and pruning: nothing is created there."""
    from holdfast.manager.listing import Listing

    try:
        with Listing(address) as run:
            yield run
    except HoldfastError as error:
        if isinstance(error, DamagedObject) and not error.hint:
            error.hint = f"See which checkpoints are intact: holdfast verify {shell_word(address)}"
        # Messages may have several lines; an address must not add one.
        error.message = error.message.replace(address, printable(address))
        error.hint = error.hint.replace(address, printable(address))
        raise


@contextmanager
def watched(doing: str) -> Iterator[None]:
    """On a terminal, show how far the reading in the block is, if it takes long. The result
    says that it is done, so elsewhere nothing does."""
    with working(shown(doing), "", lambda line: None):
        yield


def selector_of(reference: Reference) -> str:
    """What the manager takes as `ref`."""
    return str(reference.selector)


def python_command(words: Sequence[str]) -> list[str]:
    """`words` as they are started: a script alone is run by this Python.

    >>> python_command(["echo", "hello"])
    ['echo', 'hello']
    """
    if words[0].endswith(".py") and not os.access(words[0], os.X_OK):
        return [sys.executable, *words]
    return list(words)
