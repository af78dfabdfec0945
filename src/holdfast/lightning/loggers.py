"""Loggers: a resumed training writes on where the interrupted one did."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from holdfast.lightning.package import is_a


def loggers_state(loggers: Sequence[Any], *, first: bool) -> list[dict[str, Any]]:
    """`first`: of several processes this is the one that logs."""
    return [_state_of(logger, first=first) for logger in loggers]


def _state_of(logger: Any, *, first: bool) -> dict[str, Any]:
    if not first:
        return {"kind": type(logger).__qualname__, "version": None}
    version = logger.version if hasattr(logger, "_version") else None
    known = version is None or isinstance(version, int | str)
    state = {"kind": type(logger).__qualname__, "version": version if known else None}
    if _writes_csv(logger):
        logger.save()
        writer = logger.experiment
        state["keys"] = list(writer.metrics_keys)
        state["rows"] = np.frombuffer(_read(writer), np.uint8)
    return state


def put_back_versions(
    loggers: Sequence[Any], saved: Sequence[Mapping[str, Any]], *, first: bool
) -> None:
    """Make loggers that number their folders write to those that they had: to be called before
    anything else asks where that is."""
    for logger, state in zip(loggers, saved, strict=False):
        if state["kind"] != type(logger).__qualname__ or state["version"] is None:
            continue
        if logger.version == state["version"]:
            continue
        made = logger.log_dir
        logger._version, logger._experiment = state["version"], None
        if not first:
            continue
        with suppress(OSError, TypeError):
            os.rmdir(made)  # of the number that this process would have had; only if it is empty


def put_back_rows(loggers: Sequence[Any], saved: Sequence[Mapping[str, Any]]) -> None:
    """Make each `metrics.csv` what it was: rows from behind the checkpoint will come again."""
    for logger, state in zip(loggers, saved, strict=False):
        if not _writes_csv(logger) or "rows" not in state:
            continue
        with warnings.catch_warnings():  # it says that it deletes what is there
            warnings.filterwarnings("ignore", "Experiment logs directory .* exists")
            writer = logger.experiment
        writer.metrics, writer.metrics_keys = [], list(state["keys"])
        rows = state["rows"].tobytes()
        if rows:
            with writer._fs.open(writer.metrics_file_path, "wb") as file:
                file.write(rows)
        elif writer._fs.isfile(writer.metrics_file_path):
            writer._fs.rm_file(writer.metrics_file_path)


def _writes_csv(logger: Any) -> bool:
    return is_a(logger, "CSVLogger")


def _read(writer: Any) -> bytes:
    if not writer._fs.isfile(writer.metrics_file_path):
        return b""
    with writer._fs.open(writer.metrics_file_path, "rb") as file:
        return file.read()
