"""Checkpoints reach the mirror in the background, whatever becomes of it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast import CheckpointManager
from holdfast.core.retention import parse_keep
from holdfast.errors import UsageError
from holdfast.manager import mirror
from holdfast.manager.info import CheckpointInfo
from holdfast.manager.mirror import Mirror
from holdfast.manager.mirror_options import mirror_options
from holdfast.manager.pending import Pending
from holdfast.repo import keys, pack_copy
from holdfast.repo.pace import Pace
from holdfast.repo.repo import Repo
from holdfast.stores.open import open_store
from tests.mirror.support import WAIT_S, Line, damage, mirror_threads, state, steps, warnings
from tests.support.waiting import within

Lines = Callable[[str], Line]


def objects(address: str, folder: str) -> dict[str, bytes]:
    store = open_store(address)
    return {info.key: store.get(info.key, max_bytes=1 << 30) for info in store.list(folder)}


# -- what comes there --------------------------------------------------------------------


def test_each_checkpoint_is_in_the_mirror_byte_for_byte(tmp_path: Path, there: str) -> None:
    with CheckpointManager(tmp_path / "run", mirror=there) as run:
        for step in (1, 2, 3):
            run.save(step, state(step)).result()
            assert run.wait_mirrored(WAIT_S)
            assert [info.id for info in run.checkpoints()] == [
                record.id for record in Repo(open_store(there)).records()
            ]
    assert steps(tmp_path / "run") == steps(there) == [1, 2, 3]
    for folder in (keys.PACKS, keys.MANIFESTS):
        assert objects(str(tmp_path / "run"), folder) == objects(there, folder)


def test_who_has_waited_for_a_save_can_wait_for_its_copy(
    tmp_path: Path, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the thread that saves comes no further before that."""
    committed, go_on = Pending.committed, threading.Event()

    def held(pending: Pending, info: CheckpointInfo) -> None:
        committed(pending, info)
        assert go_on.wait(WAIT_S)

    monkeypatch.setattr(Pending, "committed", held)
    with CheckpointManager(tmp_path / "run", mirror=there) as run:
        run.acquire()
        assert run.wait_mirrored(WAIT_S)
        run.save(1, state(1)).result()
        assert not run.wait_mirrored(0)
        go_on.set()
        assert run.wait_mirrored(WAIT_S)
        assert steps(there) == [1]


def test_a_save_does_not_wait_for_the_mirror_and_what_its_rule_would_not_keep_is_skipped(
    tmp_path: Path, lines: Lines
) -> None:
    there = str(tmp_path / "mirror")
    reached, go_on = lines(there).hold_at_packs()
    with CheckpointManager(tmp_path / "run", keep=None, mirror=there, mirror_keep="last=1") as run:
        run.save(1, state(1)).result()
        assert reached.wait(WAIT_S)
        for step in (2, 3, 4):
            run.save(step, state(step)).result()
        assert run.not_mirrored() == [4]
        go_on.set()
        assert run.wait_mirrored(WAIT_S)
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    assert steps(there) == [4]
    # Of steps 2 and 3 nothing was ever sent: the first one in full, then what is new in 4.
    assert lines(there).calls["put_new"] + lines(there).calls["create"] < 20
    assert len(objects(there, keys.PACKS)) == 2


def test_the_newest_goes_first(tmp_path: Path, lines: Lines) -> None:
    there = str(tmp_path / "mirror")
    line, order = lines(there), list[str]()
    line.down = True
    with CheckpointManager(tmp_path / "run", keep=None, mirror=there) as run:
        ids = [run.save(step, state(step)).result().id for step in (1, 2, 3)]
        line.before = lambda name, args: (
            order.append(str(args[0])) if name == "put_new" and not line.down else None
        )
        line.down = False
        assert run.wait_mirrored(WAIT_S)
    manifests = [key for key in order if key.startswith(keys.MANIFESTS)]
    assert manifests == [keys.manifest_key(id) for id in reversed(ids)]
    assert steps(there) == [1, 2, 3]


def test_the_rules_of_the_two_differ(tmp_path: Path, there: str) -> None:
    with CheckpointManager(
        tmp_path / "run", keep="last=1", mirror=there, mirror_keep="last=2 best=1:loss"
    ) as run:
        for step, loss in ((1, 0.1), (2, 0.3), (3, 0.4), (4, 0.5)):
            run.save(step, state(step), metrics={"loss": loss}).result()
            assert run.wait_mirrored(WAIT_S)
    assert steps(tmp_path / "run") == [4]
    assert steps(there) == [1, 3, 4]
    with CheckpointManager(there) as copy:
        assert copy.info("best").step == 1


