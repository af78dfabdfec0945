"""Train on handwritten digits with Ray Train; kill what you like of it, and it goes on.

    python examples/ray_train_digits.py                # kill -9 a worker: Ray starts all again ...
    python examples/ray_train_digits.py                # ... kill this, start it again: it goes on
    python examples/ray_train_digits.py --workers 1    # also with more workers, or with fewer

Only the lines with `run` in them are Holdfast's. Ray starts the workers, connects them, and
starts them again when one fails; each of them writes its share of every checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ray.train  # pyright: ignore[reportMissingImports]
import ray.train.torch  # pyright: ignore[reportMissingImports]
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import holdfast


def digits() -> TensorDataset:
    """1,797 images of 8 by 8 pixels that come with scikit-learn."""
    pixels, targets = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32) / 16
    return TensorDataset(images, torch.tensor(targets))


def train(config: dict[str, Any]) -> None:
    """What each worker does, on a thread of its process."""
    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(0)  # the same weights on all ranks
    data = digits()
    # Ray would make one by itself, but only for two workers and more: with this one, their
    # number may change inside an epoch.
    sampler = DistributedSampler(data)
    loader = ray.train.torch.prepare_data_loader(DataLoader(data, batch_size=32, sampler=sampler))
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.25), nn.Linear(128, 10))
    model = ray.train.torch.prepare_model(network)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    torch.manual_seed(1 + rank)  # other random numbers on each of them

    run = holdfast.Run(config["run"], every=config["every"], keep="last=2")
    run.track(model=model, optimizer=optimizer)
    with run:
        for epoch in run.epochs(config["epochs"]):
            sampler.set_epoch(epoch)
            for images, labels in run.batches(loader):
                loss = nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                run.log(loss=loss)
            ray.train.report({"epoch": epoch, "loss": run.metrics["loss"]})
            if rank == 0:
                print(f"epoch {epoch}: loss {run.metrics['loss']:.6f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", default="runs/ray-digits", help="where the checkpoints are kept")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--every", default="20", help='steps ("20"), "10s", "5min" or "epoch"')
    parser.add_argument("--workers", type=int, default=2, help="0: those that torchrun starts")
    args = parser.parse_args()

    # Workers have folders of their own: a relative address would be another place on each start.
    run = args.run if "://" in args.run else str(Path(args.run).absolute())
    every = int(args.every) if args.every.isdigit() else args.every
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config={"run": run, "epochs": args.epochs, "every": every},
        scaling_config=ray.train.ScalingConfig(
            num_workers=args.workers, use_gpu=torch.cuda.is_available()
        ),
        run_config=ray.train.RunConfig(failure_config=ray.train.FailureConfig(max_failures=3)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
