"""Holdfast under `torch.distributed.checkpoint` (DCP): its storage, by changing one argument.

    import torch.distributed.checkpoint as dcp
    from holdfast.torch.dcp import StorageReader, StorageWriter

    dcp.save(state, storage_writer=StorageWriter("s3://bucket/run", step=1000))
    dcp.load(state, storage_reader=StorageReader("s3://bucket/run@latest"))

DCP plans who writes and reads what; the rest (packs with digests, the commit, retention, what
is stored already) is as for every other run, and so are the commands that look at it.
"""

from __future__ import annotations

from holdfast.torch.dcp.reader import StorageReader as StorageReader
from holdfast.torch.dcp.writer import StorageWriter as StorageWriter

__all__ = ["StorageReader", "StorageWriter"]
