"""The `Run` of a task, and attributes of `self`, without Metaflow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import holdfast
from holdfast.errors import Fenced, NoIntactCheckpoint, SaveFailed, StateError, UsageError
from holdfast.metaflow.attributes import Attributes
from holdfast.metaflow.checkpoints import Checkpoints
from holdfast.metaflow.current import CurrentCheckpoint
from holdfast.metaflow.loop import TaskLoop
from holdfast.metaflow.places import Root
from tests.metaflow.tasks import in_bucket, task, written
from tests.metaflow.test_damage import flip
from tests.support.wheel import ROOT

STEPS = 8


class Stopped(Exception):
    pass


class Attempt:
    """One process of a task, that trains in a loop and appends to `self.history`."""

    def __init__(self, root: Root | Path | str, *, policy: str = "fresh", **options: Any) -> None:
        self.told: list[str] = []
        self.seen: list[int] = []
        self.space: dict[str, Any] = {}
        self.weights = np.zeros(3)
        several = options.pop("several", False)
        names = options.pop("names", ["history"])
        self.checkpoints: Checkpoints = task(
            Path(root) if isinstance(root, str) else root, **options
        )
        attributes = Attributes(self.space, names)
        self.loop = TaskLoop(
            self.checkpoints,
            attributes,
            policy=policy,
            every=2,
            keep=options.get("keep"),
            several=several,
            tell=self.told.append,
        )
        self.current = CurrentCheckpoint(
            self.checkpoints, attributes=attributes, loop=self.loop, tell=self.told.append
        )
        self.current.go_on(policy)
        self.began_with = list(self.space.get("history", []))

    def train(self, stops_at: int = STEPS) -> Attempt:
        """Up to the middle of the step `stops_at`; the attempt is over then."""
        run = self.current.run.track(weights=self.weights)
        np.random.seed(5)
        self.space["history"] = []
        try:
            for step in run.range(STEPS):
                self.seen.append(step)
                self.weights += np.random.normal(size=3)
                self.space["history"] = [*self.space["history"], step]
                if step == stops_at:
                    raise Stopped
        except Stopped:
            self.end(complete=False)
        else:
            self.end()
        return self

    def end(self, *, complete: bool = True) -> None:
        self.current.finish(complete=complete)

    @property
    def address(self) -> str:
        return self.loop.open().address


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """What nobody has interrupted comes to."""
    return Attempt(tmp_path_factory.mktemp("whole")).train().weights.tolist()


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    if request.param == "s3":
        return in_bucket(request.getfixturevalue("s3"))
    return Root(str(tmp_path / "ds"))


def steps(address: str) -> list[int]:
    with holdfast.CheckpointManager(address) as manager:
        return [info.step for info in manager.checkpoints()]


def test_it_goes_on_in_attempts_and_in_two_runs_that_resume(
    root: Root, expected: list[float]
) -> None:
    first = Attempt(root).train(stops_at=3)
    second = Attempt(root, attempt=1).train(stops_at=5)
    assert (first.seen, second.seen) == ([0, 1, 2, 3], [2, 3, 4, 5])
    assert second.began_with == [0, 1]
    assert second.address == first.address

    two = [Attempt(root, run=run, origin="7") for run in ("8", "9")]
    for resumed in two:
        assert resumed.began_with == [0, 1, 2, 3]
        found = resumed.current.run.resumed
        assert found is not None
        assert found.step == 4
        assert any(f"loop goes on from {first.address}@4" in line for line in resumed.told)
    # One dies before it has saved anything, as attempt 1 of the other run had.
    two[0].end(complete=False)
    two[0] = Attempt(root, run="8", origin="7", attempt=0).train(stops_at=7)
    two[1].train()
    again = Attempt(root, run="8", origin="7", attempt=1).train()
    assert again.seen == [6, 7]
    for done in (two[1], again):
        assert done.weights.tolist() == expected
        assert done.space["history"] == list(range(STEPS))
    # What was resumed is as it was; what goes on has saved for itself.
    assert steps(first.address) == [2, 4]
    assert steps(again.address) == [4, 6, 8]
    third = Attempt(root, run="10", origin="7")
    assert third.began_with == list(range(STEPS))  # the newest of the family
    assert third.train().seen == []
    assert third.weights.tolist() == expected


def test_what_is_damaged_in_the_run_that_is_resumed_is_passed_over(
    tmp_path: Path, expected: list[float]
) -> None:
    first = Attempt(tmp_path).train(stops_at=7)
    packs = sorted(Path(first.address).rglob("*.safetensors"), key=os.path.getmtime)
    flip(packs[-1])
    resumed = Attempt(tmp_path, run="8", origin="7")
    assert resumed.began_with == [0, 1, 2, 3]
    assert resumed.train().seen == [4, 5, 6, 7]
    assert resumed.weights.tolist() == expected
    assert sum(f"{first.address}@6 is damaged" in line for line in resumed.told) == 2
    for pack in packs:
        flip(pack)
    flip(packs[-1])
    hopeless = Attempt(tmp_path, attempt=1)
    with pytest.raises(NoIntactCheckpoint):
        hopeless.train()


def test_none_begins_anew_each_time_and_removes_nothing(tmp_path: Path) -> None:
    tried = [Attempt(tmp_path, attempt=n, policy="none").train(stops_at=3) for n in range(3)]
    assert [one.seen for one in tried] == [[0, 1, 2, 3]] * 3
    assert [one.began_with for one in tried] == [[]] * 3
    assert [Path(one.address).name for one in tried] == ["loop", "loop-2", "loop-3"]
    # A run that resumes it, by another policy, has the newest of all.
    assert Attempt(tmp_path, run="8", origin="7").train().seen == [2, 3, 4, 5, 6, 7]
    assert [steps(one.address) for one in tried] == [[2]] * 3


def test_eager_goes_on_from_another_run_of_the_namespace(tmp_path: Path) -> None:
    Attempt(tmp_path, run="1", namespace="user:me").train(stops_at=5)
    Attempt(tmp_path, run="2", namespace="user:you").train(stops_at=7)
    begins = Attempt(tmp_path, run="3", namespace="user:me")
    assert (begins.began_with, begins.train(stops_at=1).seen) == ([], [0, 1])
    eager = Attempt(tmp_path, run="4", namespace="user:me", policy="eager")
    assert eager.began_with == [0, 1, 2, 3]
    assert eager.train(stops_at=5).seen == [4, 5]


def test_an_attempt_that_was_given_up_does_not_take_the_loop_back(tmp_path: Path) -> None:
    late = Attempt(tmp_path)
    Attempt(tmp_path, attempt=1).train(stops_at=3)
    with pytest.raises(Fenced, match="attempt 1 of Train/7/fit/2 has begun"):
        late.train()
    late.end(complete=False)


def test_an_attempt_that_lives_and_had_not_saved_is_replaced(tmp_path: Path) -> None:
    Attempt(tmp_path).train(stops_at=3)
    own = tmp_path / "mf.holdfast" / "Train" / "fit" / "task" / "8..7" / "loop"
    left = holdfast.CheckpointManager(str(own))
    left.acquire()
    assert Attempt(tmp_path, run="8", origin="7").train().seen == [2, 3, 4, 5, 6, 7]
    assert_fenced(left)
    left = holdfast.CheckpointManager(str(own).replace("8..7", "9"))
    left.acquire()
    assert Attempt(tmp_path, run="9").train(stops_at=1).seen == [0, 1]
    assert_fenced(left)


def assert_fenced(left: holdfast.CheckpointManager) -> None:
    with pytest.raises(Fenced):
        left.save(1, {"a": 1}, block=True)
    with pytest.raises(SaveFailed):
        left.close()


def test_a_task_saves_as_often_as_is_worth_it(tmp_path: Path) -> None:
    one = Attempt(tmp_path)
    run = one.current.run_with(every="auto", mtbf="6h", quiet=True)
    one.train()
    assert steps(run.address) == [STEPS], "it took less than the time until the first save"


def test_where_there_can_be_no_run(tmp_path: Path) -> None:
    nodes = Attempt(tmp_path, run="n", several=True, rank=1, writer="rank-1")
    with pytest.raises(UsageError, match="runs on several"):
        nodes.train()
    with pytest.raises(UsageError, match="the task's own process"):
        _ = CurrentCheckpoint(task(tmp_path)).run
    one = Attempt(tmp_path)
    with pytest.raises(holdfast.errors.BadPolicy):
        one.current.run_with(keep="lots")
    run = one.current.run_with(late=["ema"], every=3, quiet=True)
    assert one.current.run is run
    with pytest.raises(UsageError, match="come too late"):
        one.current.run_with(every=3)
    if (pid := os.fork()) == 0:
        try:
            _ = one.current.run
        except UsageError as error:
            os._exit("belongs to process" in str(error))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    one.train()
    assert steps(run.address) == [3, 6, 8]


def test_the_end_of_the_step_is_the_end_of_a_loop_that_was_left_early(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    one = Attempt(tmp_path)
    for step in one.current.run.range(STEPS):
        if step == 5:
            break
    assert signal.getsignal(signal.SIGTERM) != before
    one.end()
    assert signal.getsignal(signal.SIGTERM) == before
    one.end(complete=False)  # as after an alarm
    with holdfast.CheckpointManager(one.address) as manager:
        assert manager.finished
    two = Attempt(tmp_path, attempt=1)
    assert list(two.current.run.range(STEPS)) == []
    two.end()


def test_lists_pass_over_it_without_a_look(tmp_path: Path) -> None:
    one = Attempt(tmp_path)
    one.current.save(written(tmp_path / "x", a="1"))
    one.train()
    two = Attempt(tmp_path, attempt=1, names=[])
    assert [each["key"] for each in two.current.list(full_namespace=True)] == [
        one.current.saved[0]["key"]
    ]
    assert {address.rpartition("/")[2] for address in two.checkpoints._managers} == {"main"}
    with pytest.raises(UsageError, match="was saved by current"):
        two.current.load(one.current.saved[0]["key"].replace("/main@1", "/loop@8"))
    two.end()


# -- attributes ------------------------------------------------------------------------------


def test_attributes_are_those_of_the_newest(tmp_path: Path) -> None:
    """Of `save` and the loop; after a loop that has ended, those that `save` had later."""
    one = Attempt(tmp_path)
    one.space["history"] = ["before"]
    one.current.save()
    one.train(stops_at=3)
    two = Attempt(tmp_path, attempt=1)
    assert two.began_with == [0, 1]
    assert two.current.is_loaded
    two.space["history"] = ["after"]
    two.current.save()
    two.end(complete=False)
    three = Attempt(tmp_path, attempt=2)
    assert three.began_with == ["after"]
    three.train()  # not at its end: the loop puts its own back
    assert three.space["history"] == list(range(STEPS))
    four = Attempt(tmp_path, attempt=3)
    for _ in four.current.run.track(weights=four.weights).range(STEPS):
        pytest.fail("it has ended")
    four.space["history"] = ["later"]
    four.current.save()
    four.end(complete=False)
    five = Attempt(tmp_path, attempt=4)
    for _ in five.current.run.track(weights=five.weights).range(STEPS):
        pytest.fail("it has ended")
    assert five.space["history"] == ["later"]
    five.end()


def test_attributes_come_back_as_they_were(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "n": 3,
        "text": "ä",
        "nested": {"a": [1.5, (2, None)], 3: {4}},
        "array": np.arange(6.0).reshape(2, 3),
        "tensor": torch.arange(3.0),
        "state": torch.nn.Linear(2, 1).state_dict(),
    }
    names = [*values, "never_set"]
    one = Attempt(tmp_path, names=names)
    one.space.update(values)
    saved = one.current.save()
    assert saved["attributes"] == [*values]
    one.end()
    two = Attempt(tmp_path, names=["array", "n"], attempt=1)
    assert two.space["n"] == 3
    assert (two.space["array"] == values["array"]).all()
    assert two.space.keys() == {"n", "array"}
    two.end()
    three = Attempt(tmp_path, names=names, attempt=1)
    assert three.space.keys() == values.keys()
    assert three.space["nested"] == values["nested"]
    assert torch.equal(three.space["tensor"], values["tensor"])
    torch.nn.Linear(2, 1).load_state_dict(three.space["state"])
    # Only what goes on is given attributes, not who loads a checkpoint.
    three.space.clear()
    three.current.load(saved)
    assert not three.space
    three.end()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        ({"deep": [torch.optim.SGD([torch.ones(1)], lr=1.0)]}, "torch.optim.sgd.SGD"),
        (object(), "builtins.object"),
        (holdfast.File(__file__), "file"),
    ],
)
def test_what_cannot_be_made_again_is_refused_by_name(
    tmp_path: Path, value: Any, said: str
) -> None:
    one = Attempt(tmp_path, names=["fine", "odd"])
    one.space.update(fine=1, odd=value)
    with pytest.raises(StateError, match=r"self\.odd") as raised:
        one.current.save()
    assert said in str(raised.value)
    assert "track(odd=self.odd)" in str(raised.value)
    assert one.current.list() == []
    with pytest.raises(StateError, match=r"self\.odd"):
        for _ in one.current.run.range(4):
            pass
    one.end(complete=False)
    assert steps(one.address) == []


# -- alarms ----------------------------------------------------------------------------------

ALARMS = """
import random, signal, sys
import numpy as np
from tests.metaflow.test_task_loop import Attempt

