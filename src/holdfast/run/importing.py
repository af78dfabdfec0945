"""A checkpoint of a run, made from a file of another make."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os.path import abspath, basename, expanduser

from holdfast.core.types import MiB
from holdfast.core.units import format_list, format_size
from holdfast.errors import DamagedObject, UnsupportedValue, UsageError, briefly
from holdfast.foreign import Foreign, open_foreign
from holdfast.manager import CheckpointInfo, CheckpointManager
from holdfast.manager.foreign_state import Converter, Tensors, below, named
from holdfast.run.position import Position, to_tree

_SLACK_BYTES = 256 * MiB
_SHOWN = 20


@dataclass(frozen=True)
class Imported:
    """What became of a foreign file."""

    info: CheckpointInfo
    kind: str
    """Of the file, in words."""
    names: tuple[str, ...]
    """In the checkpoint's state."""
    tensors: int
    nbytes: int
    """Of its tensors. What several of them share counts once."""
    skipped: tuple[tuple[str, str], ...]
    """(path, class) of objects that were left out."""


@briefly
def import_checkpoint(
    source: str | os.PathLike[str],
    address: str | os.PathLike[str],
    *,
    step: int | None = None,
    name: str = "",
    only: str = "",
    tensors: Tensors | None = None,
    skip_objects: bool = False,
    metrics: Mapping[str, float] | None = None,
    tags: Iterable[str] = (),
    keep: str | None = None,
) -> Imported:
    """Make a checkpoint of the run at `address` from a file or folder of another make.

    Public as `holdfast.import_checkpoint`. `source` is a file by PyTorch, safetensors, NumPy,
    Keras, XGBoost, LightGBM or pickle, or a folder of safetensors shards or by PyTorch's DCP.
    Nothing in it is run and no framework is imported; its bytes are read in pieces, after
    what its format lets check was checked.

    Tensors become leaves, plain values stay values, a state_dict restores into a live module.
    What is a `dict` becomes the state; a state_dict, or what is no dict, is put below
    `name` ("model" if there is none). `only` takes what is below a path of it
    ("checkpoint/state_dict"). `tensors` says as whose they come back ("torch", "numpy"), where
    that is not what the file says. `step` may be left out in a new run: 0.

    A `Run` at `address` starts from it: what it tracks by the names in the checkpoint is
    restored, all else starts as it is, and the loop begins at its beginning.

    Raises UnsupportedValue listing what is no plain value, unless `skip_objects` leaves it out;
    DamagedObject, UnknownFile, UsageError; and what `CheckpointManager.save` does. Then
    nothing was added to the run.

    >>> import holdfast, pickle, tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(pickle.dumps({"epoch": 3, "losses": [0.5, 0.25]}))
    ...     file.flush()
    ...     done = holdfast.import_checkpoint(file.name, "memory://imported")
    >>> done.kind, holdfast.open("memory://imported")["losses"]
    ('pickle', [0.5, 0.25])
    """
    path = expanduser(os.fspath(source))
    with open_foreign(path) as foreign:
        if problems := foreign.check():
            hint = "Nothing was imported. Copy or download it again."
            raise DamagedObject(path, "; ".join(problems[:3]), hint=hint)
        tree = below(foreign.tree(), only, path)
        names = named(tree, name, only)
        converter = Converter(tensors)
        state = converter.state(names)
        if converter.objects and not (skip_objects and state):
            raise _refused(path, converter.objects)
        _check_size(foreign, converter, path)
        with CheckpointManager(address, keep=keep) as manager:
            number = _step(manager, step)
            manager.environment = {"imported": {"from": abspath(path), "kind": foreign.file.kind}}
            loop = {**to_tree(Position(step=number)), "names": sorted(state), "loaders": []}
            pending = manager.save(
                number,
                state,
                metrics=metrics,
                tags=tags,
                note=f"imported from {basename(abspath(path))}"[:200],
                loop=loop,
                rng=False,  # those of this process are no part of it
            )
            info = pending.result()
    return Imported(
        info,
        foreign.file.kind,
        tuple(state),
        converter.count,
        converter.nbytes,
        tuple(converter.objects),
    )


def _step(manager: CheckpointManager, step: int | None) -> int:
    if step is not None:
        return step
    newest = manager.checkpoints()[-1:]
    if newest:
        raise UsageError(
            f"{manager.address} has checkpoints already, the newest of step {newest[0].step:,}",
            hint="Say which step this one is of: --step N (step=N).",
        )
    return 0


def _refused(path: str, objects: list[tuple[str, str]]) -> UnsupportedValue:
    lines = [f"{where or '(all of it)'}: {name}" for where, name in objects[:_SHOWN]]
    if len(objects) > _SHOWN:
        lines.append(f"... and {len(objects) - _SHOWN:,} more")
    error = UnsupportedValue(
        objects[0][0],
        f"{objects[0][1]}",
        hint="Nothing was imported. --skip-objects (skip_objects=True) leaves them out; "
        "--only PATH (only=) takes a part of the file.",
    )
    error.message = f"{path} holds what is no plain value:{format_list(lines)}"
    error.args = (error.message,)
    return error


def _check_size(foreign: Foreign, converter: Converter, path: str) -> None:
    most = foreign.ratio * foreign.file.nbytes + _SLACK_BYTES
    if converter.nbytes > most:
        size = format_size(foreign.file.nbytes)
        raise DamagedObject(
            path, f"it would become {format_size(converter.nbytes)}, and has {size}"
        )
