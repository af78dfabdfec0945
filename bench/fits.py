"""`python -m bench.fits PLAN`: a loop that a framework owns, with its own saves or Holdfast's.

PLAN is JSON: `framework`; `saves`: "Holdfast" or "own"; `mib` of parameters and two moments of
each; a save `every` so many steps, `count` of them measured; `folder`. Prints JSON: the seconds
`lost` a save, and the bytes that the process has `written` for each.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_BATCH, _WIDTH = 32, 1024


class Meter:
    """What saves take from the steps around them.

    From half an interval before a save to half an interval behind it, how much longer all steps
    took than as many like those before it, when no save was on its way. Steps of two processes
    are not compared: they differ by more than a save costs. The first save warms up.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        self._every, self._count = plan["every"], plan["count"]
        self._first = self._every + self._every // 2
        self._last = self._first + self._every * self._count
        self.steps = self._last + 1
        self.settle: Callable[[], object] = lambda: None
        """Returns when all saves so far are written."""
        self._began: float | None = None
        self._seconds: list[float] = []
        """Of each step."""
        self._bytes: list[int] = []

    def step(self) -> None:
        """At the beginning of each step."""
        if self._began is not None:
            self._seconds.append(time.perf_counter() - self._began)
        if len(self._seconds) in (self._first, self._last):
            self.settle()  # what of the save before is written in these steps is not theirs
            self._bytes.append(_written())
        self._began = time.perf_counter()

    def result(self) -> dict[str, float]:
        spans = [
            self._seconds[start : start + self._every]
            for start in range(self._first, self._last, self._every)
        ]
        # The save comes behind step every - every // 2 of a span, for some in the step's middle.
        before = max(1, self._every - self._every // 2 - 2)
        lost = [sum(span) - len(span) * statistics.median(span[:before]) for span in spans]
        written = self._bytes[1] - self._bytes[0]
        return {"lost": statistics.median(lost), "written": written / self._count}


def _written() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def layers(plan: dict[str, Any]) -> int:
    """Of 4 MiB, with two moments."""
    return max(1, plan["mib"] // 12)


def _run(plan: dict[str, Any], meter: Meter) -> Any:
    import holdfast

    run = holdfast.Run(Path(plan["folder"]) / "run", every=plan["every"], keep="last=1")
    meter.settle = run.manager.wait
    return run


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

        with _run(plan, meter) as run:
            callbacks.append(holdfast.keras.Callback(run))
            fit()
    else:
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

        with _run(plan, meter) as run:
            fit(holdfast.lightning.Callback(run))
    else:
        fit(ModelCheckpoint(plan["folder"] + "/own", every_n_train_steps=plan["every"]))


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

        with _run(plan, meter) as run:
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
        with _run(plan, meter) as run:
            now = run.box(params=params, state=state)
            for _ in run.range(meter.steps):
                meter.step()
                now.params, now.state = jax.block_until_ready(update(now.params, now.state, x))
        return
    import orbax.checkpoint as ocp

    own = ocp.CheckpointManager(
        Path(plan["folder"]) / "own",
        options=ocp.CheckpointManagerOptions(
            save_interval_steps=plan["every"], max_to_keep=1, enable_async_checkpointing=True
        ),
    )
    meter.settle = own.wait_until_finished
    for number in range(1, meter.steps + 1):
        meter.step()
        params, state = jax.block_until_ready(update(params, state, x))
        own.save(number, args=ocp.args.StandardSave({"params": params, "state": state}))  # pyright: ignore
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
