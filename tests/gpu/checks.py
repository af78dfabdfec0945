"""What a checkpoint holds must be what was there at its boundary, to the bit."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import holdfast
from holdfast.manager.history import SaveEvent
from holdfast.manager.overlap import LiveLeaf, Overlap

WIDTH = 1024  # a weight is 4 MiB: several parts of it are read in place
STEPS = 8


class Place:
    """Where the checks run."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", 0) if device.type == "cuda" else device
        self.is_gpu = self.device.type == "cuda"
        self.name = torch.cuda.get_device_name(self.device) if self.is_gpu else "CPU"

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def stream(self) -> Any:
        """Inside, the program works in a stream of its own."""
        if not self.is_gpu:
            return nullcontext()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(stream)

    def keep_busy(self, seconds: float) -> None:
        """Queue work that takes the device about so long; the host does not wait."""
        if self.is_gpu:
            torch.cuda._sleep(int(seconds * 1.5e9))  # cycles


class Net(nn.Module):
    """Layers, a batch norm with large buffers, and a weight whose memory has gaps."""

    def __init__(self, place: Place, width: int = 0) -> None:
        super().__init__()
        width = width or (WIDTH if place.is_gpu else WIDTH // 4)
        self.first = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width)
        self.transposed = nn.Parameter(torch.randn(width, width).t())
        self.to(place.device)
        self.place = place
        self.width = width

    def loss(self) -> torch.Tensor:
        x = torch.randn(32, self.width, device=self.place.device)
        hidden = torch.tanh(self.norm(self.first(x)))
        return (self.second(hidden) @ self.transposed).square().mean()


Make = Callable[[Any], torch.optim.Optimizer]


def copies(*objects: Any) -> list[dict[str, torch.Tensor]]:
    """What the objects hold now, on the host."""
    found: list[dict[str, torch.Tensor]] = []
    for one in objects:
        if isinstance(one, nn.Module):
            found.append({k: v.cpu().clone() for k, v in one.state_dict().items()})
        else:
            states = one.state_dict()["state"]
            found.append(
                {
                    f"{n}/{k}": torch.as_tensor(v).cpu().clone()
                    for n, s in states.items()
                    for k, v in s.items()
                }
            )
    return found


def same(run: str | Path, there: dict[int, list[dict[str, torch.Tensor]]]) -> None:
    with holdfast.CheckpointManager(run, keep=None) as manager:
        steps = [info.step for info in manager.checkpoints()]
        assert steps == sorted(there), f"saved {steps}, not {sorted(there)}"
        assert all(result.ok for result in manager.verify())
        for step in steps:
            saved = manager.load(step)
            model, optimizer = there[step]
            for name, value in model.items():
                assert torch.equal(saved["model"][name], value), f"{name} at step {step}"
            for name, value in optimizer.items():
                number, _, key = name.partition("/")
                found = torch.as_tensor(saved["optimizer"]["state"][int(number)][key])
                assert torch.equal(found, value), f"{name} at step {step}"


class Watched:
    """What barriers and reads in place have done, while this is entered."""

    def __enter__(self) -> Watched:
        self.in_place = self.at_barrier = 0
        watched = self
        self._read, self._drain = Overlap._read_in_place, Overlap.drain

        def read(self: Overlap, leaf: LiveLeaf, offset: int, into: memoryview) -> bool:
            done = watched._read(self, leaf, offset, into)
            watched.in_place += done
            return done

        def drain(self: Overlap) -> None:
            before = self.copied_nbytes
            watched._drain(self)
            watched.at_barrier += self.copied_nbytes - before

        Overlap._read_in_place, Overlap.drain = read, drain
        return self

    def __exit__(self, *error: object) -> None:
        Overlap._read_in_place, Overlap.drain = self._read, self._drain

    def __str__(self) -> str:
        return f"{self.in_place} parts in place, {self.at_barrier / 2**20:.0f} MiB at barriers"


