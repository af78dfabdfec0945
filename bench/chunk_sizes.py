"""What the size of chunks changes: speed, bytes written, the size of manifests.

    python -m bench.chunk_sizes
    python -m bench.chunk_sizes --mib 256 --rounds 3 --folder /mnt/disk

Saves and restores one state, large arrays of rows of 256 bytes, with chunks of each size in
turn, A B C A B C, in one process, and prints a Markdown table with the median of the rounds.
Then few rows are changed, at random places, and saved again: so many bytes were written.
Absolute figures depend on the machine: quote the ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

import holdfast
from holdfast.core.types import KiB, MiB
from holdfast.manager import cutting, staging

SIZES = [64 * KiB, 256 * KiB, 1 * MiB, 2 * MiB, 4 * MiB, 8 * MiB, 16 * MiB, 32 * MiB]
_ARRAYS = 4
_WIDTH = 64  # floats: a row of 256 bytes
_CHANGED = (10, 100, 1000, 10_000)  # rows


class Contender:
    """A run that is cut in chunks of one size."""

    def __init__(self, folder: Path, chunk_bytes: int, state: dict[str, np.ndarray]) -> None:
        self.chunk_bytes = chunk_bytes
        self._state = state
        self._step = 0
        self._folder = folder
        self._cut()
        self._ckpts = holdfast.CheckpointManager(folder, keep="last=1")
        self.found: defaultdict[str, list[float]] = defaultdict(list)

    def _cut(self) -> None:
        cutting.CHUNK_BYTES = self.chunk_bytes
        staging.BLOCK_BYTES = max(self.chunk_bytes, 8 * MiB)

    def round(self) -> None:
        """A save of all, a restore, and saves of a few changed rows."""
        self._cut()
        for array in self._state.values():
            array += 1
        self.found["full save"].append(self._save()[0])
        manifest = self._folder / "manifests"
        self.found["manifest"].append(max(p.stat().st_size for p in manifest.iterdir()))
        target = {name: np.zeros_like(array) for name, array in self._state.items()}
        start = time.perf_counter()
        with holdfast.CheckpointManager(self._folder) as ckpts:
            ckpts.restore(target)
        self.found["restore"].append(time.perf_counter() - start)
        if any(not np.array_equal(target[name], self._state[name]) for name in target):
            raise AssertionError("what was restored is not what was saved")
        random = np.random.default_rng(self._step)
        for count in _CHANGED:
            for array in self._state.values():
                array[random.integers(0, len(array), count // _ARRAYS + 1)] += 1
            seconds, written = self._save()
            self.found[f"{count} bytes"].append(written)
            self.found[f"{count} rows"].append(seconds)

    def _save(self) -> tuple[float, int]:
        os.sync()  # nobody pays for what the one before left to the disk
        self._step += 1
        start = time.perf_counter()
        info = self._ckpts.save(self._step, self._state, block=True).result()
        return time.perf_counter() - start, info.new_bytes

    def median(self, name: str) -> float:
        return statistics.median(self.found[name][1:] or self.found[name])

    def close(self) -> None:
        self._ckpts.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=1024, help="size of the state")
    parser.add_argument("--rounds", type=int, default=5, help="after the one that warms up")
    parser.add_argument("--folder", help="on the disk that is measured (default: temporary)")
    given = parser.parse_args()
    rows = given.mib * MiB // _ARRAYS // (4 * _WIDTH)
    random = np.random.default_rng(0)
    state = {
        str(n): random.standard_normal((rows, _WIDTH), dtype=np.float32) for n in range(_ARRAYS)
    }
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        contenders = [Contender(Path(folder) / str(size), size, state) for size in SIZES]
        for _ in range(given.rounds + 1):
            for contender in contenders:
                contender.round()
        for contender in contenders:
            contender.close()
    usual = next(c for c in contenders if c.chunk_bytes == 8 * MiB)
    changed = " | ".join(f"{count:,} rows" for count in _CHANGED)
    print(f"| chunk | full save | restore, warm | manifest | {changed} |")
    print("|---" * (4 + len(_CHANGED)) + "|")
    for contender in contenders:
        ratios = [contender.median(n) / usual.median(n) for n in ("full save", "restore")]
        size = contender.chunk_bytes
        name = f"{size // MiB} MiB" if size >= MiB else f"{size // KiB} KiB"
        cells = [
            name,
            *(f"{ratio:.2f}x" for ratio in ratios),
            f"{contender.median('manifest') / 1e3:,.0f} kB",
            *(
                f"{contender.median(f'{count} bytes') / 1e6:,.1f} MB, "
                f"{1e3 * contender.median(f'{count} rows'):,.0f} ms"
                for count in _CHANGED
            ),
        ]
        print(f"| {' | '.join(cells)} |")
    print(
        f"\n8 MiB: saved in {usual.median('full save'):.2f} s, restored in "
        f"{usual.median('restore'):.2f} s, {given.mib} MiB."
    )


if __name__ == "__main__":
    main()
