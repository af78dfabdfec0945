"""Small runs with `compress="zstd"`, and what their manifests say."""

from __future__ import annotations

from typing import Any

import numpy as np

import holdfast
from holdfast.core.codecs import load_zstd
from holdfast.repo.repo import Repo
from holdfast.stores.base import Store

BLOCK = 8192
MEMORY = 5 * BLOCK
PACKAGE = load_zstd().__name__
COMPRESS = [None, "zstd"]


def manager(store: Store, compress: str | None = "zstd", **options: Any) -> Any:
    return holdfast.CheckpointManager(
        store.address, store=store, compress=compress, **{"keep": None, "memory": MEMORY, **options}
    )


def noise(nbytes: int, seed: int) -> np.ndarray:
    return np.frombuffer(np.random.default_rng(seed).bytes(nbytes), np.uint8).copy()


def weights(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, count).astype(np.float32)


def manifests(store: Store) -> list[Any]:
    repo = Repo(store)
    return [repo.manifest(record) for record in repo.records()]


def codecs(manifest: Any, path: str) -> list[str]:
    [leaf] = [leaf for leaf in manifest.leaves if leaf.path == path]
    return [chunk.codec for chunk in leaf.chunks]


def stored_nbytes(manifest: Any, path: str) -> int:
    [leaf] = [leaf for leaf in manifest.leaves if leaf.path == path]
    return sum(chunk.nbytes for chunk in leaf.chunks)