class Alarm(Exception): pass

def ring(signum, frame): raise Alarm

Attempt(sys.argv[1], run="warm").train()
signal.signal(signal.SIGALRM, ring)
rung, longest_s = 0, 0.2
for number in range(30):
    one, stepped = None, False
    try:
        try:
            # Again and again: one that comes into a callback of Python's own is lost.
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.01, longest_s), 0.5)
            one = Attempt(sys.argv[1], attempt=number)
            run = one.current.run_with(quiet=True, every=1).track(weights=one.weights)
            one.space["history"] = []
            for step in run.range(10**6):
                stepped = True
                one.weights += 1
                one.space["history"] = [*one.space["history"], step]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Alarm:
        rung += 1
    if one is not None:
        one.end(complete=False)
    # A slow machine comes to no step in a fifth of a second.
    longest_s = max(0.2, longest_s / 2) if stepped else longest_s * 1.5
print(rung)
"""


@pytest.mark.slow
def test_an_alarm_at_any_moment_of_a_loop_leaves_it_able_to_go_on(tmp_path: Path) -> None:
    """As `@timeout` raises it: in the main thread, at any instruction."""
    done = subprocess.run(
        [sys.executable, "-c", ALARMS, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "30\n"), done.stderr[-3000:]
    later = Attempt(tmp_path, attempt=30)
    run = later.current.run.track(weights=later.weights)
    for step in run.range(10**6):
        assert later.space["history"] == list(range(step))
        assert later.weights.tolist() == [step] * 3
        assert step > 3
        break
    later.end(complete=False)
    with holdfast.CheckpointManager(run.address) as manager:
        assert all(each.ok for each in manager.verify())
