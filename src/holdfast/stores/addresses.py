"""Addresses of one run as seen from another: a forked run names its parent so.

Relative where both are folders, so that a folder of runs can be moved as a whole.
"""

from __future__ import annotations

import os


def relative_address(base: str, target: str) -> str:
    """`target` as the run at `base` should write it down.

    >>> relative_address("/runs/child", "/runs/parent")
    '../parent'
    >>> relative_address("/runs/child", "s3://b/parent")
    's3://b/parent'
    """
    if "://" in base or "://" in target:
        return target
    return os.path.relpath(os.path.realpath(target), os.path.realpath(base))


def join_address(base: str, written: str) -> str:
    """The address that the run at `base` wrote down with `relative_address`.

    >>> join_address("/runs/child", "../parent")
    '/runs/parent'
    """
    if "://" in written or os.path.isabs(written):
        return written
    return os.path.normpath(os.path.join(os.path.realpath(base), written))


def real_address(address: str) -> str:
    """`address`, the same for every way to write a folder's.

    >>> real_address("/runs/../runs/a"), real_address("s3://b/a")
    ('/runs/a', 's3://b/a')
    """
    return address if "://" in address else os.path.realpath(os.path.expanduser(address))
