"""DataLoaders with worker processes. Few tests: starting workers takes time."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, get_worker_info

from holdfast.errors import LoaderInterrupted
from holdfast.run.iterables import open_feed
from tests.run.feed_checks import check_every_stop, plain, record, without_holdfast

SAMPLES = 11


class Augmented(Dataset[Any]):
    """Draws from global generators and from its own, in `__getitem__`."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)
        self.more = {"python": random.Random(3), "torch": torch.Generator()}

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        own = self.rng.random() + self.more["python"].random()
        own += torch.rand((), generator=self.more["torch"]).item()
        return [int(index), random.random(), np.random.rand(), torch.rand(2), own]


class InBulk(Augmented):
    """Takes a batch of indices at once, and wants a plain list."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        assert type(indices) is list
        return [self[index] for index in indices]


class Lazy(RandomSampler):
    """Draws for each index while workers are fed ahead."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(SAMPLES):
            yield int(np.random.randint(SAMPLES))


class Stream(IterableDataset[Any]):
    """A shuffle buffer in each worker."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(5)

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        buffer = list(range(info.id, 2 * SAMPLES, info.num_workers))
        while buffer:
            number = buffer.pop(random.randrange(len(buffer)))
            yield [number, np.random.rand(), torch.rand(()).item(), self.rng.random()]


def jitter(batch: list[Any]) -> Any:
    return [batch, random.random(), torch.rand(()), np.random.rand()]


def seeds_everything(worker_id: int) -> None:
    """A `worker_init_fn` as tutorials have it."""
    np.random.seed(torch.initial_seed() % 2**32)
    random.seed(worker_id)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


MAP_STYLE: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Augmented(), 3, shuffle=True, num_workers=2, collate_fn=jitter),
    "persistent, generator, init": lambda: DataLoader(
        InBulk(),
        3,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
        generator=generator(),
        worker_init_fn=seeds_everything,
        prefetch_factor=1,
    ),
    "lazy sampler, batch_size=None": lambda: DataLoader(
        Augmented(), None, sampler=Lazy(range(SAMPLES)), num_workers=2
    ),
}


@pytest.mark.parametrize("name", MAP_STYLE)
def test_stopped_at_several_batches(name: str) -> None:
    check_every_stop(MAP_STYLE[name], only=lambda number: number % 4 == 1 or number == 5)


def test_stopped_at_several_batches_of_a_stream() -> None:
    check_every_stop(
        lambda: DataLoader(Stream(), 3, num_workers=2), only=lambda number: number in (2, 9, 13)
    )


def test_a_stream_is_as_without_holdfast() -> None:
    def make() -> Any:
        return DataLoader(Stream(), 3, num_workers=2)

    ours, theirs = record(make), without_holdfast(make)
    assert ours.steps == theirs.steps
    assert ours.final_rng == theirs.final_rng


def test_order_and_main_process_are_as_without_holdfast() -> None:
    make = MAP_STYLE["shuffled"]
    ours, theirs = record(make), without_holdfast(make)

    def indices(steps: list[Any]) -> list[Any]:
        return [[sample[0] for sample in step[0][0]] for step in steps]

    assert indices(ours.steps) == indices(theirs.steps)
    assert [step[1] for step in ours.steps] == [step[1] for step in theirs.steps]
    assert ours.final_rng == theirs.final_rng


def test_number_and_persistence_of_workers_change_nothing() -> None:
    def make(workers: int, **options: Any) -> Callable[[], Any]:
        return lambda: DataLoader(Augmented(), 3, shuffle=True, num_workers=workers, **options)

    one, two = record(make(1)), record(make(2, persistent_workers=True, prefetch_factor=3))
    assert one.steps == two.steps
    assert one.final_rng == two.final_rng


class Portable(Augmented):
    """torch cannot send a torch.Generator to a spawned process."""

    def __init__(self) -> None:
        super().__init__()
        self.more = {"python": random.Random(3)}

    def __getitem__(self, index: int) -> Any:
        return [int(index), random.random(), torch.rand(2), self.more["python"].random()]


def test_the_start_method_changes_nothing() -> None:
    def make(method: str) -> Any:
        return DataLoader(
            Portable(), 3, shuffle=True, num_workers=1, multiprocessing_context=method
        )

    torch.manual_seed(1)
    feed = open_feed(make("fork"))
    feed.open(None)
    feed.take()
    saved = feed.state()
    rest = [plain(feed.take()) for _ in range(3)]
    feed.shutdown()
    again = open_feed(make("spawn"))
    again.open(saved)
    assert [plain(again.take()) for _ in range(3)] == rest
    again.shutdown()


def test_each_batch_draws_its_own_numbers() -> None:
    steps = record(MAP_STYLE["shuffled"]).steps
    drawn = [number for step in steps for sample in step[0][0] for number in sample[1:3]]
    assert len(set(map(str, drawn))) == len(drawn)


# -- processes ----------------------------------------------------------------


class Slow(Augmented):
    """Tells its process; the fourth batch takes long."""

    delay_s = 60.0

    def __getitem__(self, index: int) -> Any:
        if index >= 9:
            time.sleep(self.delay_s)
        return os.getpid()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _workers_of(feed: Any) -> list[int]:
    return [worker.pid for worker in feed._iterator._workers]


def test_workers_stop_with_the_feed() -> None:
    feed = open_feed(DataLoader(Augmented(), 3, num_workers=2))
    feed.open(None)
    feed.take()
    first = _workers_of(feed)
    feed.open(None)  # an epoch that was left early
    second = _workers_of(feed)
    assert not any(map(_alive, first))
    feed.take()
    feed.close()
    assert not any(map(_alive, second))


def test_persistent_workers_live_on_until_shutdown() -> None:
    feed = open_feed(DataLoader(Augmented(), 3, num_workers=2, persistent_workers=True))
    feed.open(None)
    feed.take()
    first = _workers_of(feed)
    feed.close()
    assert all(map(_alive, first))
    feed.open(None)
    assert _workers_of(feed) == first
    feed.take()
    feed.shutdown()
    assert not any(map(_alive, first))


def test_workers_survive_the_signals_that_stop_a_job() -> None:
    feed = open_feed(DataLoader(Augmented(), 1, num_workers=1, prefetch_factor=1))
    feed.open(None)
    feed.take()
    (worker,) = _workers_of(feed)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(worker, number)
        feed.take()
        feed.take()
    assert _workers_of(feed) == [worker]
    feed.close()


def test_a_worker_that_dies_while_a_batch_is_awaited(capfd: pytest.CaptureFixture[str]) -> None:
    feed: Any = open_feed(DataLoader(Slow(), 3, num_workers=2, persistent_workers=True))
    feed.open(None)
    workers = {feed.take()[0].item() for _ in range(3)}
    saved = feed.state()
    pid = os.fork()
    if pid == 0:
        time.sleep(0.3)
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):  # the feed has ended it with the first
                os.kill(worker, signal.SIGKILL)
        os._exit(0)
    started = time.monotonic()
    with pytest.raises(LoaderInterrupted, match="worker of the data loader died"):
        feed.take()
    os.waitpid(pid, 0)
    assert time.monotonic() - started < 4
    assert not any(map(_alive, workers))
    assert plain(feed.state()) == plain(saved)
    with pytest.raises(LoaderInterrupted):
        feed.take()
    feed.loader.dataset.delay_s = 0
    feed.open(None)
    feed.take()
    feed.shutdown()


def test_a_worker_that_dies_during_a_step_is_reported_by_the_next_batch() -> None:
    feed = open_feed(DataLoader(Slow(), 3, num_workers=2))
    feed.open(None)
    for _ in range(3):
        feed.take()
    for worker in _workers_of(feed):
        os.kill(worker, signal.SIGKILL)
    for _ in range(50):  # a training step: nothing must be raised here
        time.sleep(0.01)
    with pytest.raises(LoaderInterrupted):
        feed.take()
    feed.close()


def test_the_datasets_own_errors_are_passed_on() -> None:
    class Broken(Augmented):
        def __getitem__(self, index: int) -> Any:
            raise RuntimeError("no such file")

    feed = open_feed(DataLoader(Broken(), 3, num_workers=1))
    feed.open(None)
    with pytest.raises(RuntimeError, match="no such file"):
        feed.take()
    feed.close()


def test_workers_do_not_keep_the_program_from_ending() -> None:
    import subprocess
    import sys
    import textwrap

    program = textwrap.dedent(
        """
        import torch, time
        from torch.utils.data import DataLoader
        from holdfast.run.iterables import open_feed
        class Slow(torch.utils.data.Dataset):
            def __len__(self): return 9
            def __getitem__(self, index):
                if index: time.sleep(600)
                return index
        feed = open_feed(DataLoader(Slow(), 1, num_workers=1))
        feed.open(None)
        feed.take()
        print(feed._iterator._workers[0].pid, flush=True)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert not _alive(int(done.stdout))


