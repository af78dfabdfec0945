"""What is said about a foreign file: plain frozen values, as the file has them.

Every text may hold anything: escape it before a terminal sees it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForeignLeaf:
    """A tensor or an array."""

    path: str
    dtype: str
    """As safetensors names it (`F32`); else in the file's own words."""
    shape: tuple[int, ...]
    nbytes: int
    """Of its elements. Several may share them."""
    note: str = ""
    """"same data as …", "view of …", "meta: without data"."""


@dataclass(frozen=True)
class ForeignFile:
    """A whole file."""

    kind: str
    """In words: "safetensors", "PyTorch (zip)", …"""
    nbytes: int
    leaves: tuple[ForeignLeaf, ...] = ()
    values: tuple[tuple[str, str], ...] = ()
    """(path, text) of what is no tensor or array."""
    runs: tuple[str, ...] = ()
    """Names that loading would import and could call, beyond the harmless ones that
    tensors and plain values need: loading the file runs that code."""
    notes: tuple[str, ...] = ()
    """What is unusual, for people."""
    problems: tuple[str, ...] = ()
    """Why it is damaged, or was not looked at to its end. What is said above is what
    was found until there."""
