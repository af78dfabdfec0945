"""Peak extra memory: each operation of each contender in a process of its own."""

from __future__ import annotations

from pathlib import Path

from bench.apart import Marks, watched
from bench.cases.common import MB, Options
from bench.others import Dcp, Orbax, Safetensors, TorchMmap, TorchSave
from bench.outcome import Measure, Outcome
from bench.peers import Holdfast, HoldfastRun, Peer
from bench.states import transformer
from bench.training import QUIET, Loop

_LENGTH = 3


def peaks(options: Options) -> Outcome:
    """What a save, a restore and an asynchronous save take beside the state itself."""
    outcome = Outcome(
        case="memory",
        title="Peak extra memory",
        state="",
        measures=[
            Measure("save", "durable save", "MB"),
            Measure("restore", "restore", "MB"),
            Measure("loop", "asynchronous save in a loop", "MB"),
        ],
        notes=[
            "Anonymous and shared memory above what the process held before, sampled from "
            "outside each millisecond; pages of mapped files are not counted. In the loop: "
            "above the peak of the same steps without a save. One figure each."
        ],
    )
    kinds = options.kinds(Holdfast, TorchSave, TorchMmap, Safetensors, Dcp, Orbax)
    with options.scratch() as folder:
        for kind in kinds:
            place = folder / kind.name
            (described, digest), saved = watched(_save, kind, place, options.mib)
            outcome.state = f"a transformer with Adam, {described}"
            _, restored = watched(_restore, kind, place, options.mib, digest)
            outcome.add(
                kind.name,
                save=saved["save"].extra / MB,
                restore=restored["restore"].extra / MB,
            )
        for kind in options.kinds(HoldfastRun, Dcp, Orbax):
            place = folder / f"{kind.name}-loop"
            place.mkdir()
            _, parts = watched(_loop, kind, place, options.mib)
            outcome.add(kind.name, loop=(parts[kind.name].peak - parts[QUIET].peak) / MB)
    for key, text in (("save", "durable save"), ("restore", "restore")):
        found = outcome.median("Holdfast", key)
        outcome.aim(f"{text}: extra memory", 300.0, found, at_least=False, unit="MB")
    return outcome


def _save(marks: Marks, kind: type[Peer], place: Path, mib: int) -> tuple[str, str]:
    state = transformer(mib)
    peer = kind(place, state)
    with marks.part("save"):
        peer.save()
    peer.close()
    return state.describe(), state.digest()


def _restore(marks: Marks, kind: type[Peer], place: Path, mib: int, expected: str) -> None:
    state = transformer(mib)
    state.clear()
    peer = kind(place, state)
    with marks.part("restore"):
        peer.restore(state)
    peer.close()
    if state.digest() != expected:
        raise AssertionError(f"{peer.name} did not restore what was saved")


def _loop(marks: Marks, kind: type[Peer], place: Path, mib: int) -> None:
    state = transformer(mib)
    loop = Loop(state, place, [kind])
    loop.train([QUIET, kind.name], _LENGTH, watch=marks.part)
    loop.close()