def test_the_mirror_keeps_everything_on_request(tmp_path: Path, there: str) -> None:
    with CheckpointManager(tmp_path / "run", keep="last=1", mirror=there, mirror_keep="") as run:
        for step in (1, 2, 3):
            run.save(step, state(step)).result()
            assert run.wait_mirrored(WAIT_S)
    assert steps(there) == [1, 2, 3]


def test_metrics_tags_pins_and_the_end_follow(tmp_path: Path, there: str) -> None:
    with CheckpointManager(tmp_path / "run", keep="last=1", mirror=there) as run:
        run.save(1, state(1)).result()
        assert run.wait_mirrored(WAIT_S)
        run.log_metrics(1, {"loss": 0.25})
        run.tag(1, "gold")
        run.pin(1, "a paper")
        run.save(2, state(2), finished=True).result()
        assert run.wait_mirrored(WAIT_S)
    with CheckpointManager(there) as copy:
        first, second = copy.checkpoints()
        assert (first.metrics, first.tags, first.pinned) == ({"loss": 0.25}, ("gold",), True)
        assert second.step == 2
        assert copy.finished


def test_a_checkpoint_costs_the_mirror_its_objects_and_the_check_of_the_commit(
    tmp_path: Path, lines: Lines
) -> None:
    there = str(tmp_path / "mirror")
    line = lines(there)
    with CheckpointManager(tmp_path / "run", keep=None, mirror=there) as run:
        run.save(1, state(1)).result()
        assert run.wait_mirrored(WAIT_S)
        for step in (2, 3):
            line.calls.clear()
            run.save(step, state(step)).result()
            assert run.wait_mirrored(WAIT_S)
            assert line.calls == {"put_new": 3, "get": 1, "list": 1}


