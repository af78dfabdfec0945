"""Train on handwritten digits with several processes; stop any of them, start it again.

    torchrun --nproc-per-node 2 examples/torch_ddp_digits.py     # kill -9 one of them, or all ...
    torchrun --nproc-per-node 2 examples/torch_ddp_digits.py     # ... and it goes on where it was
    torchrun --nproc-per-node 4 examples/torch_ddp_digits.py     # also with more or with fewer

    holdfast run -- torchrun --nproc-per-node 2 examples/torch_ddp_digits.py   # ... by itself

Only the lines with `run` in them are Holdfast's; the rest is a plain loop with
DistributedDataParallel. Each rank writes its share of every checkpoint.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import holdfast


def digits() -> TensorDataset:
    """1,797 images of 8 by 8 pixels that come with scikit-learn."""
    pixels, targets = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32) / 16
    return TensorDataset(images, torch.tensor(targets))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    # Not `--run`: torchrun takes that for an option of its own.
    parser.add_argument("--address", default="runs/ddp-digits", help="where checkpoints are kept")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--every", default="20", help='steps ("20"), "10s", "5min" or "epoch"')
    args = parser.parse_args()

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)  # the same weights on all ranks
    data = digits()
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=32, sampler=sampler)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.25), nn.Linear(128, 10))
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
        network.cuda()
    model = DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    torch.manual_seed(1 + dist.get_rank())  # other random numbers on each of them

    every = int(args.every) if args.every.isdigit() else args.every
    run = holdfast.Run(args.address, every=every, keep="last=2")
    run.track(model=model, optimizer=optimizer)
    device = next(network.parameters()).device
    with run:
        for epoch in run.epochs(args.epochs):
            sampler.set_epoch(epoch)
            for images, labels in run.batches(loader):
                loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                run.log(loss=loss)
            if dist.get_rank() == 0:
                print(f"epoch {epoch}: loss {run.metrics['loss']:.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
