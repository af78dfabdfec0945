"""What a save returns and what a load takes: one checkpoint, as plain values.

The keys of the dictionary are those of `metaflow-checkpoint`, so that code and artifacts that
use them go on working.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, cast

from holdfast.errors import UsageError
from holdfast.manager.info import CheckpointInfo
from holdfast.metaflow.places import FOLDER, holds_models

# It is part of the log entry that lists the checkpoint, which every save writes.
METADATA_BYTES = 16 * 1024
DEFAULT_NAME = "mfchckpt"
_FORMATS = ("files", "tar")


class NotAReference(UsageError, ValueError):
    """What was given names no checkpoint and no model. A ValueError, as `metaflow-checkpoint`
    raises."""


@dataclass(frozen=True)
class Reference:
    """One checkpoint of a task, or a model.

    >>> reference = Reference(key="mf.holdfast/F/fit/task/7/main@3", url="/ds/mf.holdfast/…@3",
    ...     name="model", size=10, attempt=0, version_id=3, pathspec="F/7/fit/2",
    ...     created_on="2026-11-26T15:00:00+00:00", metadata={"epoch": 3})
    >>> Reference.of(reference.to_dict()) == reference
    True
    """

    key: str
    """Below the root of the datastore: a Holdfast run, and in it the version; of a model the id,
    for a version may be used again when the newest was deleted."""
    url: str
    """The same as a reference that `holdfast show` takes."""
    name: str
    size: int
    attempt: int
    version_id: int
    pathspec: str
    """The task that saved it."""
    created_on: str
    """ISO 8601, in UTC."""
    metadata: Mapping[str, Any]
    latest: bool = True
    """Whether a task goes on from it by itself."""
    file: str = ""
    """The name of the one file that it is; "" for a folder."""
    rank: int | None = None
    """The node that saved it, of a step that runs on several."""
    namespace: str = ""
    """Metaflow's, of the task that saved it."""
    attributes: Sequence[str] = ()
    """Those of the flow's `self` that are in it."""

    @property
    def is_model(self) -> bool:
        """Whether `current.model.save` has made it."""
        return holds_models(self.key.rpartition("@")[0].rpartition("/")[2])

    def to_dict(self) -> dict[str, Any]:
        """As plain values, fit for an artifact."""
        plain = {**asdict(self), "metadata": dict(self.metadata), "storage_format": "files"}
        if self.is_model:
            uuid = f"{self.name}_{self.key.rpartition('@')[2][:32]}"
            model = {"type": "model", "label": self.name, "model_uuid": uuid, "source": "task"}
            return {**plain, **model, "serializer": "files"}
        pathspec_hash = hashlib.sha256(self.pathspec.encode()).hexdigest()[:8]
        checkpoint = {"type": "checkpoint", "creation_context": "task"}
        return {**plain, **checkpoint, "pathspec_hash": pathspec_hash}

    @classmethod
    def of(cls, value: object) -> Reference:
        """From a dictionary that `to_dict` made, or itself. Raises UsageError."""
        if isinstance(value, Reference):
            return value
        if isinstance(value, Mapping) and str(value.get("key", "")).startswith(f"{FOLDER}/"):
            fields = cls.__dataclass_fields__
            try:
                return cls(**{name: value[name] for name in fields if name in value})
            except TypeError:
                pass  # some are missing
        raise NotAReference(
            f"this is no checkpoint: {str(value)[:200]!r}",
            hint="Give what `save` returned or `list` shows. What metaflow-checkpoint has saved is "
            "loaded by `load_model`.",
        )


_NOTED = frozenset(Reference.__dataclass_fields__) - {
    *("key", "url", "size", "version_id", "created_on")  # what the list itself says
}


def check_format(storage_format: str) -> None:
    """Raises UsageError for what `storage_format` cannot be."""
    if storage_format not in _FORMATS:
        raise UsageError(
            f"storage_format must be one of {', '.join(_FORMATS)}, not {storage_format!r}"
        )


def note_of(noted: Mapping[str, Any]) -> str:
    """What is recorded with a checkpoint in its run's list, so that a listing needs no more:
    a line for people, and one for `read_note`."""
    line = " ".join(str(noted["name"]).split())
    return f"{line}, attempt {noted['attempt']}\n{json.dumps(noted, separators=(',', ':'))}"


def read_note(info: CheckpointInfo, key: str) -> Reference | None:
    """The reference of a listed checkpoint; None if none of ours is recorded with it.

    What a newer version records besides is passed over: its checkpoints are not hidden.
    """
    try:
        noted = json.loads(info.note.partition("\n")[2])
        noted = {name: value for name, value in noted.items() if name in _NOTED}
        name = info.id if holds_models(key.rpartition("/")[2]) else str(info.step)
        return Reference(
            key=f"{key}@{name}",
            url=f"{info.address}@{name}",
            size=info.nbytes,
            version_id=info.step,
            created_on=datetime.fromtimestamp(info.time_s, UTC).isoformat(),
            **noted,
        )
    except (ValueError, TypeError, AttributeError):
        return None  # a note of somebody else's


def plain_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """`metadata` as JSON can hold it, NaN and infinities too; NumPy's and PyTorch's numbers and
    arrays become Python's, tuples lists, and keys texts.

    Raises UsageError for what cannot be, and for more than 16 KiB.
    """
    if metadata is None:
        return {}
    try:
        text = json.dumps(_plain(dict(metadata)))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"the metadata of a checkpoint must be plain values: {error}",
            hint="Numbers, texts, lists and dictionaries; put the rest in a file.",
        ) from None
    if len(text) > METADATA_BYTES:
        raise UsageError(
            f"the metadata of a checkpoint takes {len(text):,} bytes; {METADATA_BYTES:,} can be",
            hint="Put it in a file of the checkpoint.",
        )
    return json.loads(text)


def _plain(value: object) -> object:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        items = cast(Mapping[object, object], value).items()
        plain = {_key(key): _plain(each) for key, each in items}
        if len(plain) < len(value):
            raise TypeError(f"two keys of {str(value)[:80]} are the same as text")
        return plain
    if isinstance(value, list | tuple):
        return [_plain(each) for each in cast(Sequence[object], value)]
    convert = getattr(value, "tolist", None)  # of arrays, tensors, and their scalars
    if callable(convert) and type(converted := convert()) is not type(value):
        return _plain(converted)
    raise TypeError(f"{type(value).__name__} {str(value)[:80]!r}")


def _key(key: object) -> str:
    plain = _plain(key)
    if isinstance(plain, str | int | float):
        return plain if isinstance(plain, str) else json.dumps(plain)
    raise TypeError(f"the key {str(key)[:80]}")


def metrics_of(metadata: Mapping[str, Any]) -> dict[str, float]:
    """Its finite numbers: what `keep="best=2:val_loss"` ranks by."""
    return {
        name: number
        for name, value in metadata.items()
        if name.isidentifier() and math.isfinite(number := _number(value))
    }


def _number(value: object) -> float:
    """NaN for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
