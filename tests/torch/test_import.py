"""Importing the adapter: an opt-in that says what is missing."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import holdfast.torch
from holdfast.core.adapters import Adapter

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # as if it were not installed
try:
    import holdfast.torch
except Exception as error:
    from holdfast.errors import HoldfastError
    assert isinstance(error, HoldfastError), error
    print(error)
"""


def test_without_torch_the_error_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == [
        "holdfast.torch needs PyTorch",
        "Hint: pip install 'holdfast[torch]'",
    ]


def test_a_save_does_not_import_the_compiler() -> None:
    program = (
        "import sys, torch\n"
        "from holdfast.core.tree import capture\n"
        "before = 'torch._dynamo' in sys.modules\n"
        "capture({'m': torch.nn.Linear(2, 2)})\n"
        "assert ('torch._dynamo' in sys.modules) == before\n"
        "print(before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "False\n"


def test_public_names() -> None:
    assert sorted(holdfast.torch.__all__) == [
        "adapter",
        "find_untracked",
        "load_checkpoint",
        "process_group",
        "recorded_devices",
        "save_checkpoint",
        "untracked_parameters",
    ]
    adapter: Adapter = holdfast.torch.adapter
    assert adapter.name == "torch"


MODULES = [module.name for module in pkgutil.iter_modules(holdfast.torch.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(f"holdfast.torch.{name}")
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0
