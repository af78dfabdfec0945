"""Train a small network on handwritten digits; stop it at any moment, start it again.

    python examples/torch_digits.py      # press Ctrl-C, use kill -9, pull the plug ...
    python examples/torch_digits.py      # ... and the same command goes on where it was
    holdfast ls runs/digits

Only the lines with `run` in them are Holdfast's; the rest is a plain PyTorch loop.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import holdfast


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(32 * 4 * 4, 10),
    )


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,797 images of 8 by 8 pixels that come with scikit-learn: (train, validation)."""
    pixels, targets = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(targets)
    return TensorDataset(images[:1500], labels[:1500]), TensorDataset(images[1500:], labels[1500:])


@torch.no_grad()
def evaluate(model: nn.Module, data: TensorDataset) -> float:
    model.eval()
    images, labels = data.tensors
    return nn.functional.cross_entropy(model(images), labels).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", default="runs/digits", help="where the checkpoints are kept")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--every", default="20", help='steps ("20"), "10s", "5min" or "epoch"')
    args = parser.parse_args()

    torch.manual_seed(0)
    train, validation = digits()
    loader = DataLoader(train, batch_size=32, shuffle=True)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))

    every = int(args.every) if args.every.isdigit() else args.every
    with holdfast.Run(args.run, every=every, keep="last=3 best=1:val_loss") as run:
        run.track(model=model, optimizer=optimizer, scheduler=scheduler, data=loader)
        box = run.box(losses=[])  # what the box holds survives, plain variables do not

        for epoch in run.epochs(args.epochs):
            model.train()
            for images, labels in run.batches(loader):
                loss = nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                run.log(loss=loss)
                box.losses.append(loss.item())

            val_loss = evaluate(model, validation)
            run.log(val_loss=val_loss)
            print(f"epoch {epoch}: val_loss {val_loss:.4f}", flush=True)

    print(f"{len(box.losses)} steps, last loss {box.losses[-1]:.4f}")


if __name__ == "__main__":
    main()
