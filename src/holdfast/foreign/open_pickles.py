"""Pickles and PyTorch's files, opened: their values and where their tensors' bytes are."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.errors import DamagedObject, UnknownFile
from holdfast.foreign.contents import Budget, Storage, contents_of
from holdfast.foreign.data import Data, Span, Tree
from holdfast.foreign.described import ForeignFile
from holdfast.foreign.machine import MAX_PICKLE_BYTES, Items, Walked, walk
from holdfast.foreign.opened import Foreign, Proof, nothing_more
from holdfast.foreign.pickles import is_program
from holdfast.foreign.source import Source
from holdfast.foreign.trees import FindStorage, tree_of
from holdfast.foreign.zips import Archive

ZIP_PROOF = Proof(
    (
        "the list of entries and the headers agree",
        "every entry has its size and its CRC-32",
        "tensors lie within their storages",
    ),
    ("a CRC-32 finds accidents, and not who changed the file on purpose: there is no digest",),
)
_LEGACY_PROOF = Proof(
    ("its pickles come to their ends", "the file is as long as its tensors need"),
    ("the bytes of tensors: the format has no checksum at all",),
)
_PICKLE_PROOF = Proof(
    ("the pickle comes to its end",),
    ("everything else: a pickle has no checksum at all",),
)


def open_torch(archive: Archive, file: ForeignFile) -> Foreign:
    """A zip archive by `torch.save`."""
    return Foreign(file, ZIP_PROOF, lambda: torch_tree(archive), lambda: _check(archive, file))


def _check(archive: Archive, file: ForeignFile) -> Iterator[str]:
    sums = [entry.crc for entry in archive.entries.values() if entry.nbytes]
    if sums and not any(sums):  # torch.serialization.set_crc32_options(False)
        yield "it was written without CRC-32s: nothing of it can be checked"
        return
    yield from archive.check()


def torch_tree(archive: Archive) -> Tree:
    """What `torch.save` was given. Raises DamagedObject, UnknownFile."""
    source = archive.source
    [program] = [name for name in archive.entries if is_program(name)]
    base = program[: -len("data.pkl")]
    order = f"{base}byteorder"
    if order in archive.entries and archive.read(order, max_bytes=8) == b"big":
        raise UnknownFile(
            f"{source.name} was saved on a big-endian machine",
            hint="Load it with PyTorch, and save it again.",
        )
    walked = walk(archive.read(program, max_bytes=MAX_PICKLE_BYTES))
    _check_end(walked, source)

    def find(storage: Storage) -> Data:
        name = f"{base}data/{storage.key}"
        if name not in archive.entries or archive.entries[name].nbytes < storage.nbytes:
            raise DamagedObject(
                source.name, f"the bytes of storage {storage.key[:40]!r} are missing"
            )
        return archive.data(name)

    return tree_of(walked.value, find, source.name)


def open_pickle(source: Source, file: ForeignFile) -> Foreign:
    """A pickle, or a file by `torch.save` of before version 1.6."""
    if file.kind == "pickle":
        return Foreign(file, _PICKLE_PROOF, lambda: _pickle_tree(source), nothing_more)
    return Foreign(file, _LEGACY_PROOF, lambda: _legacy_tree(source), nothing_more)


def _pickle_tree(source: Source) -> Tree:
    walked = walk(source.read(0, min(source.nbytes, MAX_PICKLE_BYTES)))
    _check_end(walked, source)
    return tree_of(walked.value, _no_storage(source), source.name)


def _no_storage(source: Source) -> FindStorage:
    def find(storage: Storage) -> Data:
        raise DamagedObject(source.name, "it has tensors, and no bytes of theirs")

    return find


def _legacy_tree(source: Source) -> Tree:
    """See `pickles._describe_legacy`."""
    data = source.read(0, min(source.nbytes, MAX_PICKLE_BYTES))
    budget, end = Budget(), 0
    parts: list[Walked] = []
    for _ in range(5):
        parts.append(budget.walk(data, end))
        _check_end(parts[-1], source)
        end = parts[-1].end
    keys = parts[4].value
    names = [key for key in keys.items if isinstance(key, str)] if isinstance(keys, Items) else []
    storages = contents_of(parts[3].value).storages
    places: dict[str, Span] = {}
    for key in names:
        if key not in storages:
            # No tensor is made of it, so that its size in bytes is not known, nor what follows.
            break
        places[key] = Span(source, end + 8, storages[key].nbytes)
        end += 8 + storages[key].nbytes

    def find(storage: Storage) -> Data:
        if storage.key not in places:
            raise DamagedObject(
                source.name, f"the bytes of storage {storage.key[:40]!r} are missing"
            )
        return places[storage.key]

    return tree_of(parts[3].value, find, source.name)


def _check_end(walked: Walked, source: Source) -> None:
    if walked.problem:
        raise DamagedObject(source.name, walked.problem)
