"""What the processes of `tests.support.ranks` need not import: torch with its distributed half."""

from __future__ import annotations

import torch
import torch._dynamo  # when DTensors are first used: half of what a process would cost
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
import torch.nn.parallel
import torch.optim

import holdfast.torch.dcp  # noqa: F401
import tests.support.joined  # noqa: F401

torch.set_num_threads(1)
