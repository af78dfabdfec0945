"""Holdfast for Hugging Face's Trainer: training goes on at the step where it was interrupted.

    run = holdfast.Run("runs/tune", every="10min", keep="last=2 best=1:eval_loss")
    trainer = Trainer(
        model, args, train_dataset=data, callbacks=[holdfast.transformers.Callback(run)]
    )
    trainer.train()

The first start and every later one are the same command, with the same `trainer.train()`: no
`resume_from_checkpoint`. `holdfast.transformers.pretrained_files` is for loops of your own.
"""

from holdfast.errors import HoldfastError

try:
    import accelerate as _accelerate  # noqa: F401 -- the Trainer does not work without it
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("accelerate", "transformers"):
        raise
    raise HoldfastError(
        f"holdfast.transformers needs {error.name}", hint="pip install 'holdfast[transformers]'"
    ) from None

from holdfast.transformers.callback import Callback as Callback
from holdfast.transformers.files import pretrained_files as pretrained_files

__all__ = ["Callback", "pretrained_files"]
