"""What DCP of older versions of torch lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint import staging


class _Copies:
    """Copies the state for `async_save`, which before torch had a `DefaultStager` left tensors in
    the host's memory as they are: what the program changes in them would be saved."""

    _synchronize_after_execute = should_synchronize_after_execute = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        from torch.distributed._state_dict_utils import _offload_state_dict_to_cpu
        from torch.utils._pytree import tree_map_only

        here = _offload_state_dict_to_cpu(state_dict)
        return tree_map_only(torch.Tensor, torch.clone, here)

    def synchronize_staging(self) -> None:
        return


class _Nothing:
    """`async_save` copies the state by itself."""


Staging: Any = _Nothing if hasattr(staging, "DefaultStager") else _Copies
"""What a writer has besides."""
