"""A training that prints a digest of its end: `python keras_program.py ADDRESS DATA [N]`.

It kills itself at the N-th batch that it begins; the same command without N goes on."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false

import hashlib
import os
import signal
import sys

import keras
import numpy as np

import holdfast
import holdfast.keras

address, kind = sys.argv[1:3]
number = int(sys.argv[3]) if len(sys.argv) > 3 else -1

keras.utils.set_random_seed(5)
rng = np.random.default_rng(0)
x = rng.normal(size=(22, 3)).astype("float32")
y = x.prod(axis=1, keepdims=True)
model = keras.Sequential(
    [
        keras.layers.Dense(4, "tanh"),
        keras.layers.Dropout(0.3),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(1),
    ]
)
model.compile(keras.optimizers.Adam(0.01, use_ema=True), "mse", metrics=["mae"])


class Dataset(keras.utils.PyDataset):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple:
        return x[4 * index : 4 * index + 4], y[4 * index : 4 * index + 4]


class Die(keras.callbacks.Callback):
    begun = 0

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if Die.begun == number:
            run.manager.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        Die.begun += 1


def pipeline() -> object:
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((x, y))
    return data.shuffle(22).map(lambda a, b: (a * 1.0, b)).batch(6).prefetch(2)


data = {
    "arrays": lambda: ((x, y), {"batch_size": 6}),
    "dataset": lambda: ((Dataset(),), {"shuffle": True}),
    "pipeline": lambda: ((pipeline(),), {"shuffle": False}),
}[kind]
arguments, options = data()
with holdfast.Run(address, every=1) as run:
    ours = holdfast.keras.Callback(run)
    stopping = keras.callbacks.EarlyStopping("loss", patience=9, restore_best_weights=True)
    history = model.fit(
        *arguments,
        epochs=3,
        verbose=0,
        validation_data=(x, y),
        callbacks=[ours, stopping, Die()],
        **options,
    )
digest = hashlib.sha256(repr(history.history).encode())
for variable in [*model.variables, *model.optimizer.variables]:
    digest.update(keras.ops.convert_to_numpy(variable.value).tobytes())
digest.update(repr((stopping.wait, stopping.best, run.step)).encode())
print("end", digest.hexdigest())
