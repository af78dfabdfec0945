"""Keras on TensorFlow and on JAX, in a process of each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "keras_on_backends.py"
# Models that are built alike are compiled once.
SHARED = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_goes_on(backend: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        **SHARED,
        "KERAS_BACKEND": backend,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=CHECKS.parents[2]
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout
