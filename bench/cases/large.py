"""A state of 10 GB: whether it costs per GB what 1 GB costs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import machine
from bench.apart import Memory, watching_here
from bench.cases.common import GB, MB, Options, check, timed, write_s
from bench.others import Dcp, TorchMmap
from bench.outcome import Measure, Outcome
from bench.peers import Holdfast, HoldfastRun, Peer
from bench.states import Training, transformer
from bench.training import QUIET, Loop, Quiet

_STEP = 1.25
_CLIFF = 1.25
"""How much worse than small a large state may do per GB: what rounds differ by anyway."""


def per_gb(options: Options) -> Outcome:
    """Saves of a state without gradients, in a loop that computes something else."""
    outcome = Outcome(
        case="large",
        title="A large state, per GB",
        state="",
        measures=[
            Measure(f"{key}_{size}", f"{title}, {label}", unit)
            for key, title, unit in (
                ("durable", "durable save", "s/GB"),
                ("stall", "stall", "ms/GB"),
                ("memory", "extra memory", "MB/GB"),
            )
            for size, label in (("small", "small"), ("large", "large"))
        ],
        notes=[
            "The gradients of the large state would not fit: its steps compute something else, "
            "and its optimizer steps over parameters that have none. All peers that save in the "
            "background copy it, which needs its size again in memory."
        ],
    )
    described: list[str] = []
    for size, mib in (("small", options.mib), ("large", options.large_mib)):
        reason = _lacks(options.folder, mib)
        if reason:
            outcome.notes.append(f"The {size} state was left out: {reason}.")
            print(outcome.notes[-1])
            continue
        state = transformer(mib, trains=False)
        described.append(f"{size}: {state.describe()}")
        with options.scratch() as folder:
            _saves(outcome, size, state, folder, options)
        # One after the other: what one of them keeps is not to be in the way of the next.
        for kind in (HoldfastRun, Dcp):
            if kind is Dcp and machine.memory_available() < 1.15 * state.nbytes:
                outcome.notes.append(f"DCP's copy of the {size} state does not fit in memory.")
                print(outcome.notes[-1])
                continue
            with options.scratch() as folder:
                _stalls(outcome, size, state, kind, folder, options)
        del state
    outcome.state = "a transformer with Adam; " + ", ".join(described)
    for measure in outcome.measures[::2]:
        small = outcome.median("Holdfast", measure.key)
        found = outcome.median("Holdfast", measure.key.replace("small", "large"))
        ratio = found / small if found is not None and small and small > 0 else None
        text = f"{measure.title.removesuffix(', small')} per GB as a multiple of the small state's"
        outcome.aim(text, _CLIFF, ratio, at_least=False)
    return outcome


def _saves(outcome: Outcome, size: str, state: Training, folder: Path, options: Options) -> None:
    # `mmap`: a second copy of the state in memory, to check it, might not fit.
    peers = [kind(folder / kind.name, state) for kind in (Holdfast, TorchMmap, Dcp)]
    for round_ in range(_rounds(options)):
        for peer in peers:
            state.touch()
            took = timed(peer.save)
            outcome.add(peer.name, **{f"durable_{size}": took.wall_s / (state.nbytes / GB)})
            if round_ == 0:
                check(peer, state)
            peer.forget()
    for peer in peers:
        peer.close()


def _stalls(
    outcome: Outcome,
    size: str,
    state: Training,
    kind: type[Peer],
    folder: Path,
    options: Options,
) -> None:
    state.busy_s = 0.0 if options.quick else _STEP * write_s(folder, state.nbytes)
    training = Loop(state, folder, [kind], leads_in=False)
    seen: list[Memory] = []

    @contextmanager
    def watch(name: str) -> Iterator[None]:
        with watching_here() as memory:
            seen.append(memory)
            yield

    turns = training.train([QUIET, *([kind.name] * _rounds(options))], 1, watch=watch)
    training.close()
    quiet, per_gb = Quiet(turns), state.nbytes / GB
    for turn in turns[1:]:
        stall_s = quiet.stall_s(turn, overlaps=kind.overlaps)
        outcome.add(kind.name, **{f"stall_{size}": 1e3 * stall_s / per_gb})
    # The most of all rounds: some keep for the next save what they took for the first.
    extra = max(memory.extra for memory in seen[1:])
    outcome.add(kind.name, **{f"memory_{size}": extra / MB / per_gb})


def _rounds(options: Options) -> int:
    return max(1, options.rounds // 2)  # each is ten times as long as those of other cases


def _lacks(folder: Path, mib: int) -> str:
    """What there is too little of for a state of `mib`; "" if it fits."""
    nbytes = mib * 2**20
    if machine.memory_available() < 1.3 * nbytes:
        return f"{machine.memory_available() / GB:.1f} GB of memory are available"
    # Two saves of one contender, one of each other, and one to come.
    if (free := shutil.disk_usage(folder).free) < 5 * nbytes:
        return f"{free / GB:.1f} GB are free in {folder}"
    return ""
