"""Asynchronous saves in a training loop."""

from __future__ import annotations

from bench import machine
from bench.cases.common import MEMORY_COPY, Options, timed, write_s
from bench.others import Dcp, DcpKept, Orbax
from bench.outcome import Measure, Outcome
from bench.peers import HoldfastRun
from bench.states import transformer
from bench.training import QUIET, Loop, Quiet

# A save every ten steps, in steps that are longer than the disk needs for the state.
_LENGTH = 10
_STEP = 1.5


def asynchronous(options: Options) -> Outcome:
    """Stall and lost time of each contender's save in one loop that keeps all cores busy."""
    state = transformer(options.mib)
    length = 2 if options.quick else _LENGTH
    kinds = options.kinds(HoldfastRun, Dcp, DcpKept, Orbax)
    with options.scratch() as folder:
        if not options.quick:
            state.calibrate(_STEP * write_s(folder, state.nbytes))
        copy = machine.MemoryCopy(state.nbytes)
        copies = [timed(copy).wall_s for _ in range(options.rounds + 1)][1:]
        del copy
        training = Loop(state, folder, kinds)
        spare = transformer(options.mib, trains=False)
        group = [QUIET, *training.peers]
        groups = list(options.turns())
        turns = training.train(group * len(groups), length, check=spare, checked=len(group))
        training.close()
    turns = turns[len(group) * groups.count(False) :]
    quiet = Quiet(turns)
    outcome = Outcome(
        case="loop",
        title="Asynchronous saves in a training loop",
        state=f"a transformer with Adam, {state.describe()}",
        measures=[
            Measure("stall", "stall"),
            Measure("in_flight", "lost while saving"),
            Measure("lost", f"lost in {length} steps"),
            Measure("share", f"slower with a save every {length} steps", "%", plotted=False),
            Measure("steps", "steps in flight", "", reference=False, plotted=False),
        ],
        notes=[
            f"A step takes {quiet.step_s:.2f} s without saves ({state.micro_batches} "
            f"micro-batches), {quiet.update_s:.2f} s of it in the optimizer; the boundary of "
            f"`Run.range` between two steps takes {1e3 * quiet.boundary_s:.2f} ms. {length} steps "
            f"without a save took from {min(quiet.turns_s):.2f} to {max(quiet.turns_s):.2f} s.",
        ],
    )
    for turn in turns:
        if turn.name == QUIET:
            continue
        stall_s = quiet.stall_s(turn, overlaps=training.peers[turn.name].overlaps)
        lost_s = quiet.lost_s(turn)
        outcome.add(
            turn.name,
            stall=stall_s,
            in_flight=quiet.in_flight_s(turn),
            lost=lost_s,
            share=100 * lost_s / quiet.turn_s,
            steps=sum(step.saving for step in turn.steps),
        )
    for copy_s in copies:
        outcome.add(MEMORY_COPY, stall=copy_s)
    for key, name, target in (("stall", "stall", 0.1), ("lost", "lost time", 1 / 3)):
        ratio = outcome.ratio("Holdfast", "DCP", key)
        outcome.aim(f"{name} as a part of DCP's", target, ratio, at_least=False)
    return outcome