@pytest.mark.parametrize("taken", [4, 6, 7])
@pytest.mark.parametrize(
    ("before", "after"), [((2, 2), (1, 2)), ((1, 2), (2, 2)), ((2, 2), (2, 4)), ((2, 2), (2, 2))]
)
def test_other_workers_near_the_end_of_an_epoch(
    before: tuple[int, int], after: tuple[int, int], taken: int
) -> None:
    """A shuffling sampler draws once more at its end, and workers ask for that ahead."""

    def make(workers: int, prefetch: int | None) -> Any:
        generator = torch.Generator().manual_seed(7)
        data: Any = range(40)
        return open_feed(
            DataLoader(
                data,
                4,
                shuffle=True,
                num_workers=workers,
                prefetch_factor=prefetch,
                generator=generator,
            )
        )

    def rest(feed: Any) -> list[Any]:
        found = [*drained(feed)]
        feed.open(None)
        found += drained(feed)
        feed.shutdown()
        return [batch.tolist() for batch in found]

    def drained(feed: Any) -> Iterator[Any]:
        with contextlib.suppress(StopIteration):
            while True:
                yield feed.take()

    whole = make(0, None)
    whole.open(None)
    expected = rest(whole)[taken:]
    first = make(*before)
    first.open(None)
    for _ in range(taken):
        first.take()
    state = copy.deepcopy(first.state())
    first.shutdown()
    again = make(*after)
    again.open(state)
    assert rest(again) == expected
