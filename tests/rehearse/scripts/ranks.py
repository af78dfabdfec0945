"""Ranks over gloo, of which each has random numbers of its own. With a word: those of all but the
first are forgotten."""

import sys

import numpy as np
import torch
import torch.distributed as dist

import holdfast

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)


def main() -> None:
    weights = torch.zeros(6)
    noise = np.random.default_rng(rank)
    known = noise if rank == 0 or not sys.argv[1:] else np.random.default_rng(rank)
    with holdfast.Run("runs/ranks", every=5) as run:
        run.track(weights=weights, known=known)
        for _ in run.range(1000):
            gradient = torch.rand(6) + float(noise.random())
            dist.all_reduce(gradient)
            weights -= 0.1 * gradient
            run.log(loss=float(weights.sum()))


main()
