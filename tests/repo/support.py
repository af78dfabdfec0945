"""Small real checkpoints for tests of the repository."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from holdfast.core.digest import digest
from holdfast.core.records import Chunk, Holder, Leaf, Manifest, Pack, Record
from holdfast.errors import NoStore
from holdfast.repo import keys
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Retire, Writer
from holdfast.stores.base import Store

_PIDS = itertools.count(1)


def process() -> Holder:
    """A process of its own, dead as soon as nobody asks (`alive=dead`)."""
    return Holder(host="h", boot="b", namespace="n", pid=next(_PIDS), started="0")


def dead(holder: Holder) -> bool:
    """Every other process is gone."""
    return False


def keep_last(count: int) -> Retire:
    """Retire all but the newest `count`."""
    return lambda records: [record.id for record in records[:-count]]


def save(
    writer: Writer,
    step: int,
    *,
    reuse: Manifest | None = None,
    retire: Retire = lambda records: (),
    metrics: dict[str, float] | None = None,
    tags: tuple[str, ...] = (),
) -> Record:
    """Commit a checkpoint with one new leaf and, from `reuse`, its leaf `w0`."""
    work = writer.begin()
    content = f"content of step {step}".encode()
    packs = [writer.put_pack(work, b"", [content[:3], content[3:]])]
    leaves = [leaf("x", content, 0, 0)]
    if reuse is not None:
        old = next(item for item in reuse.leaves if item.path in ("x", "kept"))
        chunk = old.chunks[0]
        packs.append(reuse.packs[chunk.pack])
        leaves.append(leaf("kept", b"", 1, chunk.offset, like=chunk))
    try:
        record = writer.commit(
            work,
            Manifest(
                run=writer.run,
                epoch=writer.epoch,
                nonce=work.nonce,
                ordinal=work.ordinal,
                step=step,
                time_s=float(step),
                tree={"!": "dict", "v": []},
                runtime=None,
                leaves=tuple(leaves),
                packs=tuple(packs),
            ),
            retire=retire,
            metrics=metrics,
            tags=tags,
        )
    except Exception:
        writer.abandon(work)
        raise
    writer.delete_retired()
    return record


def leaf(path: str, content: bytes, pack: int, offset: int, like: Chunk | None = None) -> Leaf:
    nbytes = like.nbytes if like else len(content)
    found = like.digest if like else digest(content)
    return Leaf(path, "U8", (nbytes,), (Chunk((0,), (nbytes,), pack, offset, nbytes, found),))


def check(store: Store) -> list[int]:
    """The steps that a new reader finds. Fails unless every byte of each is right."""
    repo = Repo(store)
    try:
        repo.info()
    except NoStore:
        return []
    records = repo.records()
    for record in records:
        manifest = repo.manifest(record)
        for item in manifest.leaves:
            for chunk in item.chunks:
                data = bytearray(chunk.nbytes)
                repo.read_pack(manifest.packs[chunk.pack], chunk.offset, memoryview(data))
                assert digest(bytes(data)) == chunk.digest, (record.step, item.path)
    return [record.step for record in records]


def packs(store: Store) -> set[str]:
    """Names of all packs in the store."""
    return {info.key.removeprefix(keys.PACKS) for info in store.list(keys.PACKS)}


def live_packs(records: Sequence[Record]) -> set[str]:
    return {f"{name}.safetensors" for record in records for name in record.packs}


def pack_named(manifest: Manifest, name: str) -> Pack:
    return next(pack for pack in manifest.packs if pack.name == name)


def ids(records: Collection[Record]) -> list[str]:
    return [record.id for record in records]
