"""One thread, so that sums have one order and the machine is left to others."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