def train(
    place: Place,
    folder: Path,
    make: Make,
    *,
    steps: int = STEPS,
    busy_s: float = 0.0,
    scaler: torch.amp.GradScaler | None = None,
    slow: bool = False,
) -> str:
    """Save at each step. `slow`: let saves read in place before the step."""
    model = Net(place)
    optimizer = make(model.parameters())
    there: dict[int, Any] = {}
    with Watched() as watched, holdfast.Run(folder, every=1, keep=None) as run:
        run.track(model=model, optimizer=optimizer)
        if scaler is not None:
            run.track(scaler=scaler)
        for n in run.range(steps):
            optimizer.zero_grad()
            if slow:
                run.manager.wait()
            place.keep_busy(busy_s)
            kind = place.device.type
            with torch.autocast(kind, torch.bfloat16) if scaler is not None else nullcontext():
                loss = model.loss()
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            there[n + 1] = copies(model, optimizer)
    same(folder, there)
    return str(watched)


def optimizer_check(make: Make, **options: Any) -> Callable[[Place, Path], str]:
    def check(place: Place, folder: Path) -> str:
        said = train(place, folder / "quick", make, **options)
        return said + "; then " + train(place, folder / "slow", make, slow=True, **options)

    return check


def adam(**options: Any) -> Make:
    def make(params: Any) -> torch.optim.Optimizer:
        params = list(params)
        named = dict(options)
        if params[0].device.type == "cpu":
            named.pop("capturable", None)  # the CPU refuses it
        return torch.optim.AdamW(params, lr=1e-3, **named)

    return make


def other_stream(place: Place, folder: Path) -> str:
    with place.stream():
        said = train(place, folder, adam(), busy_s=0.01)
        place.synchronize()
    return said


def scaled(place: Place, folder: Path) -> str:
    scaler = torch.amp.GradScaler(place.device.type, init_scale=2.0**10)
    return train(place, folder, adam(fused=place.is_gpu), scaler=scaler)


def long_queue(place: Place, folder: Path) -> str:
    """The host is seconds ahead of the device. Neither the boundary nor the barrier waits
    for it, where all that is saved is large and protected."""
    width = 2048 if place.is_gpu else 256
    weight = nn.Parameter(torch.randn(width, width, device=place.device))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    expected = weight.detach().cpu().clone()
    barrier_hook: list[float] = []
    with Watched() as watched, holdfast.CheckpointManager(folder, keep=None) as manager:
        state = {"weight": weight.detach(), "momentum": optimizer.state[weight]["momentum_buffer"]}
        manager.save(1, state, in_place=lambda source, path: True).result()  # pinned memory
        place.synchronize()
        for step in (2, 3):
            place.keep_busy(0.5)
            start = time.perf_counter()
            pending = manager.save(
                step, state, in_place=lambda source, path: path in {"weight", "momentum"}
            )
            manager.drain()
            optimizer.step()
            barrier_hook.append(time.perf_counter() - start)
            pending.result()
        after = weight.detach().cpu()
        saved = [manager.load(step)["weight"] for step in (1, 2, 3)]
    assert torch.equal(saved[0], expected)
    assert torch.equal(saved[1], expected)
    assert not torch.equal(saved[2], expected)
    assert not torch.equal(saved[2], after)
    seconds = ", ".join(f"{value * 1000:.1f}" for value in barrier_hook)
    if place.is_gpu:
        # The first one may have had to pin memory.
        assert barrier_hook[1] < 0.25, f"save and step took {seconds} ms of a queue of 500 ms"
        assert watched.at_barrier > 0
    return f"save, barrier and step: {seconds} ms with 500 ms queued; {watched}"


