"""`python -m bench.ranks RANKS LEAVES LATENCY_MS`: the commit of a state of many ranks.

The ranks are threads of one process, their bytes are not there (packs are only named), and the
store is memory that answers after a while. What is real is the code: each rank hands its share in,
rank 0 joins, checks and commits them. Prints JSON: the `seconds` from when the shares are durable
until rank 0, and until the `last` rank, knows of the commit; `requests` of rank 0 and of the
`others` each; the `manifest`'s bytes; the `memory` that rank 0 took at most, in bytes.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import tracemalloc
from collections import Counter
from typing import Any

from holdfast.core.digest import digest
from holdfast.core.group import Ranks
from holdfast.core.records import Chunk, Leaf, Manifest, Pack
from holdfast.repo.repo import Repo
from holdfast.repo.together import Follower, Leader
from holdfast.repo.writer import Writer
from holdfast.stores.memory import MemoryStore
from holdfast.stores.object import WHOLE_BYTES

_STATE_BYTES = 1 << 40
_COUNTED = ("get", "put_new", "list", "delete", "size", "append")


class Remote:
    """As a bucket: a store that counts its calls and answers each after a while."""

    def __init__(self, store: MemoryStore, latency_s: float) -> None:
        self._store = store
        self._latency_s = latency_s
        self.calls: Counter[str] = Counter()
        self.whole_bytes = WHOLE_BYTES

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in _COUNTED:
            return found

        def call(*args: Any, **options: Any) -> Any:
            self.calls[name] += 1
            time.sleep(self._latency_s)
            return found(*args, **options)

        return call


def share(rank: int, size: int, leaves: int, save: Any, epoch: int, run: str) -> Manifest:
    """What a rank has written of leaves that are divided by rows among all ranks."""
    rows = _STATE_BYTES // leaves // size // 4096
    pack = Pack(
        name=f"{epoch:06}-{save.nonce}-{rank}-0",
        nbytes=4096 + leaves * rows * 4096,
        born=save.ordinal,
        head_nbytes=4096,
        head_digest=digest(b""),
    )
    found = tuple(
        Leaf(
            f"model/layers.{number}.weight",
            "F32",
            (rows * size, 1024),
            (
                Chunk(
                    (rank * rows, 0),
                    (rows, 1024),
                    0,
                    4096 + number * rows * 4096,
                    rows * 4096,
                    digest(f"{rank} {number}".encode()),
                ),
            ),
        )
        for number in range(leaves)
    )
    nodes = [[leaf.path, {"!": "torch.tensor", "leaf": n}] for n, leaf in enumerate(found)]
    return Manifest(
        run=run,
        epoch=epoch,
        nonce=save.nonce,
        ordinal=save.ordinal,
        step=1,
        time_s=0.0,
        tree={"!": "dict", "v": [["model", {"!": "dict", "v": nodes}], ["box", [rank]]]},
        runtime={"!": "dict", "v": [["rng", rank]]},
        leaves=found,
        packs=(pack,),
    )


def commit(size: int, leaves: int, latency_s: float) -> dict[str, float]:
    store = MemoryStore("ranks")
    first = Remote(store, latency_s)
    repo: Any = Repo(first)  # pyright: ignore[reportArgumentType]
    writer = Writer.open(repo)
    leader = Leader(repo, writer, "seed", size)
    others = [Remote(store, latency_s) for _ in range(size - 1)]
    followers = [
        Follower(Repo(remote), leader.together, Ranks(rank, size))  # pyright: ignore[reportArgumentType]
        for rank, remote in enumerate(others, 1)
    ]
    saves = [leader.begin(0), *(follower.begin(0) for follower in followers)]
    shares = [
        share(rank, size, leaves, save, writer.epoch, writer.run) for rank, save in enumerate(saves)
    ]
    first.calls.clear()
    ended: list[float] = []

    def hand_in(rank: int) -> None:
        followers[rank - 1].commit(saves[rank], shares[rank])
        ended.append(time.perf_counter())

    threads = [threading.Thread(target=hand_in, args=(rank,)) for rank in range(1, size)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    leader.commit(saves[0], shares[0])
    seconds = time.perf_counter() - start
    for thread in threads:
        thread.join()
    manifest = next(store.list("manifests/"))
    each = sum(sum(remote.calls.values()) for remote in others) / max(1, len(others))
    return {
        "seconds": seconds,
        "last": max(ended, default=start) - start,
        "requests": sum(first.calls.values()),
        "others": each,
        "manifest": manifest.size_bytes,
    }


def memory(size: int, leaves: int) -> int:
    """What rank 0 takes to join so many shares, of which each is there before it is asked for."""
    from holdfast.core.records import Fragment
    from holdfast.core.sealed import seal, unseal
    from holdfast.repo.joining import Joining, named
    from holdfast.repo.saves import Save

    save = Save("0" * 16, 1)
    stored: list[bytes] = []
    for rank in range(1, size):
        mine = share(rank, size, leaves, save, 1, "run")
        fragment = Fragment(
            run="run",
            epoch=1,
            nonce=save.nonce,
            rank=rank,
            world_size=size,
            step=1,
            leaves=mine.leaves,
            packs=mine.packs,
            tree=named(mine.tree),
            runtime=mine.runtime,
        )
        stored.append(seal(fragment)[1])
    tracemalloc.start()
    joining = Joining(share(0, size, leaves, save, 1, "run"), ())
    for data in stored:
        joining.add(unseal(data, Fragment, "fragment")[1])
    seal(joining.result())
    return tracemalloc.get_traced_memory()[1]


def main() -> None:
    size, leaves, latency_ms = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    found = commit(size, leaves, latency_ms / 1000)
    print(json.dumps({**found, "memory": memory(size, leaves)}))


if __name__ == "__main__":
    main()
