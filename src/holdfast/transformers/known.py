"""The parts of the Trainer that Holdfast relies on, and how it is reached from a callback.

A callback is told neither the Trainer nor when a step is complete. So the Trainer that calls
`on_init_end` is found on the stack, and six of its methods are wrapped, in that object only:

    _inner_training_loop          a training: from its start to its end
    set_initial_training_values   how many steps and epochs there will be, before anything starts
    get_batch_samples             the batches of the next optimizer step; the last one is complete
    _maybe_log_save_evaluate      the end of an epoch, when all of it was logged and evaluated
    _load_from_checkpoint         of a sharded model: what it would load is in the run
    _load_best_model              at the end; its folder may be on a machine that is gone

They are those of transformers 4.57 to 5.24. Where one is missing or takes other arguments,
nothing is trained.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import transformers
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from holdfast.errors import UsageError
from holdfast.run.callsite import stack_of, variables_of
from holdfast.transformers.plan import Sizes

_ARGUMENTS = {
    "_inner_training_loop": ("args", "resume_from_checkpoint", "trial"),
    "set_initial_training_values": ("args", "dataloader"),
    "get_batch_samples": ("epoch_iterator", "num_batches"),
    "_maybe_log_save_evaluate": ("tr_loss",),
    "_load_from_checkpoint": ("resume_from_checkpoint",),
    "_load_best_model": (),
}
_ATTRIBUTES = ("current_flos", "callback_handler", "accelerator", "state", "control")


def calling_trainer(callback: TrainerCallback) -> Trainer:
    """The Trainer that is calling `callback`. Raises UsageError if there is none."""
    for frame in stack_of(sys._getframe(1)):
        found = variables_of(frame).get("self")
        if isinstance(found, Trainer) and callback in found.callback_handler.callbacks:
            return found
    raise UsageError(
        "holdfast.transformers.Callback was not called by a Trainer of transformers",
        hint="Give it to a Trainer when that is made: Trainer(..., callbacks=[…])",
    )


def running_loss(trainer: Any) -> Any:
    """The tensor that sums the losses since they were logged last: while a training starts."""
    if hasattr(trainer, "_tr_loss"):
        return trainer._tr_loss
    for frame in stack_of(sys._getframe(1)):  # until transformers 5 it is a local variable
        found = variables_of(frame)
        if found.get("self") is trainer and "tr_loss" in found:
            return found["tr_loss"]
    raise _unknown("the sum of the losses")


def trained(trainer: Any) -> Any:
    """The model, in the wrapper that sums its gradients if DistributedDataParallel does."""
    wrapped = trainer.model_wrapped
    inner = getattr(wrapped, "_orig_mod", wrapped)  # of the compiler
    return wrapped if isinstance(inner, DistributedDataParallel) else trainer.model


def check_known(trainer: Trainer) -> None:
    """Raises UsageError for a Trainer that has not the parts named above."""
    for name, arguments in _ARGUMENTS.items():
        method = getattr(trainer, name, None)
        if method is None or not set(arguments) <= set(inspect.signature(method).parameters):
            raise _unknown(f"Trainer.{name}")
    for name in _ATTRIBUTES:
        if not hasattr(trainer, name):
            raise _unknown(f"Trainer.{name}")


def check_supported(trainer: Any, ranks: int) -> None:
    """Raises UsageError for trainings that cannot be resumed exactly. `ranks` save together."""
    args = trainer.args
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_xla_enabled:
        which = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP on XLA"
        raise UsageError(
            f"a Trainer with {which} cannot be resumed by Holdfast yet",
            hint="TrainingArguments(fsdp=True) shards models too, and can be resumed; so can "
            "DistributedDataParallel, which the Trainer uses where nothing else is asked for.",
        )
    if args.world_size != ranks:
        raise UsageError(
            f"{args.world_size:,} processes train together, and {ranks:,} of them "
            f"{'has' if ranks == 1 else 'have'} this run",
            hint="Make it on all of them, with one address and without group=.",
        )
    if args.auto_find_batch_size:
        raise UsageError(
            "auto_find_batch_size=True changes the batch size on the way, so that no data order "
            "can be resumed",
            hint="Set per_device_train_batch_size to the size that it finds.",
        )
    if args.ignore_data_skip:
        raise UsageError(
            "ignore_data_skip=True asks for data that are seen twice after a resume",
            hint="Leave it out: Holdfast goes on in mid-epoch without loading what was seen.",
        )


def sizes_of(values: Any) -> Sizes:
    """Of what `set_initial_training_values` returns. Raises UsageError if it is something else."""
    sizes = (values[0], values[1], values[-1]) if isinstance(values, tuple) else ()
    if len(sizes) != 3 or not all(type(size) is int and size > 0 for size in sizes):
        raise _unknown("Trainer.set_initial_training_values")
    return Sizes(*sizes)


def with_sizes(values: Any, epochs: int, steps: int) -> Any:
    """What `set_initial_training_values` returns, with other numbers of epochs, and of optimizer
    steps in all."""
    return (epochs, *values[1:-1], steps)


def wrap(trainer: Any, name: str, around: Callable[..., Any]) -> None:
    """Make the trainer call `around(original, *args, **kwargs)` in the place of its method."""
    original = getattr(trainer, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    # `find_executable_batch_size` looks at the signature.
    wrapped.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    wrapped.__name__ = name
    setattr(trainer, name, wrapped)


def _unknown(what: str) -> UsageError:
    return UsageError(
        f"{what} is unlike what Holdfast knows of transformers, and this is "
        f"{transformers.__version__}",
        hint="Use a version that docs/transformers.md names, or a newer Holdfast.",
    )
