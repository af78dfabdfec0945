"""Holdfast for Keras 3: `model.fit` goes on at the batch where it was interrupted.

    run = holdfast.Run("runs/cnn", every="10min", keep="last=2 best=1:val_loss")
    model.fit(x, y, epochs=20, validation_data=…, callbacks=[holdfast.keras.Callback(run)])

On the TensorFlow, PyTorch and JAX backends. `epochs` is the total: the same command goes on.
A checkpoint holds arrays by the paths of Keras' variables (no pickle): weights, optimizer,
metrics, seeds; and the state of the other callbacks, and the place in the data.
"""

from __future__ import annotations

from holdfast.errors import HoldfastError

try:
    import keras as _keras
except ModuleNotFoundError as error:
    if error.name != "keras":
        raise
    raise HoldfastError(
        "holdfast.keras needs Keras", hint="pip install 'holdfast[keras]'"
    ) from None

# 3.6 and older do not go through their data in a way that can be resumed.
if tuple(map(int, _keras.__version__.split(".")[:2])) < (3, 7):
    raise HoldfastError(
        f"holdfast.keras needs Keras 3.7 or newer; this is Keras {_keras.__version__}",
        hint="pip install 'holdfast[keras]'",
    )

from holdfast.keras.fitting import Callback as Callback
from holdfast.keras.state import load_weights as load_weights

__all__ = ["Callback", "load_weights"]
