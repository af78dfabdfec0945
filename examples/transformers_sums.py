"""A small GPT that learns to add, with Hugging Face's Trainer; no download.

    pip install 'holdfast[transformers]'
    python examples/transformers_sums.py      # press Ctrl-C, use kill -9 ...
    python examples/transformers_sums.py      # ... and the same command goes on where it was
    holdfast ls runs/sums

There is no `resume_from_checkpoint`: the first start and every later one are the same.
"""

from __future__ import annotations

import argparse

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import holdfast
import holdfast.transformers

LETTERS = "0123456789+=;"


class Sums(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """All of 0+0=000; to 99+99=198; as numbers of letters."""

    def __len__(self) -> int:
        return 100 * 100

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        a, b = divmod(index, 100)
        letters = torch.tensor([LETTERS.index(one) for one in f"{a:02}+{b:02}={a + b:03};"])
        return {"input_ids": letters, "labels": letters}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", default="runs/sums", help="where the checkpoints are kept")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", default="5s", help='steps ("50"), "5s" or "5min"')
    args = parser.parse_args()

    transformers.set_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(LETTERS),
            n_positions=16,
            n_embd=64,
            n_layer=2,
            n_head=4,
            bos_token_id=None,
            eos_token_id=LETTERS.index(";"),
        )
    )
    settings = TrainingArguments(
        output_dir=args.run + "-trainer",
        max_steps=args.steps,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        logging_steps=50,
        save_strategy="no",  # the run saves
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    every = int(args.every) if args.every.isdigit() else args.every
    with holdfast.Run(args.run, every=every, keep="last=2") as run:
        trainer = Trainer(
            model,
            settings,
            train_dataset=Sums(),
            callbacks=[holdfast.transformers.Callback(run)],
        )
        result = trainer.train()

    print(f"mean loss {result.training_loss:.9f} in {result.global_step} steps")


if __name__ == "__main__":
    main()
