"""Trains with Keras, whose callback saves, and dies in the third epoch of its first attempt. Ends
with the weights of a training that was never interrupted."""

from __future__ import annotations

import os

import numpy
from metaflow import FlowSpec, checkpoint, current, retry, step
from telling import die, tell


class Layers(FlowSpec):
    @retry(times=1, minutes_between_retries=0)
    @checkpoint
    @step
    def start(self):
        import keras

        class Saving(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                self.model.save(file)
                current.checkpoint.save(metadata={"epoch": epoch + 1, **logs})
                if epoch + 1 == 3 and current.retry_count == 0:
                    die()

        def built():
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
            model.compile("adam", "mse")
            return model

        def fit(model, first, callbacks=()):
            x = numpy.linspace(-1, 1, 64, dtype="float32").reshape(32, 2)
            y = x.prod(axis=1)
            options = {"shuffle": False, "verbose": 0, "callbacks": list(callbacks)}
            model.fit(x, y, initial_epoch=first, epochs=6, **options)
            return model.get_weights()

        file = os.path.join(current.checkpoint.directory, "model.keras")
        epoch = 0
        if current.checkpoint.is_loaded:
            # The whole model: `save_weights` leaves the optimizer out.
            model, epoch = keras.saving.load_model(file), current.checkpoint.info.metadata["epoch"]
        else:
            model = built()
        tell(attempt=current.retry_count, loaded=epoch)
        weights = fit(model, epoch, [Saving()])
        never_interrupted = fit(built(), 0)
        tell(
            same=all(map(numpy.array_equal, weights, never_interrupted)),
            saved=[each["metadata"]["epoch"] for each in current.checkpoint.saved],
        )
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    Layers()
