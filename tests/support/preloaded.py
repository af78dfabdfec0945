"""What a nursery's processes need not import: torch with what it imports at the first optimizer,
the larger half of itself, and the programs of the matrix."""

from __future__ import annotations

import torch

import tests.matrix.programs  # noqa: F401
from tests.matrix.job import Job

torch.set_num_threads(1)
Job("").parts()
