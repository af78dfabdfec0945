"""The processes of a training: which of Lightning's ways to have several can be resumed, and how
they end together."""

from __future__ import annotations

import contextlib
import subprocess
from typing import Any

from holdfast.errors import UsageError
from holdfast.lightning.package import is_a

_KNOWN = ("SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy")
_REFUSED = {
    "DeepSpeedStrategy": (
        "DeepSpeed alone knows what its optimizer holds",
        'strategy="ddp", or ModelParallelStrategy with fully_shard (FSDP2).',
    ),
    "XLAStrategy": (
        "its processes are no process group of torch.distributed",
        'strategy="ddp".',
    ),
}
IN_THE_MIDDLE = (
    "this strategy starts its processes from the middle of the first one (ddp_spawn, ddp_fork, "
    "ddp_notebook), and the Run that was made before cannot go there"
)
IN_A_SCRIPT = 'Trainer(strategy="ddp") in a script, which each process runs from its start.'
_BESIDE_S = 10.0  # what remains for them to do takes a moment


def check_strategy(trainer: Any) -> None:
    """Raises UsageError where the processes of this trainer cannot save together."""
    strategy = trainer.strategy
    name = type(strategy).__name__
    if is_a(strategy.launcher, "_MultiProcessingLauncher"):
        raise UsageError(IN_THE_MIDDLE, hint=IN_A_SCRIPT)
    for kind, (why, instead) in _REFUSED.items():
        if is_a(strategy, kind):
            raise UsageError(f"{name} is not supported: {why}", hint=instead)
    if not any(is_a(strategy, kind) for kind in _KNOWN):
        raise UsageError(
            f"{name} is not supported: it is not known what its processes hold",
            hint='Trainer(strategy="ddp"), or devices=1 and strategy="auto".',
        )
    if getattr(strategy, "_ddp_comm_state", None) is not None:
        raise UsageError(
            "the state of a communication hook (ddp_comm_state) is not saved: a resumed training "
            "would go on otherwise",
            hint="Leave ddp_comm_state out. Hooks without one, such as fp16_compress_hook, can be "
            "used.",
        )


def model_of(trainer: Any) -> Any:
    """What is trained: the LightningModule, in the wrapper that has its parameters (FSDP1) or
    sums their gradients (DistributedDataParallel)."""
    strategy = trainer.strategy
    wraps = is_a(strategy, "FSDPStrategy") or is_a(strategy, "DDPStrategy")
    return strategy.model if wraps else trainer.lightning_module


def check_group(trainer: Any, ranks: int) -> None:
    """Raises UsageError unless the processes of the trainer are those that save: `ranks`, as the
    run has found them when it began."""
    if ranks == trainer.world_size:
        return
    raise UsageError(
        f"the trainer has {trainer.world_size} processes, and {ranks} save this run together",
        hint="All of them make the Run with one address and without group=False. Where a loop of "
        "the run is around fit, or something else starts the run before it, call "
        "torch.distributed.init_process_group() first, under torchrun.",
    )


def leave_together(trainer: Any, leaving: SystemExit) -> None:
    """All processes are about to leave, with a checkpoint. The one that Lightning has started the
    others from looks after these, and kills all where one of them ends with another status than
    0, itself included: so theirs is 0, and it waits for them. Its own is that of the training."""
    launcher = trainer.strategy.launcher
    if not is_a(launcher, "_SubprocessScriptLauncher"):
        return
    if trainer.local_rank > 0 and is_a(launcher.cluster_environment, "LightningEnvironment"):
        leaving.code = 0
    for process in launcher.procs:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_BESIDE_S)
