"""What a checkpoint of a framework's training holds, and what a rehearsal of one finds forgotten.

The data are large and the models small: data in a checkpoint would show.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import holdfast
from holdfast.rehearse.compare import compare
from holdfast.run.rehearsal import VARIABLE, Entered, Part, read_trace
from tests.support.keras_jobs import keras, new_process

pytestmark = pytest.mark.filterwarnings("ignore")  # the frameworks' advice

ROWS, COLUMNS, BATCH = 64, 4096, 8
STEPS = ROWS // BATCH
X = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype("float32")
Y = X[:, :1].copy()


def in_keras(run: holdfast.Run, folder: Path) -> None:
    import holdfast.keras

    count = {"rows": 0}

    class Counter(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.saved = 0
            self.names = set[int]()  # of no kind that is saved by itself

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.saved += 1
            self.names.add(self.saved)
            count["rows"] += BATCH

    model = keras.Sequential([keras.Input((COLUMNS,)), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    callbacks = [Counter(), holdfast.keras.Callback(run)]
    model.fit(X, Y, batch_size=BATCH, shuffle=True, callbacks=callbacks)


def in_lightning(run: holdfast.Run, folder: Path) -> None:
    import lightning.pytorch as pl

    import holdfast.lightning

    count = {"rows": 0}

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(COLUMNS, 1)

        def training_step(self, batch: Any, number: int) -> Any:
            return (self.net(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    class Saved(pl.Callback):
        seen = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.seen += 1

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.seen = state_dict["seen"]

    class Counter(pl.Callback):
        def __init__(self) -> None:
            self.names = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.names += 1
            count["rows"] += BATCH

    data = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[Counter(), Saved(), holdfast.lightning.Callback(run)],
    ).fit(Model(), torch.utils.data.DataLoader(data, BATCH, shuffle=True))


def in_transformers(run: holdfast.Run, folder: Path) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    import holdfast.transformers

    count = {"rows": 0}

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(COLUMNS, 1)

        def forward(self, x: Any, y: Any) -> dict[str, Any]:
            return {"loss": (self.net(x) - y).square().mean()}

    class Counter(TrainerCallback):
        def __init__(self) -> None:
            self.names = 0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.names += 1
            count["rows"] += BATCH

    arguments = TrainingArguments(
        str(folder / "own"),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    data = [{"x": torch.tensor(x), "y": torch.tensor(y)} for x, y in zip(X, Y, strict=True)]
    callbacks = [Counter(), holdfast.transformers.Callback(run)]
    Trainer(Model(), arguments, train_dataset=data, callbacks=callbacks).train()  # type: ignore[arg-type]


def in_xgboost(run: holdfast.Run, folder: Path) -> None:
    import xgboost
    from xgboost.callback import TrainingCallback

    import holdfast.xgboost

    count = {"rows": 0}

    class Counter(TrainingCallback):
        def __init__(self) -> None:
            self.names = 0

        def after_iteration(self, *args: Any) -> bool:
            self.names += 1
            count["rows"] += BATCH
            return False

    data = xgboost.DMatrix(X, Y)
    holdfast.xgboost.train({"max_depth": 2}, data, STEPS, run=run, callbacks=[Counter()])


def in_lightgbm(run: holdfast.Run, folder: Path) -> None:
    import lightgbm

    import holdfast.lightgbm

    data = lightgbm.Dataset(X, Y[:, 0])
    holdfast.lightgbm.train({"min_data_in_leaf": 1, "verbose": -1}, data, STEPS, run=run)


def in_sklearn(run: holdfast.Run, folder: Path) -> None:
    from sklearn.linear_model import SGDRegressor

    model = SGDRegressor()
    run.track(model=model)
    for step in run.range(STEPS):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        model.partial_fit(X[rows], Y[rows, 0])


Job = Callable[[holdfast.Run, Path], None]
OWNERS: list[Job] = [in_keras, in_lightning, in_transformers, in_xgboost]


@pytest.mark.parametrize("job", [*OWNERS, in_lightgbm, in_sklearn])
def test_no_data_in_a_checkpoint(job: Job, tmp_path: Path) -> None:
    most = X.nbytes // 4  # LightGBM's text has the name and the range of each column
    with holdfast.Run(tmp_path / "run", every=3, keep=None) as run:
        job(run, tmp_path)
        saved = run.manager.checkpoints()
        assert [one.step for one in saved] == [3, 6, 8]
        for one in saved:
            assert 100 < one.nbytes < most, one
    packed = sum(file.stat().st_size for file in (tmp_path / "run" / "packs").iterdir())
    assert packed < most * len(saved)


@pytest.mark.parametrize("job", OWNERS)
def test_what_a_rehearsal_finds(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's own, and nothing that is a framework's: no progress bar, no clock of it, no
    variable of `fit`."""
    for name, ends in {"alone": [6], "killed": [3, 6]}.items():
        folder = tmp_path / name
        folder.mkdir()
        new_process()
        for process, steps in enumerate(ends):
            part = Part(folder=str(folder), steps=steps, every=3, process=process)
            monkeypatch.setenv(VARIABLE, msgspec.json.encode(part).decode())
            with suppress(SystemExit), holdfast.Run("runs/x") as run:
                job(run, tmp_path)
    alone, killed = (list(read_trace(tmp_path / name)) for name in ("alone", "killed"))
    entered = [line for line in killed if isinstance(line, Entered)]
    assert {line.step for line in entered} == {0, 1, 2, 3, 4, 5}
    assert all(line.by_framework for line in entered)
    found = compare(alone, [line for line in killed if line.process == 1])
    assert [(one.kind, one.name, one.step) for one in found] == [
        ("variable", "count['rows']", 3),
        ("variable", "Counter.names", 3),
    ]
