"""`python -m bench.fits PLAN`: a loop that a framework owns, with its own saves or Holdfast's.

PLAN is JSON: `framework`; `saves`: "Holdfast", "own" or "none"; `mib` of parameters and two
moments of each; a save `every` so many steps, `count` of them measured; `folder`. Prints JSON:
the `seconds` of the steps with these saves, and the bytes that the process has `written` meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_BATCH, _WIDTH = 32, 1024


class Meter:
    """Seconds and written bytes of so many steps. The first save and half the way to the next
    come before, half the way to one more and the end of the loop after."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._first = plan["every"] + plan["every"] // 2
        self._last = self._first + plan["every"] * plan["count"]
        self.steps = self._last + 1
        self._begun = 0
        self._marks: list[tuple[float, int]] = []

    def step(self) -> None:
        """At the beginning of each step."""
        if self._begun in (self._first, self._last):
            self._marks.append((time.perf_counter(), _written()))
        self._begun += 1

    def result(self) -> dict[str, float]:
        (start_s, before), (end_s, after) = self._marks
        return {"seconds": end_s - start_s, "written": after - before}


def _written() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def layers(plan: dict[str, Any]) -> int:
    """Of 4 MiB, with two moments."""
    return max(1, plan["mib"] // 12)


def _run(plan: dict[str, Any]) -> Any:
    import holdfast

    return holdfast.Run(Path(plan["folder"]) / "run", every=plan["every"], keep="last=1")


def keras(plan: dict[str, Any], meter: Meter) -> None:
    import keras

    class Steps(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            meter.step()

    model = keras.Sequential(
        [keras.layers.Dense(_WIDTH, use_bias=False) for _ in range(layers(plan))]
    )
    model.compile(optimizer="adam", loss="mse")
    x = np.ones((_BATCH * meter.steps, _WIDTH), "float32")
    callbacks: list[Any] = [Steps()]

    def fit() -> None:
        model.fit(x, x, batch_size=_BATCH, epochs=1, callbacks=callbacks, verbose=0)  # pyright: ignore[reportArgumentType]

    if plan["saves"] == "Holdfast":
        import holdfast.keras

        with _run(plan) as run:
            callbacks.append(holdfast.keras.Callback(run))
            fit()
    else:
        if plan["saves"] == "own":
            callbacks.append(
                keras.callbacks.BackupAndRestore(plan["folder"] + "/own", save_freq=plan["every"])
            )
        fit()


def lightning(plan: dict[str, Any], meter: Meter) -> None:
    import lightning
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = _torch_net(layers(plan))

        def training_step(self, batch: Any, number: int) -> Any:
            meter.step()
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    x = torch.ones(_BATCH * meter.steps, _WIDTH)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), _BATCH)

    def fit(*callbacks: Any) -> None:
        lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=list(callbacks),
            enable_checkpointing=plan["saves"] == "own",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=plan["folder"],
        ).fit(Model(), loader)

    if plan["saves"] == "Holdfast":
        import holdfast.lightning

        with _run(plan) as run:
            fit(holdfast.lightning.Callback(run))
    elif plan["saves"] == "own":
        fit(ModelCheckpoint(plan["folder"] + "/own", every_n_train_steps=plan["every"]))
    else:
        fit()


def transformers(plan: dict[str, Any], meter: Meter) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _torch_net(layers(plan))

        def forward(self, x: Any) -> dict[str, Any]:
            meter.step()
            return {"loss": self.net(x).square().mean()}

    data = [{"x": torch.ones(_WIDTH)}] * (_BATCH * meter.steps)

    def train(*callbacks: Any) -> None:
        own = plan["saves"] == "own"
        arguments = TrainingArguments(
            plan["folder"] + "/own",
            num_train_epochs=1,
            per_device_train_batch_size=_BATCH,
            save_strategy="steps" if own else "no",
            save_steps=plan["every"],
            save_total_limit=1,
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(Model(), arguments, train_dataset=data, callbacks=list(callbacks)).train()  # pyright: ignore

    if plan["saves"] == "Holdfast":
        import holdfast.transformers

        with _run(plan) as run:
            train(holdfast.transformers.Callback(run))
    else:
        train()


def _torch_net(count: int) -> Any:
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(count)))


def jax(plan: dict[str, Any], meter: Meter) -> None:
    import jax
    import jax.numpy as jnp
    import optax

    keys = jax.random.split(jax.random.key(0), layers(plan))
    params = [jax.random.normal(key, (_WIDTH, _WIDTH)) / 32 for key in keys]
    optimizer = optax.adam(1e-3)

    def loss(params: Any, x: Any) -> Any:
        for layer in params:
            x = jnp.tanh(x @ layer)
        return jnp.square(x).mean()

    @jax.jit
    def update(params: Any, state: Any, x: Any) -> Any:
        changes, state = optimizer.update(jax.grad(loss)(params, x), state)
        return optax.apply_updates(params, changes), state

    x = jnp.ones((_BATCH, _WIDTH))
    state = optimizer.init(params)
    if plan["saves"] == "Holdfast":
        with _run(plan) as run:
            now = run.box(params=params, state=state)
            for _ in run.range(meter.steps):
                meter.step()
                now.params, now.state = jax.block_until_ready(update(now.params, now.state, x))
        return
    own = None
    if plan["saves"] == "own":
        import orbax.checkpoint as ocp

        own = ocp.CheckpointManager(
            Path(plan["folder"]) / "own",
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=plan["every"], max_to_keep=1, enable_async_checkpointing=True
            ),
        )
    for number in range(1, meter.steps + 1):
        meter.step()
        params, state = jax.block_until_ready(update(params, state, x))
        if own is not None:
            own.save(number, args=ocp.args.StandardSave({"params": params, "state": state}))  # pyright: ignore
    if own is not None:
        own.close()


FRAMEWORKS: dict[str, Callable[[dict[str, Any], Meter], None]] = {
    "keras": keras,
    "lightning": lightning,
    "transformers": transformers,
    "jax": jax,
}


def main() -> None:
    plan = json.loads(sys.argv[1])
    os.chdir(plan["folder"])
    meter = Meter(plan)
    FRAMEWORKS[plan["framework"]](plan, meter)
    print(json.dumps(meter.result()))


if __name__ == "__main__":
    main()
