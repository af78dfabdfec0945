"""Signals to whole programs: the step is finished, saved, and the exit status is 75."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import holdfast
from tests.support.programs import Program

LOOP = """
for epoch in run.epochs(2):
    for index in run.range(3):
        values.append((epoch, index))
        if (epoch, index) == (0, 1) and run.resumed is None:
            say("ready")
            wait()
say(values)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("to_group", [False, True])
def test_a_signal_finishes_the_step_saves_and_exits_75(
    tmp_path: Path, number: signal.Signals, to_group: bool
) -> None:
    program = Program(tmp_path, LOOP)
    process = program.start()
    (os.killpg if to_group else os.kill)(process.pid, number)
    code, _, err = program.end()
    assert code == 75
    assert f"{number.name}: saved step 2; run the same command again to go on" in err
    assert "Traceback" not in err
    assert program.saved() == [(2, "preempted")]
    code, out, err = program.again()
    assert code == 0
    assert "resumed" in err
    assert out.strip() == str([(e, i) for e in range(2) for i in range(3)])


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        """
        for index in run.range(3):
            if index == 1:
                run.manager.wait()
                say("ready")
                wait()
                say("first")
                time.sleep(30)
        """,
    )
    process = program.start()
    os.kill(process.pid, signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "first"
    os.kill(process.pid, signal.SIGINT)
    code, _, err = program.end()
    assert code in (130, -signal.SIGINT)
    assert "KeyboardInterrupt" in err
    assert program.saved() == []


def test_preempted_in_the_tail(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        """
        for epoch in run.epochs(2):
            for index in run.range(2):
                values.append(index)
            values.append("tail")
            if run.resumed is None and epoch == 0:
                say("ready")
                wait()
        say(values)
        """,
    )
    os.kill(program.start().pid, signal.SIGTERM)
    assert program.end()[0] == 75
    assert program.saved() == [(2, "preempted")]
    assert program.again()[1].strip() == str([0, 1, "tail"] * 2)


LAST_BATCH = """
for epoch in run.epochs(2):
    for index in run.range(2):
        values.append(index)
        if run.resumed is None and (epoch, index) == (0, 1):
            say("ready")
            wait()
    if KILL and run.resumed is None:
        os.kill(os.getpid(), signal.SIGKILL)
    values.append("tail")
say(values)
"""


def test_preempted_in_the_last_batch_saves_and_runs_the_tail(tmp_path: Path) -> None:
    """What the tail reads of the body, `print(loss)`, is not there after a resume."""
    program = Program(tmp_path, "KILL = False" + LAST_BATCH.replace('"tail"', 'f"tail {index}"'))
    os.kill(program.start().pid, signal.SIGTERM)
    code, _, err = program.end()
    assert code == 75
    assert "saved step 2; stopping when epochs goes on" in err
    assert program.saved() == [(2, "preempted"), (2, "preempted")]
    with holdfast.CheckpointManager(program.address) as manager:
        before, after = (manager.load(info.id)["values"] for info in manager.checkpoints())
    assert (before, after) == ([0, 1], [0, 1, "tail 1"])
    assert program.again()[1].strip() == str([0, 1, "tail 1"] * 2)


def test_killed_in_the_tail_after_the_save_only_the_tail_runs(tmp_path: Path) -> None:
    program = Program(tmp_path, "KILL = True" + LAST_BATCH)
    os.kill(program.start().pid, signal.SIGTERM)
    assert program.end()[0] == -signal.SIGKILL
    assert program.saved() == [(2, "preempted")]
    _, out, err = program.again()
    assert out.strip() == str([0, 1, "tail"] * 2)
    assert "epochs 0, after range: going on behind that loop, whose variables are not set" in err


def test_a_guarded_evaluation_in_the_tail_stops_at_once(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        """
        for epoch in run.epochs(2):
            for index in run.range(2):
                values.append(index)
                if run.resumed is None and (epoch, index) == (0, 1):
                    say("ready")
                    wait()
            values.append(sum(run.guard([1, 2])))
        say(values)
        """,
    )
    os.kill(program.start().pid, signal.SIGTERM)
    assert program.end()[0] == 75
    assert program.saved() == [(2, "preempted")]
    assert program.again()[1].strip() == str([0, 1, 3] * 2)


def test_preempted_in_the_very_last_step(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        """
        for index in run.range(2):
            values.append(index)
            if run.resumed is None and index == 1:
                say("ready")
                wait()
        say("after")
        """,
    )
    os.kill(program.start().pid, signal.SIGTERM)
    code, out, err = program.end()
    assert (code, out) == (75, "")
    assert "saved step 2, the last of the loop" in err
    code, out, err = program.again()
    assert (code, out.strip()) == (0, "after")
    assert "is finished at step 2: nothing to train" in err


def test_preempted_before_the_first_step(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        """
        for epoch in run.epochs(1):
            if run.resumed is None:
                say("ready")
                wait()
            for index in run.range(2):
                values.append(index)
        say(values)
        """,
    )
    os.kill(program.start().pid, signal.SIGTERM)
    assert program.end()[0] == 75
    assert program.saved() == [(0, "preempted")]
    assert program.again()[1].strip() == "[0, 1]"


def test_after_the_loop_signals_do_what_they_did_before(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        """
        for index in run.range(2):
            values.append(index)
        say("ready")
        time.sleep(30)
        """,
    )
    process = program.start()
    os.kill(process.pid, signal.SIGTERM)
    assert program.end()[0] == -signal.SIGTERM


def test_after_a_break_signals_do_what_they_did_before(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        """
        for index in run.range(2):
            break
        say("ready")
        time.sleep(30)
        """,
    )
    process = program.start()
    os.kill(process.pid, signal.SIGTERM)
    assert program.end()[0] == -signal.SIGTERM


def test_a_guarded_evaluation_stops_when_nothing_would_be_lost(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        """
        run.save()
        for index in run.range(2):
            values.append(index)
            if index == 1 and run.resumed is None:
                for batch in run.guard(range(1000)):
                    if batch == 0:
                        say("ready")
                    time.sleep(0.05)
        say(values)
        """,
    )
    os.kill(program.start().pid, signal.SIGTERM)
    code, _, err = program.end()
    assert code == 75
    assert "stopped after step 1" in err
    assert program.saved() == [(1, "asked")]
    assert program.again()[1].strip() == "[0, 1]"


def test_a_guarded_evaluation_goes_on_for_a_while_to_save_the_steps_before_it(
    tmp_path: Path,
) -> None:
    program = Program(
        tmp_path,
        """
        for index in run.range(2):
            values.append(index)
            if index == 1 and run.resumed is None:
                for batch in run.guard(range(5)):
                    if batch == 0:
                        say("ready")
                        wait()
                say("evaluated")
        say(values)
        """,
    )
    os.kill(program.start().pid, signal.SIGTERM)
    code, out, _ = program.end()
    assert (code, out.strip()) == (75, "evaluated")
    assert program.saved() == [(2, "final")]


def test_a_guarded_evaluation_that_is_too_long_is_left(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        """
        for index in run.range(2):
            values.append(index)
            if index == 1:
                for batch in run.guard(range(1000)):
                    if batch == 0:
                        say("ready")
                    time.sleep(0.05)
        """,
        options="grace=0.4",
    )
    os.kill(program.start().pid, signal.SIGTERM)
    code, _, err = program.end()
    assert code == 75
    assert "stopped in an evaluation; there is no checkpoint, and 1 step will run again" in err
    assert program.saved() == []


def test_a_child_process_of_the_program_dies_of_its_signals(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        """
        for index in run.range(2):
            child = os.fork()
            if child == 0:
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(3)
            _, status = os.waitpid(child, 0)
            values.append(os.waitstatus_to_exitcode(status))
            child = os.fork()
            if child == 0:
                sys.exit(4)  # its atexit and its run do nothing
            _, status = os.waitpid(child, 0)
            values.append(os.waitstatus_to_exitcode(status))
        say("ready")
        say(values)
        run.close()
        """,
    )
    program.start()
    code, out, err = program.end()
    assert (code, err.count("Traceback")) == (0, 0)
    assert out.strip() == str([-signal.SIGTERM, 4] * 2)
    assert program.saved() == [(2, "final")]


def test_the_programs_own_handler_is_called_too(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        "signal.signal(signal.SIGTERM, lambda number, frame: values.append('mine'))\n"
        + LOOP.replace("say(values)", ""),
    )
    os.kill(program.start().pid, signal.SIGTERM)
    assert program.end()[0] == 75
    with holdfast.CheckpointManager(program.address) as manager:
        assert list(manager.load()["values"])[-1] == "mine"


def test_another_exit_status(tmp_path: Path) -> None:
    program = Program(tmp_path, LOOP)
    text = program.script.read_text().replace("keep=None)", "keep=None, exit_code=12)")
    program.script.write_text(text)
    os.kill(program.start().pid, signal.SIGTERM)
    assert program.end()[0] == 12


def test_a_notebook_gets_an_exception(monkeypatch, tmp_path: Path) -> None:
    from types import SimpleNamespace

    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    run = holdfast.Run(tmp_path / "run", quiet=True)
    with pytest.raises(holdfast.Preempted, match="saved step 1") as caught:
        for _ in run.range(3):
            signal.raise_signal(signal.SIGTERM)
    assert caught.value.exit_code == 75
    run.close()


LOADER = """
import pathlib, threading
import torch
from torch.utils.data import DataLoader, Dataset

gate = pathlib.Path(sys.argv[1] + ".gate")

class Slow(Dataset):
    "From item 4 on, the first process waits until it may go on."
    def __len__(self):
        return 8
    def __getitem__(self, index):
        if index >= 4 and run.resumed is None:
            deadline = time.monotonic() + 120
            while not gate.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        return index

def tell(main):
    "Say when the loop waits for the fifth batch."
    while True:
        frame, names = sys._current_frames()[main], []
        while frame is not None:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        if len(values) == 4 and "_try_get_data" in names:
            return say("ready")
        time.sleep(0.01)

threading.Thread(target=tell, args=(threading.get_ident(),), daemon=True).start()
loader = DataLoader(Slow(), batch_size=1, num_workers=2)
for batch in run.batches(loader):
    values.append(int(batch))
say(values)
"""


def kill_workers_of(process: subprocess.Popen[str]) -> None:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    # Where one ends meanwhile, such as git, the kernel may leave out another.
    while len(workers := children.read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed = 0
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(worker), signal.SIGKILL)
            killed += 1
    assert killed >= 2


def test_a_signal_to_the_group_while_the_loader_works(tmp_path: Path) -> None:
    """The loader's workers outlive it, so that the batch that is waited for comes."""
    program = Program(tmp_path, LOADER)
    process = program.start()
    os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + 60
    while "finishing this step" not in program.errors.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    Path(f"{program.address}.gate").touch()
    code, _, err = program.end()
    assert code == 75, err
    assert program.saved() == [(5, "preempted")]
    code, out, err = program.again()
    assert code == 0, err
    assert out.splitlines()[-1] == str(list(range(8)))


def test_the_loaders_workers_died_before_the_signal_arrived(tmp_path: Path) -> None:
    program = Program(tmp_path, LOADER)
    program.script.write_text(
        program.script.read_text().replace(
            "loader = ",
            "import holdfast.notices.signals as s\n"
            "s.StopSignals.wait.__defaults__ = (60,)\nloader = ",
        )
    )
    process = program.start()
    kill_workers_of(process)
    os.kill(process.pid, signal.SIGTERM)
    code, _, err = program.end()
    assert code == 75, err
    assert program.saved() == [(4, "preempted")]


def test_workers_that_die_without_a_signal_to_the_program_raise(tmp_path: Path) -> None:
    program = Program(tmp_path, LOADER)
    process = program.start()
    kill_workers_of(process)
    code, _, err = program.end()
    assert code == 1
    assert "LoaderInterrupted" in err
    assert program.saved() == []
