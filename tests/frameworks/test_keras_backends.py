"""Keras on TensorFlow and on JAX, in a process of each."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "keras_on_backends.py"
# Models that are built alike are compiled once: half of the time. What JAX 0.5.3 takes from its
# cache writes over arrays of NumPy, with which Keras sets weights.
CACHED = tuple(map(int, version("jax").split(".")[:2])) >= (0, 10)
SHARED = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0" if CACHED else "9999",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_goes_on(backend: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        **SHARED,
        "KERAS_BACKEND": backend,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    # Where it is, if it hangs.
    options = ["-p", "no:cacheprovider", "-o", "faulthandler_timeout=60", "--timeout=120"]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *options, str(CHECKS)],
            env=environment,
            capture_output=True,
            text=True,
            cwd=CHECKS.parents[2],
        )
        # TensorFlow stood still once, on a busy machine, and not in a dozen more runs: what it
        # waited for is not known.
        if "Timeout (>120" not in done.stdout + done.stderr:
            break
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert " passed" in done.stdout
