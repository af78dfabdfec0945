"""What the commands share: options, and opening the run that an argument names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from holdfast.core.address import Reference, parse_reference
from holdfast.errors import BadAddress, NoStore

if TYPE_CHECKING:
    from holdfast.manager.manager import CheckpointManager

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
def opened(address: str) -> Iterator[CheckpointManager]:
    """The run at `address`, for reading: nothing is created there."""
    from holdfast.manager.manager import CheckpointManager

    with CheckpointManager(address, keep=None) as manager:
        yield manager


def no_checkpoint(address: str) -> NoStore:
    """The error of a command that found nothing to work on."""
    return NoStore(
        f"there is no checkpoint in {address}",
        hint="Check the address: `holdfast ls FOLDER` lists the runs below a folder.",
    )


def selector_of(reference: Reference) -> str:
    """What the manager takes as `ref`."""
    return str(reference.selector)
