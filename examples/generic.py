"""A long search without any framework: the shortest tour through 60 cities.

    python examples/generic.py      # press Ctrl-C, use kill -9, pull the plug ...
    python examples/generic.py      # ... and the same command goes on where it was
    holdfast ls runs/tour

With --mirror backup/tour (or s3://bucket/tour) each checkpoint is copied there as well: delete
runs/tour, and the same command goes on from the copy.

Simulated annealing: reverse a random part of the tour; keep the change if the tour
became shorter, and now and then if it did not. Holdfast keeps the random generator,
the tour and the position in the loop, so that an interrupted search makes exactly
the same choices as one that was left alone.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

import holdfast


def length(cities: np.ndarray, tour: np.ndarray) -> float:
    """Of the closed tour."""
    steps = cities[tour] - cities[np.roll(tour, -1)]
    return float(np.hypot(steps[:, 0], steps[:, 1]).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", default="runs/tour", help="where the checkpoints are kept")
    parser.add_argument("--sweeps", type=int, default=2000)
    parser.add_argument("--every", default="2s", help='sweeps ("50"), "2s" or "5min"')
    parser.add_argument("--mirror", help="a second place for the checkpoints, e.g. backup/tour")
    args = parser.parse_args()

    cities = np.random.default_rng(1).random((60, 2))
    rng = np.random.default_rng(2)
    tour = np.arange(len(cities))

    every = int(args.every) if args.every.isdigit() else args.every
    with holdfast.Run(args.run, every=every, keep="last=2", mirror=args.mirror) as run:
        run.track(rng=rng, tour=tour)  # restored in place
        box = run.box(best=math.inf, best_tour=[], accepted=0)

        for sweep in run.range(args.sweeps):
            temperature = 0.3 * 0.01 ** (sweep / args.sweeps)
            now = length(cities, tour)
            for _ in range(100):
                first, last = sorted(rng.integers(0, len(tour) + 1, size=2))
                candidate = tour.copy()
                candidate[first:last] = candidate[first:last][::-1]
                then = length(cities, candidate)
                if then < now or rng.random() < math.exp((now - then) / temperature):
                    tour[:] = candidate
                    now = then
                    box.accepted += 1
            if now < box.best:
                box.best, box.best_tour = now, tour.tolist()
            run.log(length=now)

    print(f"shortest tour found: {box.best:.6f} after {box.accepted} accepted changes")


if __name__ == "__main__":
    main()
