"""What a task asks a bucket for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from holdfast.metaflow.checkpoints import Checkpoints
from holdfast.metaflow.current import CurrentCheckpoint
from tests.manager.faulty_bucket import asked
from tests.metaflow.tasks import in_bucket, task, written
from tests.support.servers.proxy import FaultProxy
from tests.support.servers.service import Place

Faulty = Callable[[Place], tuple[Place, FaultProxy]]

FOLDERS = ["GET list folders"] * 2
READ = ["GET list log", "GET log", "GET log", "GET list log"]
SAVE = ["GET list log", "PUT log", "PUT manifests", "PUT packs"]


def settled(fit: Checkpoints) -> None:
    """What a save does when it is durable is done, too."""
    fit._open().wait()  # pyright: ignore[reportPrivateUsage]


def but_packs(requests: list[str]) -> list[str]:
    """Two for each pack, of which a checkpoint has one, or more if it shares bytes with others."""
    assert 2 <= sum("packs" in each for each in requests) <= 5
    return [each for each in requests if each not in ("HEAD packs", "GET packs")]


def test_what_a_task_asks_for(s3: Place, faulty: Faulty, tmp_path: Path) -> None:
    place, proxy = faulty(s3)
    root = in_bucket(place)

    def requests() -> list[str]:
        found = asked(proxy)
        proxy.forget()
        return found

    fit = task(root)
    current = CurrentCheckpoint(fit)
    current.go_on("fresh")
    assert requests() == []  # a first attempt of a run that resumes none has nothing to ask
    for looks, listings in (
        (CurrentCheckpoint(task(root, attempt=1)), 1),  # one says that nothing is there
        (CurrentCheckpoint(task(root, run="8", origin="7")), 2),  # whom does 7 resume?
    ):
        looks.go_on("fresh")
        assert len(requests()) == listings
        looks.finish()
        assert requests() == []

    current.save(written(tmp_path / "x", content="0"))
    settled(fit)
    assert len(requests()) == 19  # a plain run's first one takes 14
    for number in range(1, 4):
        current.save(written(tmp_path / "x", content=str(number)))
        settled(fit)
        assert sorted(requests()) == SAVE
    current.list()
    assert len(requests()) == 4
    current.finish()
    assert len(requests()) == 3

    fit = task(root, run="8", origin="7")
    current = CurrentCheckpoint(fit)
    current.go_on("fresh")
    assert current.is_loaded
    kinds = [re.sub("list /.*", "list folders", each) for each in but_packs(requests())]
    assert kinds == [*FOLDERS, "GET holdfast.json", *READ, *READ[1:], "GET manifests"]
    current.finish()
    assert requests() == []  # it has only read

    fit = task(root, attempt=1)
    current = CurrentCheckpoint(fit)
    current.go_on("fresh")  # it becomes the run's writer, which is most of it
    assert current.is_loaded
    assert len(but_packs(requests())) == 34
    for number in range(4, 6):
        current.save(written(tmp_path / "x", content=str(number)))
        settled(fit)
        base = ["GET manifests"] if number == 4 else []
        assert sorted(requests()) == sorted([*base, *SAVE])
    current.finish()