def frozen(place: Place, folder: Path) -> str:
    """A frozen model is not copied from the third save on."""
    model = Net(place).requires_grad_(False).eval()
    head = nn.Linear(model.width, 4).to(place.device)
    optimizer = torch.optim.Adam(head.parameters())
    with holdfast.Run(folder, every=1, keep=None) as run:
        run.track(model=model, head=head, optimizer=optimizer)
        for _ in run.range(5):
            run.manager.wait()
            head(torch.randn(8, model.width, device=place.device)).sum().backward()
            optimizer.step()
        run.manager.wait()
        events = run.manager.history.read()
    copied = [event.copied_nbytes for event in events if isinstance(event, SaveEvent)]
    assert copied[3] < copied[0] / 4, copied
    return f"bytes copied: {copied}"


def graphs(place: Place, folder: Path) -> str:
    """A step that is replayed calls no hook. Mixed with others, it is the hardest case."""
    if not place.is_gpu:
        return "only on a GPU"
    model = Net(place)
    optimizer = adam(capturable=True)(model.parameters())
    there: dict[int, Any] = {}
    x = torch.randn(32, model.width, device=place.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        (model.second(torch.tanh(model.first(x))) @ model.transposed).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with holdfast.Run(folder, every=1, keep=None) as run:
        run.track(model=model, optimizer=optimizer)
        for n in run.range(STEPS):
            step() if n % 3 == 0 else graph.replay()
            there[n + 1] = copies(model, optimizer)
    same(folder, there)
    return "steps and replays mixed"


def capture_beside_a_save(place: Place, folder: Path) -> str:
    """Neither disturbs the other, also where CUDA forbids other threads to wait for a device."""
    if not place.is_gpu:
        return "only on a GPU"
    for mode in ("thread_local", "global"):
        big = torch.arange(256 << 20, device=place.device, dtype=torch.int32)
        with holdfast.CheckpointManager(folder / mode, keep=None) as manager:
            pending = manager.save(1, {"big": big}, in_place=lambda source, path: path == "big")
            graph = torch.cuda.CUDAGraph()
            y = torch.zeros(10, device=place.device)
            with torch.cuda.graph(graph, capture_error_mode=mode):
                for _ in range(200):
                    y += 1
            assert not pending.done(), "the save was over before the capture"
            pending.result()
            graph.replay()
            assert y.sum().item() == 2000
            assert torch.equal(manager.load(1)["big"], big.cpu())
    return "both captured and saved"


def moved(place: Place, folder: Path) -> str:
    """From the device to the CPU and back, with an optimizer whose state is offloaded."""
    model = Net(place)
    optimizer = adam()(model.parameters())
    model.loss().backward()
    optimizer.step()
    host = Net(Place(torch.device("cpu")), model.width)
    other = adam()(host.parameters())
    expected = copies(model, optimizer)
    with holdfast.CheckpointManager(folder, keep=None) as manager:
        manager.save(1, {"model": model, "optimizer": optimizer}, block=True)
        manager.restore({"model": host, "optimizer": other})
        assert _equal(copies(host, other), expected)
        assert {value.device.type for value in host.state_dict().values()} == {"cpu"}
        assert other.state[host.transposed]["exp_avg"].device.type == "cpu"
        manager.save(2, {"model": host, "optimizer": other}, block=True)
        model = Net(place)
        optimizer = adam()(model.parameters())
        manager.restore({"model": model, "optimizer": optimizer})
        assert _equal(copies(model, optimizer), expected)
        assert optimizer.state[model.transposed]["exp_avg"].device == place.device
        moments = optimizer.state[model.transposed]
        moments["exp_avg"] = moments["exp_avg"].cpu()
        manager.save(3, {"model": model, "optimizer": optimizer}, block=True)
        optimizer = adam()(model.parameters())
        manager.restore({"model": model, "optimizer": optimizer})
        moments = optimizer.state[model.transposed]
        assert moments["exp_avg"].device.type == "cpu"
        assert moments["exp_avg_sq"].device == place.device
        assert _equal(copies(model, optimizer), expected)
    return "there and back"


def generators(place: Place, folder: Path) -> str:
    """A generator of the program's and the device's own one draw again what they drew."""
    ours = torch.Generator(place.device)
    ours.manual_seed(7)
    drawn: dict[int, list[float]] = {}

    def train(die_after: int) -> None:
        with holdfast.Run(folder, every=1, keep=None) as run:
            run.track(ours=ours)
            for n in run.range(6):
                drawn[n] = [
                    torch.rand((), device=place.device, generator=ours).item(),
                    torch.rand((), device=place.device).item(),
                ]
                if n == die_after:
                    raise KeyboardInterrupt

    try:
        train(3)
    except KeyboardInterrupt:
        pass
    first = dict(drawn)
    ours.manual_seed(8)
    torch.manual_seed(8)
    drawn.clear()
    train(-1)
    assert sorted(drawn) == [3, 4, 5], drawn
    assert drawn[3] == first[3], (drawn, first)
    return "drawn again"


def filled_in_place(place: Place, folder: Path) -> str:
    """What a captured graph reads by its address is at that address after a restore."""
    if not place.is_gpu:
        return "only on a GPU"
    model = Net(place)
    rate = torch.tensor(0.5, device=place.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, capturable=True)
    model.loss().backward()
    optimizer.step()
    with holdfast.CheckpointManager(folder, keep=None) as manager:
        manager.save(1, {"model": model, "optimizer": optimizer}, block=True)
        weight, moment = model.transposed, optimizer.state[model.transposed]["exp_avg"]
        places = [value.data_ptr() for value in (weight, moment, rate)]
        held = weight.detach().clone()
        rate.fill_(0.25)
        optimizer.step()
        manager.restore({"model": model, "optimizer": optimizer})
        moment = optimizer.state[weight]["exp_avg"]
        found = optimizer.param_groups[0]["lr"]
        assert [value.data_ptr() for value in (weight, moment, found)] == places
        assert found.item() == 0.5
        assert torch.equal(weight, held)
    return "weights, moments and the learning rate"


def _equal(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> bool:
    return all(
        torch.equal(one[name], value)
        for one, wanted in zip(found, expected, strict=True)
        for name, value in wanted.items()
    )


def restored(place: Place, folder: Path) -> str:
    """Into a live model, while the program works in another stream."""
    model = Net(place)
    optimizer = adam()(model.parameters())
    model.loss().backward()
    optimizer.step()
    with holdfast.CheckpointManager(folder, keep=None) as manager:
        manager.save(1, {"model": model, "optimizer": optimizer}, block=True)
        expected = copies(model, optimizer)
        with place.stream():
            optimizer.step()
            place.keep_busy(0.1)
            manager.restore({"model": model, "optimizer": optimizer})
            assert _equal(copies(model, optimizer), expected)
        place.synchronize()
    assert model.first.weight.device == place.device
    return "model and optimizer"


def killed(place: Place, folder: Path) -> str:
    """Killed in the middle and started again: the same bits as in one go."""

    def job(name: str, *, die_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.gpu.job", str(place.device), str(folder / name)]
        command.append(str(die_at))
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    whole = job("whole", die_at=0)
    assert whole.returncode == 0, whole.stderr
    died = job("parts", die_at=13)
    assert died.returncode == -9, died.stderr
    again = job("parts", die_at=0)
    assert again.returncode == 0, again.stderr
    assert whole.stdout == again.stdout, (whole.stdout, again.stdout)
    return whole.stdout.strip()


CHECKS: dict[str, Callable[[Place, Path], str]] = {
    "adam foreach": optimizer_check(adam(foreach=True)),
    "adam fused": optimizer_check(adam(fused=True)),
    "adam capturable": optimizer_check(adam(capturable=True)),
    "adam behind a queue": optimizer_check(adam(), busy_s=0.02, steps=5),
    "adam in another stream": other_stream,
    "grad scaler": scaled,
    "long queue": long_queue,
    "frozen": frozen,
    "graphs": graphs,
    "capture beside a save": capture_beside_a_save,
    "restore": restored,
    "moved": moved,
    "generators": generators,
    "filled in place": filled_in_place,
    "killed": killed,
}
