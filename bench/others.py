"""The other libraries, each with its defaults."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from bench.durable import sync, sync_tree
from bench.peers import Peer
from bench.states import State

# One process is what is measured; DCP warns in each call that it is no process group.
warnings.filterwarnings("ignore", "torch.distributed is disabled")


class TorchSave(Peer):
    """`torch.save` and fsync; `torch.load`, then a copy into what is there."""

    name = "torch"
    mmap: ClassVar[bool] = False

    def save(self) -> None:
        folder = self._next()
        folder.mkdir()
        torch.save(self.state.tensors, folder / "state.pt")
        sync_tree(folder)

    def restore(self, into: State) -> None:
        _fill(into, torch.load(self.last / "state.pt", mmap=self.mmap))


class TorchMmap(TorchSave):
    """The same with `torch.load(mmap=True)`."""

    name = "torch, mmap"
    mmap = True


class Safetensors(Peer):
    """`safetensors.torch.save_file` and fsync; `load_file`, then a copy."""

    name = "safetensors"

    def save(self) -> None:
        folder = self._next()
        folder.mkdir()
        save_file(self.state.tensors, folder / "state.safetensors")
        sync_tree(folder)

    def restore(self, into: State) -> None:
        _fill(into, load_file(self.last / "state.safetensors"))


class Dcp(Peer):
    """`torch.distributed.checkpoint` in one process: `save`, `async_save` in a thread, `load`.

    It fsyncs its files itself; only the folders are left to do.
    """

    name = "DCP"

    def save(self) -> None:
        folder = self._next()
        state_dict_saver.save(self.state.tensors, checkpoint_id=folder, no_dist=True)
        self._sync(folder)

    def start(self) -> None:
        folder = self._next()
        stager = self._stager()
        future: Any = state_dict_saver.async_save(
            self.state.tensors, checkpoint_id=folder, no_dist=True, async_stager=stager
        )
        self._finish(lambda: (future.result(), self._sync(folder)))

    def restore(self, into: State) -> None:
        state_dict_loader.load(into.tensors, checkpoint_id=self.last, no_dist=True)

    def _stager(self) -> DefaultStager | None:
        return None  # DCP makes one for each save

    def _sync(self, folder: Path) -> None:
        sync(folder)
        sync(folder.parent)


class DcpKept(Dcp):
    """The same with one stager for all saves, whose memory is reused: the faster way."""

    name = "DCP, kept stager"

    def __init__(self, folder: Path, state: State) -> None:
        super().__init__(folder, state)
        self._kept = DefaultStager(StagingOptions(False, False, False, False))

    def _stager(self) -> DefaultStager | None:
        return self._kept

    def close(self) -> None:
        self._kept.close()


class Orbax(Peer):
    """Orbax with a tree of NumPy arrays (views of the tensors), in its default format."""

    name = "Orbax"

    def __init__(self, folder: Path, state: State) -> None:
        super().__init__(folder, state)
        logging.getLogger("absl").setLevel(logging.ERROR)
        # By name: it is in the `bench` extra only, and a type checker must not need it.
        self._ocp: Any = importlib.import_module("orbax.checkpoint")
        self._np: Any = importlib.import_module("numpy")
        self._sync_saver = self._ocp.Checkpointer(self._ocp.PyTreeCheckpointHandler())
        self._async_saver: Any = None
        self._tree = {name: tensor.numpy() for name, tensor in state.tensors.items()}

    def save(self) -> None:
        folder = self._next()
        self._sync_saver.save(folder, args=self._ocp.args.PyTreeSave(self._tree))
        sync_tree(folder)

    def start(self) -> None:
        if self._async_saver is None:
            handler = self._ocp.PyTreeCheckpointHandler()
            self._async_saver = self._ocp.AsyncCheckpointer(handler)
        folder = self._next()
        self._async_saver.save(folder, args=self._ocp.args.PyTreeSave(self._tree))
        self._finish(lambda: (self._async_saver.wait_until_finished(), sync_tree(folder)))

    def restore(self, into: State) -> None:
        as_numpy = self._ocp.RestoreArgs(restore_type=self._np.ndarray)
        asked = self._ocp.args.PyTreeRestore(restore_args=dict.fromkeys(self._tree, as_numpy))
        found = self._sync_saver.restore(self.last, args=asked)
        _fill(into, {name: torch.from_numpy(array) for name, array in found.items()})

    def close(self) -> None:
        self._sync_saver.close()
        if self._async_saver is not None:
            self._async_saver.close()


def orbax_is_installed() -> bool:
    # The parent first: it is a namespace that other packages share, and may be absent.
    names = ("orbax", "orbax.checkpoint")
    return all(importlib.util.find_spec(name) is not None for name in names)


def _fill(into: State, found: dict[str, torch.Tensor]) -> None:
    """As `load_state_dict` does, name by name."""
    if found.keys() != into.tensors.keys():
        raise KeyError(f"not the same names: {sorted(found.keys() ^ into.tensors.keys())[:3]}")
    for name, tensor in into.tensors.items():
        tensor.copy_(found[name])
