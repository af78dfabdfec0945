"""Whether what is being decoded becomes a part of a live estimator.

There, nothing may be left as a description of what could not be made: the program would go on
with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from holdfast.core.adapters import Decoder


def is_live(decoder: Decoder) -> bool:
    """Whether a live estimator is around what is being decoded."""
    return bool(decoder.alias("sklearn").get("live"))


@contextmanager
def into_live(decoder: Decoder, live: bool) -> Iterator[None]:
    """While the parts of an estimator are decoded, which is `live` itself or not."""
    memo = decoder.alias("sklearn")
    before = memo.get("live", False)
    memo["live"] = before or live
    try:
        yield
    finally:
        memo["live"] = before
