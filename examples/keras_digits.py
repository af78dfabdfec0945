"""A network for scikit-learn's handwritten digits, trained by Keras' `fit`.

    pip install 'holdfast[keras]' torch scikit-learn
    python examples/keras_digits.py      # press Ctrl-C, use kill -9 ...
    python examples/keras_digits.py      # ... and the same command goes on where it was
    holdfast ls runs/keras-digits

On PyTorch; KERAS_BACKEND=tensorflow or jax in front of the command takes another.
"""

from __future__ import annotations

import argparse
import os
import random

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import holdfast
import holdfast.keras


def make_model() -> keras.Model:
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Reshape((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.BatchNormalization(),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", default="runs/keras-digits", help="where the checkpoints are kept")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--every", default="5s", help='batches ("50"), "5s" or "5min"')
    args = parser.parse_args()

    digits, labels = load_digits(return_X_y=True)
    split = train_test_split(digits / 16, labels, test_size=0.25, random_state=0)
    x, x_valid, y, y_valid = (np.asarray(part, "float32") for part in split)
    # What this needs of keras.utils.set_random_seed(1), which imports TensorFlow where it is found.
    random.seed(1)  # the weights
    np.random.seed(1)  # the order of the data
    model = make_model()

    every = int(args.every) if args.every.isdigit() else args.every
    with holdfast.Run(args.run, every=every, keep="last=2 best=1:val_accuracy:max") as run:
        history = model.fit(
            x,
            y,
            batch_size=64,
            epochs=args.epochs,
            validation_data=(x_valid, y_valid),
            callbacks=[
                holdfast.keras.Callback(run),
                keras.callbacks.EarlyStopping("val_loss", patience=5, restore_best_weights=True),
                keras.callbacks.ReduceLROnPlateau("val_loss", patience=2),
            ],
        )

    best = max(history.history["val_accuracy"])
    print(f"{best:.6f} of the digits read at best, {history.history['loss'][-1]:.9f} in the end")


if __name__ == "__main__":
    main()
