"""Uploads and downloads: whole checkpoints beside the raw bytes by other clients.

One S3 server on loopback, in Python, for all: it takes most of the time, so the figures say
whether Holdfast gets out of a server what it has, and not how fast a cloud is.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import holdfast
from bench.cases.common import Options, Took, timed
from bench.outcome import CEILING, Measure, Outcome
from bench.states import State, transformer
from tests.support.servers.faults import delayed
from tests.support.servers.proxy import FaultProxy
from tests.support.servers.s3 import moto
from tests.support.servers.service import Place

_PUTS = 20
# S3 answers a small request from the same region within 10 to 20 ms.
_FAR_S = 0.02
_RAW_PUTS = CEILING + "three raw PUTs"


@dataclass(frozen=True)
class _Client:
    """One way to bring bytes to a bucket and back."""

    name: str
    put: Callable[[str, bytes], object]
    get: Callable[[str], int]
    """Returns how many bytes came."""
    delete: Callable[[str], object]


def s3fs_is_installed() -> bool:
    """Whether the peer s3fs can take part."""
    return importlib.util.find_spec("s3fs") is not None


def buckets(options: Options) -> Outcome:
    """A full save and a restore of two sizes, and the save of one byte."""
    sizes = {"small": max(1, options.mib // 4), "large": options.mib}
    states = {size: transformer(mib) for size, mib in sizes.items()}
    outcome = Outcome(
        case="bucket",
        title="A bucket on loopback",
        state="transformers with Adam, "
        + " and ".join(state.describe() for state in states.values()),
        measures=[
            *(Measure(f"up_{size}", f"upload, {mib} MiB") for size, mib in sizes.items()),
            *(Measure(f"down_{size}", f"download, {mib} MiB") for size, mib in sizes.items()),
            Measure("cpu", f"CPU time of the upload, {sizes['large']} MiB", plotted=False),
            Measure("byte", "save of one byte", plotted=False),
            Measure("far", f"save of one byte, {_FAR_S * 1e3:g} ms away", plotted=False),
        ],
        notes=[
            "The others move bytes that lie in memory, in one piece; Holdfast saves and restores a "
            "live model and its optimizer, verified. The server is written in Python (moto)."
        ],
    )
    with ExitStack() as stack:
        service = stack.enter_context(moto())
        os.environ.update({k: v for k, v in service.environment().items() if v is not None})
        place = service.place()
        clients = _clients(place)
        # One for all turns, as a job has one, and as the others' clients are.
        managers = {
            size: stack.enter_context(
                holdfast.CheckpointManager(_below(place, size), keep="last=1")
            )
            for size in sizes
        }
        for counts in options.turns():
            for size, state in states.items():
                for name, took in _turn(managers[size], state, clients, place).items():
                    if counts:
                        up, down = took
                        outcome.add(name, **{f"up_{size}": up.wall_s, f"down_{size}": down.wall_s})
                        if size == "large":
                            outcome.add(name, cpu=up.cpu_s)
            near = _one_byte(place, lambda key: clients[0].put(key, b"x"))
            far = _far_away(place)
            if counts:
                outcome.add("Holdfast", byte=near[0], far=far[0])
                outcome.add(_RAW_PUTS, byte=3 * near[1], far=3 * far[1])
    for size, mib in sizes.items():
        for way, verb in (("up", "upload"), ("down", "download")):
            best = outcome.best_other(f"{way}_{size}")
            outcome.aim(
                f"{verb}, {mib} MiB: speed as a multiple of the fastest other's ({best})",
                1.0,
                outcome.ratio(best or "", "Holdfast", f"{way}_{size}"),
            )
    for measure, where in (("byte", "on loopback"), ("far", f"{_FAR_S * 1e3:g} ms away")):
        outcome.aim(
            f"save of one byte, {where}: as a multiple of three raw PUTs",
            1.0,
            outcome.ratio("Holdfast", _RAW_PUTS, measure),
            at_least=False,
        )
    return outcome


def _below(place: Place, name: str) -> str:
    """The address of a run below the place."""
    return place.address.replace(place.prefix, f"{place.prefix}/{name}", 1)


def _turn(
    manager: holdfast.CheckpointManager, state: State, clients: list[_Client], place: Place
) -> dict[str, tuple[Took, Took]]:
    """(upload, download) of each, one after the other."""
    took: dict[str, tuple[Took, Took]] = {}
    state.touch()
    before = manager.checkpoints()
    step = before[-1].step + 1 if before else 0
    up = timed(lambda: manager.save(step, state.objects, block=True))
    manager.wait()  # what retention deletes comes after the save
    expected = state.digest()
    state.clear()
    down = timed(lambda: manager.restore(dict(state.objects)))
    if state.digest() != expected:
        raise AssertionError("what came back is not what was saved")
    took["Holdfast"] = up, down
    data = os.urandom(1 << 20) * (state.nbytes >> 20)
    for client in clients:
        took[client.name] = _raw(client, f"{place.prefix}/raw", data)
    return took


def _raw(client: _Client, key: str, data: bytes) -> tuple[Took, Took]:
    def get() -> None:
        if (found := client.get(key)) != len(data):
            raise AssertionError(f"{found} of {len(data)} bytes came back")

    up = timed(lambda: client.put(key, data))
    down = timed(get)
    client.delete(key)
    return up, down


def _one_byte(place: Place, put: Callable[[str], object]) -> tuple[float, float]:
    """(median of a save of one byte, median of `put`, which puts as much)."""
    value = torch.zeros(1, dtype=torch.uint8)
    with holdfast.CheckpointManager(_below(place, "byte"), keep="last=3") as manager:
        before = manager.checkpoints()
        first = before[-1].step + 1 if before else 0

        def save(step: int) -> None:
            value.add_(1)
            manager.save(step, {"x": value}, block=True)

        ours: list[float] = []
        for step in range(first, first + _PUTS):
            ours.append(timed(partial(save, step)).wall_s)
            manager.wait()  # what retention deletes comes after the save
    raw = [timed(partial(put, f"{place.prefix}/put{n}")).wall_s for n in range(_PUTS)]
    return statistics.median(ours[1:]), statistics.median(raw[1:])


def _far_away(place: Place) -> tuple[float, float]:
    """As `_one_byte`, with a server that each request takes its time to reach. The raw PUTs are
    Holdfast's client's: boto3 first waits a second for a word that the proxy does not say."""
    with FaultProxy(place.endpoint) as proxy:
        proxy.fail(delayed(_FAR_S), times=None)
        behind = place.through(proxy.url)
        client = behind.client()
        return _one_byte(behind, lambda key: client.put(key, b"x"))


def _clients(place: Place) -> list[_Client]:
    boto3: Any = importlib.import_module("boto3")  # comes with moto
    bucket = place.service.bucket
    s3 = boto3.client("s3", endpoint_url=place.endpoint, region_name="us-east-1")

    def put(key: str, data: bytes) -> None:
        if len(data) < 8 << 20:
            s3.put_object(Bucket=bucket, Key=key, Body=data)
        else:
            s3.upload_fileobj(io.BytesIO(data), bucket, key)

    def get(key: str) -> int:
        into = io.BytesIO()
        s3.download_fileobj(bucket, key, into)
        return into.getbuffer().nbytes

    clients = [
        _Client("boto3", put, get, lambda key: s3.delete_object(Bucket=bucket, Key=key)),
    ]
    if s3fs_is_installed():
        files: Any = importlib.import_module("s3fs").S3FileSystem(
            endpoint_url=place.endpoint, client_kwargs={"region_name": "us-east-1"}
        )
        clients.append(
            _Client(
                "s3fs",
                lambda key, data: files.pipe_file(f"{bucket}/{key}", data),
                lambda key: len(files.cat_file(f"{bucket}/{key}")),
                lambda key: files.rm_file(f"{bucket}/{key}"),
            )
        )
    return clients
