"""What `metaflow-checkpoint` has saved: it loads and deletes that itself, where it is installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from holdfast.errors import UsageError
from holdfast.metaflow.folders import filled
from holdfast.metaflow.places import FOLDER

_NAMESPACE = "metaflow_extensions.obcheckpoint"
_TYPES = ("checkpoint", "model")


def is_theirs(reference: object) -> bool:
    """Whether it is a reference that `metaflow-checkpoint` has given: of its `@checkpoint`,
    `@model` or `@huggingface_hub`."""
    if isinstance(reference, Mapping):
        key = reference.get("key")
        return reference.get("type") in _TYPES and isinstance(key, str) and _is_their_key(key)
    if isinstance(reference, str):
        return _is_their_key(reference)
    return type(reference).__module__.startswith(f"{_NAMESPACE}.")


def _is_their_key(key: str) -> bool:
    return "/artifacts/" in key and not key.startswith(f"{FOLDER}/")


def load(reference: object, into: str | os.PathLike[str]) -> None:
    """Put its files into a folder that is there. They are copies: of a local datastore the other
    extension makes links.

    Raises UsageError where it is not installed, and what it raises.
    """
    theirs = _installed(reference)
    with filled(Path(into)) as new:
        loaded = new.with_name("loaded")  # on the same file system: what is no link is moved
        loaded.mkdir()
        theirs.load_model(reference, str(loaded))
        shutil.copytree(loaded, new, copy_function=_take)


def _take(source: str, target: str) -> None:
    if os.path.islink(source):
        shutil.copy2(source, target)
    else:
        os.replace(source, target)


def delete(reference: object) -> bool:
    """What the other extension's `delete_model` does."""
    return _installed(reference).delete_model(reference)


def _installed(reference: object) -> ModuleType:
    try:
        from metaflow_extensions.obcheckpoint.plugins.machine_learning_utilities import (  # pyright: ignore[reportMissingImports]
            datastructures,
        )
    except ImportError:
        raise UsageError(
            f"metaflow-checkpoint has saved this, and is not installed: {str(reference)[:200]}",
            hint="`pip install metaflow-checkpoint`. `from metaflow import …` stays Holdfast's.",
        ) from None
    return datastructures
