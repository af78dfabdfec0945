"""Save and restore one training state with Holdfast and its peers, side by side.

    python bench/save_restore.py --mib 512 --rounds 5

All contenders run in one process in the order A B C A B C; the median of the rounds is
printed as a Markdown table, with what the machine itself can do (memory copy, buffered
write + fsync) beside it. Absolute figures depend on the machine: quote the ratios.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

import holdfast

State = dict[str, torch.Tensor]


def make_state(mib: int) -> State:
    """A model with Adam: per layer a weight and two moments, 3/4 large, 1/4 small tensors."""
    generator = torch.Generator().manual_seed(0)
    layer = 4 << 20  # elements: 16 MiB
    state: State = {}
    for index in range(max(1, mib // 48)):
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            state[f"layers.{index}.{kind}"] = torch.randn(2048, layer // 2048, generator=generator)
            state[f"layers.{index}.bias.{kind}"] = torch.randn(2048, generator=generator)
    return state


def sync(path: Path) -> None:
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


class Contender:
    """One way to save and restore; `fresh` is a new folder for each save."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.saves: list[float] = []
        self.stalls: list[float] = []
        self.restores: list[float] = []
        self.manager: holdfast.CheckpointManager | None = None


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def holdfast_round(folder: Path, state: State, live: State, me: Contender) -> None:
    # One manager for all rounds, as in a training job: its copy memory is reused.
    if me.manager is None:
        me.manager = holdfast.CheckpointManager(folder.parent / "run", keep="last=1")
        me.manager.acquire()
    start = time.perf_counter()
    pending = me.manager.save(len(me.saves), state)
    me.stalls.append(time.perf_counter() - start)
    pending.result()
    me.saves.append(time.perf_counter() - start)
    me.restores.append(timed(lambda: me.manager and me.manager.restore(dict(live))))


def torch_round(folder: Path, state: State, live: State, me: Contender) -> None:
    def save() -> None:
        torch.save(state, folder / "state.pt")
        sync(folder / "state.pt")
        sync(folder)

    def restore() -> None:
        for name, value in torch.load(folder / "state.pt").items():
            live[name].copy_(value)

    me.saves.append(timed(save))
    me.stalls.append(me.saves[-1])
    me.restores.append(timed(restore))


def safetensors_round(folder: Path, state: State, live: State, me: Contender) -> None:
    def save() -> None:
        save_file(state, folder / "state.safetensors")
        sync(folder)

    def restore() -> None:
        for name, value in load_file(folder / "state.safetensors").items():
            live[name].copy_(value)

    me.saves.append(timed(save))
    me.stalls.append(me.saves[-1])
    me.restores.append(timed(restore))


def dcp_round(folder: Path, state: State, live: State, me: Contender) -> None:
    def save() -> None:
        dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
        sync(folder)

    me.saves.append(timed(save))
    me.stalls.append(me.saves[-1])
    me.restores.append(timed(lambda: dcp.load(live, checkpoint_id=folder / "dcp", no_dist=True)))


ROUNDS: dict[str, Callable[[Path, State, State, Contender], None]] = {
    "Holdfast": holdfast_round,
    "torch.save + fsync": torch_round,
    "safetensors + fsync": safetensors_round,
    "DCP save": dcp_round,
}


def ceilings(folder: Path, nbytes: int) -> dict[str, float]:
    """Seconds to copy and to write `nbytes` once, nothing else done to them."""
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)

    def write() -> None:
        with open(folder / "raw", "wb") as out:
            out.write(memoryview(source))
            os.fsync(out.fileno())

    return {
        "memory copy": statistics.median(timed(lambda: np.copyto(target, source)) for _ in "12345"),
        "write + fsync": statistics.median(timed(write) for _ in "12345"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    options = parser.parse_args()
    state = make_state(options.mib)
    live = {name: torch.zeros_like(value) for name, value in state.items()}
    nbytes = sum(value.nbytes for value in state.values())
    base = Path(tempfile.mkdtemp(prefix="holdfast-bench-", dir=options.folder))
    contenders = {name: Contender(name) for name in ROUNDS}
    try:
        machine = ceilings(base, nbytes)
        for round_ in range(options.rounds + 1):
            for name, run in ROUNDS.items():
                folder = base / f"{round_}-{name.split()[0]}"
                folder.mkdir()
                for value in state.values():
                    value.add_(1)  # a dense optimizer step: nothing can be reused
                for value in live.values():
                    value.zero_()
                os.sync()  # nobody pays for what the one before left to the disk
                time.sleep(1.0)
                run(folder, state, live, contenders[name])
                assert all(torch.equal(live[key], state[key]) for key in state), name
                shutil.rmtree(folder)
    finally:
        for contender in contenders.values():
            if contender.manager is not None:
                contender.manager.close()
        shutil.rmtree(base)
    print(f"{nbytes / 2**20:.0f} MiB in {len(state)} tensors, median of {options.rounds} rounds")
    for name, seconds in machine.items():
        print(f"machine: {name} {seconds:.2f} s ({nbytes / 2**30 / seconds:.1f} GiB/s)")
    ours = contenders["Holdfast"]
    print("\n| | durable save | the loop waits | restore, warm |\n|---|---|---|---|")
    for name, found in contenders.items():
        cells = []
        for mine, theirs in (
            (ours.saves, found.saves),
            (ours.stalls, found.stalls),
            (ours.restores, found.restores),
        ):
            # The first round warms caches and allocators for everyone.
            value, reference = statistics.median(theirs[1:]), statistics.median(mine[1:])
            cells.append(f"{value:.2f} s ({value / reference:.2f}x)")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