def test_the_thread_has_low_priority_until_the_end_is_near(
    tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, worked = set[int](), list[int]()
    monkeypatch.setattr(mirror, "yield_to_others", lambda: low.add(threading.get_native_id()))
    there = str(tmp_path / "mirror")

    def note(name: str, args: tuple[object, ...]) -> None:
        if name == "put_new" and str(args[0]).startswith(keys.MANIFESTS):
            worked.append(threading.get_native_id())

    lines(there).before = note
    with CheckpointManager(tmp_path / "run", keep=None, mirror=there) as run:
        run.save(1, state(1)).result()
        assert run.wait_mirrored(WAIT_S)
        run.hurry_mirror()
        run.save(2, state(2)).result()
        assert run.wait_mirrored(WAIT_S)
    assert [thread in low for thread in worked] == [True, False]
    assert steps(there) == [1, 2]


def test_a_mirror_that_is_up_to_date_is_not_written(tmp_path: Path, lines: Lines) -> None:
    there = str(tmp_path / "mirror")
    with CheckpointManager(tmp_path / "run", mirror=there) as run:
        run.save(1, state(1)).result()
    before = objects(there, keys.LOG)
    with CheckpointManager(tmp_path / "run", mirror=there) as run:
        run.acquire()
        assert run.wait_mirrored(WAIT_S)
        # It was opened, and that is all.
        assert len(objects(there, keys.LOG)) == len(before) + 1


def test_bandwidth_is_bounded_by_the_clock(tmp_path: Path) -> None:
    """On a clock of its own: nothing waits, and no block is sent before its time."""
    run, now, sent = tmp_path / "run", [0.0], list[tuple[float, int]]()

    class Counted(Pace):
        def take(self, nbytes: int) -> None:
            super().take(nbytes)
            sent.append((now[0], nbytes))

    def wait(condition: threading.Condition, left: float) -> None:
        now[0] += left

    with CheckpointManager(run, keep=None) as ckpts:
        for step in (1, 2, 3, 4):
            ckpts.save(step, state(step)).result()
    options = mirror_options(str(run), parse_keep(""), tmp_path / "there", None, "10KB/s", None)
    assert options is not None
    pace = Counted(options.bytes_per_s, clock=lambda: now[0], wait=wait)
    local = Repo(open_store(str(run)))
    copying = Mirror(local, options, pace=pace)
    copying.start(1)
    assert copying.wait(WAIT_S)
    copying.close()
    total = sum(nbytes for _, nbytes in sent)
    assert total > 50_000
    assert now[0] >= (total - sent[-1][1]) / 10_000
    for at, (when, _) in enumerate(sent):
        assert sum(nbytes for _, nbytes in sent[:at]) <= when * 10_000 + 1


# -- outages -----------------------------------------------------------------------------


def test_an_outage_at_the_start_and_in_the_middle_is_told_once_and_made_up_for(
    tmp_path: Path, lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    there = str(tmp_path / "mirror")
    line = lines(there)
    with CheckpointManager(tmp_path / "run", keep=None) as run:
        run.save(1, state(1)).result()
    line.down = True
    with CheckpointManager(tmp_path / "run", keep=None, mirror=there) as run:
        for outage in (2, 4):
            run.save(outage, state(outage)).result()
            refused = line.refused
            while line.refused < refused + 3:  # it is tried again, and again
                assert not run.wait_mirrored(0.01)
            line.down = False
            assert run.wait_mirrored(WAIT_S)
            run.save(outage + 1, state(outage + 1)).result()
            assert run.wait_mirrored(WAIT_S)
            line.down = True
        line.down = False
    assert steps(tmp_path / "run") == steps(there) == [1, 2, 3, 4, 5]
    told = warnings(caplog)
    assert len(told) == 4, told
    assert all("nothing is copied to" in line and "does not answer" in line for line in told[::2])
    assert all("again, after" in line for line in told[1::2])


def test_an_outage_at_the_end_ends_in_time_with_one_loud_line_and_the_next_start_goes_on(
    tmp_path: Path, lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    there = str(tmp_path / "mirror")
    line = lines(there)
    with CheckpointManager(tmp_path / "run", keep=None, mirror=there, mirror_wait=0.2) as run:
        run.save(1, state(1)).result()
        assert run.wait_mirrored(WAIT_S)
        line.down = True
        run.save(200, state(200)).result()
        run.save(300, state(300)).result()
        assert within(WAIT_S, lambda: line.refused > 0)
    assert within(WAIT_S, lambda: not mirror_threads())
    [outage, missing] = warnings(caplog)
    assert "nothing is copied to" in outage
    assert "step 300, 200: only here, not in" in missing
    assert f"holdfast sync {tmp_path / 'run'} {there}" in missing
    line.down = False
    with CheckpointManager(tmp_path / "run", keep=None, mirror=there) as run:
        run.acquire()
    assert steps(there) == [1, 200, 300]


def test_a_copy_that_hangs_at_the_end_is_given_up(
    tmp_path: Path,
    lines: Lines,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("holdfast.manager.mirror.GRACE_S", 0.05)
    there = str(tmp_path / "mirror")
    reached, go_on = lines(there).hold_at_packs()
    with CheckpointManager(tmp_path / "run", mirror=there, mirror_wait=0) as run:
        run.save(1, state(1)).result()
        assert reached.wait(WAIT_S)
    assert "step 1: only here" in warnings(caplog)[-1]
    hanging = [t for t in threading.enumerate() if t.name == "holdfast-mirror"]
    assert hanging
    assert all(thread.daemon for thread in hanging)
    go_on.set()
    for thread in hanging:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert steps(tmp_path / "run") == [1]


def test_at_the_end_the_newest_overtakes_the_one_that_is_being_copied(
    tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_copy, "BLOCK_BYTES", 4096)  # it stops between two blocks
    there = str(tmp_path / "mirror")
    line = lines(there)
    reached, go_on = line.hold_at_packs()
    with CheckpointManager(tmp_path / "run", keep=None, mirror=there) as run:
        old = run.save(1, state(1)).result().id
        assert reached.wait(WAIT_S)
        new = run.save(2, state(2)).result().id
        order: list[str] = []

        def note(name: str, args: tuple[object, ...]) -> None:
            if name == "put_new" and str(args[0]).startswith((keys.MANIFESTS, keys.LOG)):
                order.append(str(args[0]))

        line.before = note
        closing = threading.Thread(target=run.close)
        closing.start()
        while run._mirror is not None and not run._mirror._closing:  # pyright: ignore[reportPrivateUsage]
            closing.join(0.001)
        with run._mirror._lock:  # pyright: ignore[reportPrivateUsage, reportOptionalMemberAccess]
            go_on.set()  # the copy was told to stop
        closing.join(WAIT_S)
    first_entry = next(at for at, key in enumerate(order) if key.startswith(keys.LOG))
    assert keys.manifest_key(new) in order[:first_entry]
    assert keys.manifest_key(old) not in order[:first_entry]
    assert steps(there) == [1, 2]


# -- the run goes on meanwhile -----------------------------------------------------------


def test_retention_leaves_the_checkpoint_that_is_being_copied_for_the_moment(
    tmp_path: Path, lines: Lines
) -> None:
    there = str(tmp_path / "mirror")
    reached, go_on = lines(there).hold_at_packs()
    with CheckpointManager(tmp_path / "run", keep="last=1", mirror=there) as run:
        run.save(1, state(1)).result()
        assert reached.wait(WAIT_S)
        for step in (2, 3, 4):
            run.save(step, state(step)).result()
        assert [info.step for info in run.checkpoints()] == [1, 4]
        go_on.set()
        assert run.wait_mirrored(WAIT_S)
        run.save(5, state(5)).result()
        assert [info.step for info in run.checkpoints()] == [5]
        assert run.wait_mirrored(WAIT_S)
        reached, go_on = lines(there).hold_at_packs()
        run.save(6, state(6)).result()
        assert reached.wait(WAIT_S)
        run.save(7, state(7)).result()
        assert [info.step for info in run.checkpoints()] == [6, 7]
        go_on.set()
    assert steps(tmp_path / "run") == [7]  # and no later save was needed for it
    assert steps(there) == [7]


def test_one_that_is_removed_while_it_is_copied_makes_room_for_a_newer_one(
    tmp_path: Path, lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    there = str(tmp_path / "mirror")
    reached, go_on = lines(there).hold_at_packs()
    with CheckpointManager(tmp_path / "run", keep=None, mirror=there) as run:
        run.save(1, state(1)).result()
        assert reached.wait(WAIT_S)
        run.save(2, state(2)).result()
        run.remove([1])
        go_on.set()
        assert run.wait_mirrored(WAIT_S)
        assert 2 in [info.step for info in CheckpointManager(there).checkpoints()]
    assert not warnings(caplog)


def test_a_damaged_checkpoint_is_told_and_does_not_hold_up_others(
    tmp_path: Path, there: str, caplog: pytest.LogCaptureFixture
) -> None:
    with CheckpointManager(tmp_path / "run", keep=None) as run:
        first = run.save(1, {"a": state(1)["w"]}).result().id
        run.save(2, state(2)).result()
        [pack] = Repo(open_store(str(tmp_path / "run"))).records()[0].packs
    damage(tmp_path / "run", keys.pack_key(pack))
    with CheckpointManager(tmp_path / "run", keep=None, mirror=there) as run:
        run.save(3, state(3)).result()
        assert run.wait_mirrored(WAIT_S)
        assert run.not_mirrored() == []
    assert steps(there) == [2, 3]
    [line] = warnings(caplog)
    assert "run@1 is damaged, and not copied" in line
    assert pack in line
    assert first


def test_a_forked_child_does_nothing(tmp_path: Path, there: str) -> None:
    with CheckpointManager(tmp_path / "run", mirror=there) as run:
        run.save(1, state(1)).result()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run.close()
                status = 0 if not run.wait_mirrored(0) and run.not_mirrored() == [] else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        run.save(2, state(2)).result()
        assert run.wait_mirrored(WAIT_S)
    assert steps(there)[-1] == 2


def test_without_a_mirror_there_is_no_thread_and_nothing_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys, threading, holdfast\n"
        "run = holdfast.CheckpointManager(sys.argv[1])\n"
        "run.save(1, {'x': 1}).result()\n"
        "names = {t.name for t in threading.enumerate()}\n"
        "assert 'holdfast-mirror' not in names, names\n"
        "loaded = {n for n in sys.modules if 'holdfast' in n and ('mirror' in n or 'repli' in n)}\n"
        "assert loaded == {'holdfast.manager.mirrored'}, loaded\n"
        "run.close()\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "run"], check=True, timeout=60)


def test_the_thread_ends_with_the_manager(tmp_path: Path, there: str) -> None:
    run = CheckpointManager(tmp_path / "run", mirror=there)
    assert within(WAIT_S, lambda: not mirror_threads())  # a reader has none
    run.save(1, state(1)).result()
    assert mirror_threads()
    run.close()
    assert within(WAIT_S, lambda: not mirror_threads())  # the first of low priority ends by itself
    assert Repo(open_store(there)).head().entry.holder is None  # pyright: ignore[reportOptionalMemberAccess]


# -- settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mirror_keep": "last=1"}, "there is none"),
        ({"mirror": "memory://bad-options", "mirror_bandwidth": "fast"}, "mirror_bandwidth"),
        ({"mirror": "memory://bad-options", "mirror_bandwidth": 0}, "mirror_bandwidth"),
        ({"mirror": "memory://bad-options", "mirror_wait": "soon"}, "mirror_wait"),
        ({"mirror": "memory://bad-options", "mirror_wait": -1}, "mirror_wait"),
        ({"mirror": "memory://bad-options", "mirror_keep": "first=1"}, "first=1"),
        ({"mirror": "here/../run"}, "the run itself"),
        ({"mirror": "ftp://x"}, "ftp"),
    ],
)
def test_settings_are_checked_at_once(
    tmp_path: Path, settings: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refused:
        CheckpointManager("run", **settings)  # pyright: ignore[reportArgumentType]
    assert words in str(refused.value)
