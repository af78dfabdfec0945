"""Records of checkpoints for the tests of the policies, and a strategy for whole runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from holdfast.core.digest import digest
from holdfast.core.records import Record


def record(
    step: int,
    ordinal: int | None = None,
    *,
    time_s: float | None = None,
    packs: Mapping[str, int] | None = None,
    metrics: Mapping[str, float] = {},
    tags: Sequence[str] = (),
    pins: Sequence[str] = (),
    **fields: Any,
) -> Record:
    """A record saved at second `step`, as the `step`-th commit, with one pack of 100 bytes."""
    ordinal = step if ordinal is None else ordinal
    packs = {f"p{ordinal}": 100} if packs is None else packs
    return Record(
        id=fields.pop("id", digest(f"{step} {ordinal}".encode())),
        step=step,
        ordinal=ordinal,
        time_s=float(step) if time_s is None else time_s,
        nbytes=sum(packs.values()),
        new_bytes=0,
        packs=dict(packs),
        metrics=dict(metrics),
        tags=tuple(tags),
        pins=tuple(pins),
        **fields,
    )


@st.composite
def runs(draw: st.DrawFn, max_size: int = 14) -> list[Record]:
    """The records of a run, in any order: steps repeat, clocks jump, packs are shared."""
    steps = draw(st.lists(st.integers(0, 40), max_size=max_size))
    records = [
        record(
            step,
            ordinal,
            time_s=draw(st.floats(0, 1000)),
            packs={
                f"p{pack}": 10 * (pack + 1) for pack in draw(st.sets(st.integers(0, 8), max_size=4))
            },
            metrics=draw(
                st.dictionaries(
                    st.sampled_from(["loss", "acc"]),
                    st.floats(-3, 3).map(lambda x: round(x, 1)) | st.just(float("nan")),
                )
            ),
            tags=draw(st.lists(st.sampled_from(["gold", "paper"]), max_size=1)),
            pins=draw(st.sampled_from([(), (), (), ("",), ("runs/child",)])),
        )
        for ordinal, step in enumerate(steps, 1)
    ]
    return draw(st.permutations(records))
