"""Starting a run from another run's checkpoint without copying its packs.

Pin first, refer after: the parent's log lists the child's address among the pins of
the checkpoint, so the parent keeps its packs; only then does the child's log refer
to them. Releasing goes the other way round: the child's log first, then the parent's (`lending`).
"""

from __future__ import annotations

import msgspec

from holdfast.core.records import Manifest, Pack, Record
from holdfast.core.types import MiB
from holdfast.errors import HoldfastError, StoreReadOnly, StoreUnfit
from holdfast.repo.lending import fork_pin
from holdfast.repo.log import logger
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer
from holdfast.stores.addresses import join_address, relative_address
from holdfast.stores.open import open_store

_COPY_BYTES = 8 * MiB


def fork(parent: Repo, record: Record, child: Repo, *, note: str = "") -> Record:
    """Make `record` of `parent` the first checkpoint of the new run `child`.

    The packs are borrowed where the parent can be told so, else copied. Raises
    CheckpointNotFound if the checkpoint was removed meanwhile; RunHeld; and what
    `Writer.open` raises. The child is closed again for a writer to open.
    """
    manifest = parent.manifest(record)
    address = relative_address(child.address, parent.address)
    pin = fork_pin(relative_address(parent.address, child.address))
    writer = Writer.open(child, parent=f"{address}@{record.id}")
    try:
        if writer.head.entry.records or writer.head.entry.segments:
            raise HoldfastError(
                f"{child.address} has checkpoints already; a fork starts an empty run",
                hint="Choose a new address.",
            )
        lent = {"": address} if _pin(parent, record, pin) else {}
        for run in {pack.run for pack in manifest.packs} - {""}:
            if lender := _lender(parent, child, manifest, run):
                lent[run] = lender
        save = writer.begin()
        packs: list[Pack] = []
        for pack in manifest.packs:
            if run := lent.get(pack.run):
                packs.append(msgspec.structs.replace(pack, born=save.ordinal, run=run))
            else:
                data = memoryview(_read_whole(parent, pack))
                head = bytes(data[: pack.head_nbytes])
                packs.append(writer.put_pack(save, head, [data[pack.head_nbytes :]]))
        copy = _adopt(manifest, child, writer, save.nonce, save.ordinal, tuple(packs))
        return writer.commit(
            save,
            copy,
            metrics=record.metrics,
            odd_metrics=record.odd_metrics,
            note=note or f"forked from {parent.address}@{record.step}",
            borrowing=frozenset(pack.run for pack in packs if pack.run),
        )
    finally:
        writer.close()


def _pin(parent: Repo, record: Record, pin: str) -> bool:
    """Pin the checkpoint; False where the parent cannot be written."""
    try:
        parent.store.prepare_writing()
        parent.update_record("pin for fork", record.id, lambda r: {"pins": tuple({*r.pins, pin})})
        return True
    except (StoreReadOnly, StoreUnfit) as error:
        logger.warning("%s cannot be pinned, its data is copied: %s", parent.address, error.message)
        return False


def _lender(parent: Repo, child: Repo, manifest: Manifest, run: str) -> str:
    """The address, seen from the child, of the run from which the parent borrows itself. It is
    told of the child: the parent may give its packs back before the child does. "" where it
    cannot be told."""
    address = join_address(parent.address, run)
    needed = {pack.name for pack in manifest.packs if pack.run == run}
    lender = Repo(open_store(address), clock=child.clock)
    try:
        pin = fork_pin(relative_address(address, child.address))
        # Those that are pinned already: others would keep more than is needed.
        for record in sorted(lender.records(), key=lambda record: not record.pins):
            if needed & record.packs.keys() and _pin(lender, record, pin):
                needed -= record.packs.keys()
    finally:
        lender.close()
    return "" if needed else relative_address(child.address, address)


def _read_whole(parent: Repo, pack: Pack) -> bytearray:
    data = bytearray(pack.nbytes)
    view = memoryview(data)
    for at in range(0, pack.nbytes, _COPY_BYTES):
        parent.read_pack(pack, at, view[at : at + _COPY_BYTES])
    return data


def _adopt(
    manifest: Manifest,
    child: Repo,
    writer: Writer,
    nonce: str,
    ordinal: int,
    packs: tuple[Pack, ...],
) -> Manifest:
    return msgspec.structs.replace(
        manifest,
        run=child.info().run,
        epoch=writer.epoch,
        nonce=nonce,
        ordinal=ordinal,
        packs=packs,
    )
