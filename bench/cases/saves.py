"""Saves outside of a loop: a full one, the next one of a frozen model, many small tensors."""

from __future__ import annotations

from bench import machine
from bench.cases.common import (
    BUFFERED_WRITE,
    DIRECT_WRITE,
    MB,
    MEMORY_COPY,
    Options,
    check,
    timed,
)
from bench.others import Dcp, Orbax, Safetensors, TorchSave
from bench.outcome import Measure, Outcome
from bench.peers import Holdfast
from bench.states import lora, small_tensors, transformer

_DURABLE = Measure("durable", "durable save")
_CPU = Measure("cpu", "CPU time", plotted=False)


def durable(options: Options) -> Outcome:
    """A full save of a model with Adam after a dense step."""
    state = transformer(options.mib)
    outcome = Outcome(
        case="durable",
        title="Durable full save",
        state=f"a transformer with Adam, {state.describe()}",
        measures=[_DURABLE, _CPU],
    )
    with options.scratch() as folder:
        direct = machine.direct_io_works(folder)
        if not direct:
            outcome.notes.append("This file system refuses O_DIRECT: no ceiling for it.")
        raw = folder / "raw"
        kinds = options.kinds(Holdfast, TorchSave, Safetensors, Dcp, Orbax)
        peers = [kind(folder / kind.name, state) for kind in kinds]
        for counts in options.turns():
            for peer in peers:
                state.touch()
                took = timed(peer.save)
                if counts:
                    outcome.add(peer.name, durable=took.wall_s, cpu=took.cpu_s)
                if not counts or options.quick:
                    check(peer, state)
                peer.forget()
            writes = {BUFFERED_WRITE: machine.write_buffered}
            if direct:
                writes[DIRECT_WRITE] = machine.write_direct
            for row, write in writes.items():
                took = timed(lambda write=write: write(raw, state.nbytes))
                raw.unlink()
                if counts:
                    outcome.add(row, durable=took.wall_s, cpu=took.cpu_s)
        for peer in peers:
            peer.close()
    beside = "speed as a multiple of"
    outcome.aim(f"{beside} DCP's", 2.5, outcome.ratio("DCP", "Holdfast", "durable"))
    outcome.aim(f"{beside} torch.save's", 2.0, outcome.ratio("torch", "Holdfast", "durable"))
    share = outcome.share(DIRECT_WRITE, "Holdfast", "durable")
    outcome.aim("share of the direct-write ceiling", 80.0, share, unit="%")
    return outcome


def frozen(options: Options) -> Outcome:
    """A save after a step that changed a tenth of the state."""
    state = lora(options.mib)
    total = state.nbytes
    outcome = Outcome(
        case="frozen",
        title="The next save, nine tenths frozen",
        state=f"a transformer with LoRA and Adam, {state.describe()}",
        measures=[_DURABLE, Measure("new", "bytes written", "MB")],
    )
    with options.scratch() as folder:
        kinds = options.kinds(Holdfast, TorchSave, Safetensors, Dcp, Orbax)
        peers = [kind(folder / kind.name, state) for kind in kinds]
        for peer in peers:
            peer.save()
        for counts in options.turns():
            for peer in peers:
                state.forward_backward()
                state.update()
                before = peer.nbytes()
                took = timed(peer.save)
                new = peer.nbytes() - before
                if counts:
                    outcome.add(peer.name, durable=took.wall_s, new=new / MB)
                if not counts or options.quick:
                    check(peer, state)
                peer.forget()
        for peer in peers:
            peer.close()
    written = outcome.median("Holdfast", "new")
    share = None if written is None else 100 * written * MB / total
    outcome.aim("share of the state's bytes written", 11.0, share, at_least=False, unit="%")
    best = outcome.best_other("durable")
    for row, name in (("DCP", "DCP's"), (best, f"the fastest other's ({best})")):
        ratio = outcome.ratio(row or "", "Holdfast", "durable")
        outcome.aim(f"speed as a multiple of {name}", 5.0, ratio)
    return outcome


def small(options: Options) -> Outcome:
    """Many small tensors: the first save of a run, a later one, a restore."""
    state = small_tensors(options.tensors)
    outcome = Outcome(
        case="small",
        title="Many small tensors",
        state=f"plain tensors of 1 KiB, {state.describe()}",
        measures=[
            Measure("first", "stall of the first save"),
            Measure("stall", "stall of a later save"),
            Measure("durable", "later save, durable"),
            Measure("restore", "restore, warm"),
        ],
        notes=[
            "The stall is what the call that begins the save takes: `async_save`, "
            "`AsyncCheckpointer.save`, `CheckpointManager.save`; for torch.save and "
            "safetensors it is the whole save."
        ],
    )
    copy = machine.MemoryCopy(state.nbytes)
    kinds = options.kinds(Holdfast, TorchSave, Safetensors, Dcp, Orbax)
    for counts in options.turns():
        with options.scratch() as folder:
            for kind in kinds:
                peer = kind(folder / kind.name, state)  # a new one: its first save is a first
                state.touch()
                first = timed(peer.start)
                peer.wait()
                state.touch()
                later = timed(peer.start)
                peer.wait()
                state.touch()
                whole = timed(peer.save)
                expected = state.digest()
                state.clear()
                restored = timed(lambda peer=peer: peer.restore(state))
                if state.digest() != expected:
                    raise AssertionError(f"{peer.name} did not restore what was saved")
                peer.close()
                if counts:
                    outcome.add(
                        peer.name,
                        first=first.wall_s,
                        stall=later.wall_s,
                        durable=whole.wall_s,
                        restore=restored.wall_s,
                    )
            if counts:
                outcome.add(MEMORY_COPY, stall=timed(copy).wall_s)
    limits = {"first": 0.25, "stall": 0.1, "restore": 1.0}
    for measure in outcome.measures:
        if (limit := limits.get(measure.key)) is not None:
            found = outcome.median("Holdfast", measure.key)
            outcome.aim(measure.title, limit, found, at_least=False, unit="s")
        best = outcome.best_other(measure.key)
        ratio = outcome.ratio(best or "", "Holdfast", measure.key)
        text = f"{measure.title}: speed as a multiple of the fastest other's ({best})"
        outcome.aim(text, 1.0, ratio)
    return outcome
