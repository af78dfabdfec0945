"""A small transformer learns to write like Python's manual; stop it whenever you like.

    python examples/char_transformer.py      # press Ctrl-C, use kill -9, pull the plug ...
    python examples/char_transformer.py      # ... and the same command goes on where it was
    holdfast rehearse -- python examples/char_transformer.py

Micro-batches with gradient accumulation, warm-up and decay of the learning rate, clipped
gradients, tied embeddings, dropout, an average of the weights that is evaluated, and early
stopping. The text is the language reference that comes with Python.
"""

from __future__ import annotations

import argparse
import math
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import holdfast

CONTEXT, WIDTH, HEADS, LAYERS = 64, 64, 4, 2
MICRO_BATCHES = 2


class Windows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pieces of a text, and the same pieces one character on."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Another piece each time: a random shift, as augmentation.
        shift = int(torch.randint(CONTEXT, ())) if index + 1 < len(self) else 0
        start = index * CONTEXT + shift
        return self.tokens[start : start + CONTEXT], self.tokens[start + 1 : start + CONTEXT + 1]


class Transformer(nn.Module):
    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.symbol = nn.Embedding(symbols, WIDTH)
        nn.init.normal_(self.symbol.weight, std=0.02)
        self.place = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.1, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, symbols, bias=False)
        self.head.weight = self.symbol.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.layers(self.symbol(tokens) + self.place, mask=self.mask, is_causal=True)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def manual(characters: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(training text, validation text, number of different characters)."""
    text = "\n".join(topics[name] for name in sorted(topics))[:characters]
    symbols = sorted(set(text))
    tokens = torch.tensor([symbols.index(character) for character in text])
    split = len(tokens) * 9 // 10
    return tokens[:split], tokens[split:], len(symbols)


@torch.no_grad()
def evaluate(model: nn.Module, data: Windows) -> float:
    model.eval()
    losses = [model(*batch).item() for batch in DataLoader(data, batch_size=64)]
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", default="runs/manual", help="where the checkpoints are kept")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--every", default="30s", help='batches ("50"), "30s" or "epoch"')
    parser.add_argument("--characters", type=int, default=200_000)
    args = parser.parse_args()

    torch.manual_seed(0)
    text, held_back, symbols = manual(args.characters)
    loader = DataLoader(Windows(text), batch_size=32, shuffle=True, drop_last=True)
    model = Transformer(symbols)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    updates = max(1, args.epochs * len(loader) // MICRO_BATCHES)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=updates + 1)

    every = int(args.every) if args.every.isdigit() else args.every
    with holdfast.Run(args.run, every=every, keep="last=2 best=1:val_loss") as run:
        run.track(model=model, ema=ema, optimizer=optimizer, scheduler=scheduler)
        box = run.box(best=math.inf, patience=3)

        for epoch in run.epochs(args.epochs):
            model.train()
            for tokens, targets in run.batches(loader):
                loss = model(tokens, targets)
                (loss / MICRO_BATCHES).backward()
                run.log(loss=loss)
                if run.batch % MICRO_BATCHES < MICRO_BATCHES - 1:
                    continue
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                ema.update_parameters(model)

            val_loss = evaluate(ema, Windows(held_back))
            run.log(val_loss=val_loss)
            print(f"epoch {epoch}: val_loss {val_loss:.4f}", flush=True)
            box.patience = 3 if val_loss < box.best else box.patience - 1
            box.best = min(box.best, val_loss)
            if box.patience == 0:
                break

    print(f"best val_loss {box.best:.4f} after {run.step} batches")


if __name__ == "__main__":
    main()
