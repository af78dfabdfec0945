"""A checkpoint as a mapping that reads a leaf only when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from holdfast.core.adapters import NOTHING
from holdfast.core.records import Manifest, Record
from holdfast.core.tree import TreeDecoder, settle
from holdfast.core.types import Node
from holdfast.errors import PickleRefused
from holdfast.manager.info import CheckpointInfo
from holdfast.manager.nodes import mapping_pairs
from holdfast.manager.reader import ChunkReader
from holdfast.repo.keys import manifest_key, pack_key
from holdfast.repo.repo import Repo


class _Opened:
    """What the views of one checkpoint share."""

    def __init__(self, repo: Repo, record: Record, allow_pickle: bool) -> None:
        self.repo = repo
        self.record = record
        self.allow_pickle = allow_pickle
        self._manifest: Manifest | None = None

    @property
    def manifest(self) -> Manifest:
        if self._manifest is None:
            self._manifest = self.repo.manifest(self.record)
        return self._manifest

    @property
    def reader(self) -> ChunkReader:
        return ChunkReader(self.repo, self.record, self.manifest)

    def decoder(self) -> TreeDecoder:
        if self.manifest.pickled and not self.allow_pickle:
            raise PickleRefused(
                f"checkpoint {self.repo.address}@{self.record.step} holds pickled values, which "
                "run code when they are loaded",
                hint="If you trust whoever wrote it, pass allow_pickle=True.",
            )
        return TreeDecoder(
            self.manifest.leaves,
            allow_pickle=self.allow_pickle,
            fetch=self.reader.fetch,
            scope=self.manifest.tree,
        )

    def value(self, node: Node, path: str) -> Any:
        """A view of a mapping node; the whole value of any other, verified."""
        pairs = mapping_pairs(node)
        if pairs is not None:
            return LazyMapping(self, pairs, path)
        return self.whole(node, path)

    def whole(self, node: Node, path: str) -> Any:
        """The whole value of any node, verified."""
        decoder = self.decoder()
        value = decoder.decode(node, NOTHING, path)
        self.reader.fetch(decoder.requests)
        decoder.run()
        return settle(value)


class LazyMapping(Mapping[Any, Any]):
    """A dict of the saved state; also a module's or optimizer's `state_dict`."""

    def __init__(self, opened: _Opened, pairs: Sequence[tuple[Node, Node]], path: str) -> None:
        self._opened = opened
        self._path = path
        self._items: dict[Any, Node] = {
            key if isinstance(key, str) else opened.value(key, path): node for key, node in pairs
        }

    def __getitem__(self, key: Any) -> Any:
        """The value at `key`: arrays and tensors are read and verified now.

        Raises KeyError, DamagedObject, CheckpointRemoved.
        """
        return self._opened.value(self._items[key], f"{self._path}/{key}".lstrip("/"))

    def whole(self, key: Any) -> Any:
        """The value at `key` as it was saved, as far as that can be made: no view of what it
        holds. Raises as `[]` does."""
        return self._opened.whole(self._items[key], f"{self._path}/{key}".lstrip("/"))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def read(self) -> dict[Any, Any]:
        """Everything below, as a plain dict."""
        return {
            key: value.read() if isinstance(value := self[key], LazyMapping) else value
            for key in self
        }

    def __repr__(self) -> str:
        names = ", ".join(repr(key) for key in list(self._items)[:8])
        more = ", …" if len(self) > 8 else ""
        return f"{type(self).__name__}({names}{more})"


class LoadedCheckpoint(LazyMapping):
    """One checkpoint, opened for reading.

    >>> import holdfast
    >>> with holdfast.CheckpointManager("memory://lazy") as ckpts:
    ...     _ = ckpts.save(3, {"model": {"w": [1, 2]}, "lr": 0.5}).result()
    ...     loaded = ckpts.load(3)
    ...     loaded["lr"], loaded["model"]["w"], loaded.info.step
    (0.5, [1, 2], 3)
    """

    def __init__(
        self, repo: Repo, record: Record, info: CheckpointInfo, *, allow_pickle: bool = False
    ) -> None:
        opened = _Opened(repo, record, allow_pickle)
        super().__init__(opened, mapping_pairs(opened.manifest.tree) or [], "")
        self.info = info

    @property
    def config(self) -> Any:
        """The `config` that was recorded with it."""
        return self._opened.manifest.config

    @property
    def environment(self) -> Mapping[str, Any]:
        """Versions, command, host and revision that were recorded with it."""
        return self._opened.manifest.environment

    def holds(self, key: str) -> bool:
        """Whether the object of the run at `key` is a part of it."""
        packs = {pack_key(pack.name) for pack in self._opened.manifest.packs}
        return key in packs or key == manifest_key(self.info.id)
