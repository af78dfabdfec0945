"""One thread, so that sums have one order and the machine is left to others."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert torch.get_num_threads() == 1


@pytest.fixture
def world_of_one() -> Iterator[None]:
    """A process group with this process alone."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()
