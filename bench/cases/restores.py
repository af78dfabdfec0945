"""Restores into a live model, with the page cache cold and warm."""

from __future__ import annotations

from bench import durable, machine
from bench.cases.common import CACHED_READ, COLD_READ, Options, timed
from bench.others import Dcp, Orbax, Safetensors, TorchMmap, TorchSave
from bench.outcome import Measure, Outcome
from bench.peers import Holdfast
from bench.states import transformer


def restore(options: Options) -> Outcome:
    """Fill a live model and its optimizer; every restore is compared with what was saved."""
    state = transformer(options.mib)
    expected = state.digest()
    outcome = Outcome(
        case="restore",
        title="Restore into a live model",
        state=f"a transformer with Adam, {state.describe()}",
        measures=[
            Measure("warm", "warm"),
            Measure("cold", "cold"),
            Measure("cpu", "CPU time, warm", plotted=False),
        ],
        notes=["Only Holdfast verifies what it reads."],
    )
    with options.scratch() as folder:
        kinds = options.kinds(Holdfast, TorchSave, TorchMmap, Safetensors, Dcp, Orbax)
        peers = [kind(folder / kind.name, state) for kind in kinds]
        for peer in peers:
            peer.save()
        raw = folder / "raw"
        machine.write_buffered(raw, -(-state.nbytes // machine.BLOCK) * machine.BLOCK)
        can_cool = durable.cool(raw)
        direct = machine.direct_io_works(folder)
        if not can_cool:
            outcome.notes.append("This file system keeps its files in memory: no cold figures.")
        for counts in options.turns():
            for peer in peers:
                for key in ("warm", "cold") if can_cool else ("warm",):
                    state.clear()
                    if key == "warm":
                        durable.warm_cache(peer.last)
                    elif not durable.cool(peer.last):
                        raise AssertionError(f"{peer.last} is still in the page cache")
                    took = timed(lambda peer=peer: peer.restore(state))
                    if state.digest() != expected:
                        raise AssertionError(f"{peer.name} did not restore what was saved")
                    if counts:
                        outcome.add(peer.name, **{key: took.wall_s})
                    if counts and key == "warm":
                        outcome.add(peer.name, cpu=took.cpu_s)
            durable.warm_cache(raw)
            cached = timed(lambda: machine.read_buffered(raw))
            if counts:
                outcome.add(CACHED_READ, warm=cached.wall_s, cpu=cached.cpu_s)
            if can_cool:
                durable.cool(raw)
                cold_s = timed(lambda: machine.read_buffered(raw)).wall_s
                if direct:
                    durable.cool(raw)
                    cold_s = min(cold_s, timed(lambda: machine.read_direct(raw)).wall_s)
                if counts:
                    outcome.add(COLD_READ, cold=cold_s)
        for peer in peers:
            peer.close()
    best = outcome.best_other("warm")
    outcome.aim(
        f"warm: speed as a multiple of the fastest other's ({best})",
        1.5,
        outcome.ratio(best or "", "Holdfast", "warm"),
    )
    share = outcome.share(COLD_READ, "Holdfast", "cold")
    outcome.aim("cold: share of the read ceiling", 90.0, share, unit="%")
    return outcome
