from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

import holdfast
from holdfast.errors import UsageError
from holdfast.run import environment
from holdfast.run.environment import collect, config_diff, differences, plain_config


def test_facts_are_plain_and_hold_no_environment_variable(monkeypatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "very-secret-value")
    facts = collect()
    text = msgspec.json.encode(facts).decode()
    assert "very-secret-value" not in text
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["argv"] == sys.argv
    assert facts["cwd"] == os.getcwd()


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


def test_git_commit_and_edits(tmp_path: Path, monkeypatch) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "train.py").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "x")
    script = str(tmp_path / "train.py")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", script, raising=False)
    clean = collect()["git"]
    assert len(clean["commit"]) == 40
    assert clean == {"commit": clean["commit"], "dirty": False}
    edited = []
    for text in ("2\n", "3\n", "2\n"):
        (tmp_path / "train.py").write_text(text)
        edited.append(collect()["git"])
    assert all(facts["dirty"] is True for facts in edited)
    name = clean["commit"][:9]
    for before, now, line in (
        (clean, edited[0], f"code {name} -> {name} (edited)"),
        (edited[0], clean, f"code {name} (edited) -> {name}"),
        (edited[0], edited[1], f"code {name} (edited) -> {name} (edited otherwise)"),
    ):
        assert differences({"git": before}, {"git": now}) == [line]
    assert differences({"git": edited[0]}, {"git": edited[2]}) == []


def test_what_git_could_not_tell_is_no_difference() -> None:
    commit = "a" * 40
    known = [
        {"commit": commit, "dirty": False},
        {"commit": commit, "dirty": True, "edits": "0123"},
    ]
    unknown = [{}, {"commit": commit, "dirty": None}]
    pairs = [(one, other) for one in known for other in unknown]
    pairs.append((known[1], {"commit": commit, "dirty": True}))  # too slow to read the edits
    for before, now in pairs:
        assert differences({"git": before}, {"git": now}) == []
        assert differences({"git": now}, {"git": before}) == []
    assert differences(
        {"git": {"commit": commit, "dirty": None}}, {"git": {"commit": "b" * 40, "dirty": True}}
    ) == ["code aaaaaaaaa -> bbbbbbbbb (edited)"]


def test_without_git(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "git" not in collect()
    monkeypatch.setattr(environment, "_GIT_TIMEOUT_S", 0.0)
    assert "git" not in collect()


def test_differences() -> None:
    before = {"python": "3.11.1", "packages": {"torch": "2.12.0", "numpy": "2"}, "device": "cpu"}
    now = {"python": "3.11.1", "packages": {"torch": "2.13.0", "jax": "1"}, "device": "H200"}
    assert differences(before, now) == ["device cpu -> H200", "torch 2.12.0 -> 2.13.0"]
    assert differences({}, now) == []


def test_the_processor_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: AMD EPYC  9R14\n\nmodel name\t: other\n")
    monkeypatch.setattr(environment, "_CPU_INFO", info)
    epyc = collect()
    assert epyc["cpu"] == "AMD EPYC 9R14"
    info.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")  # as on ARM
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert collect()["cpu"] == "aarch64"
    info.unlink()  # as on macOS
    monkeypatch.setattr("platform.processor", lambda: "arm")
    assert collect()["cpu"] == "arm"
    assert differences(epyc, collect())[-1] == "cpu AMD EPYC 9R14 -> arm"


@dataclass
class Settings:
    lr: float
    path: Path


def test_config_becomes_plain() -> None:
    assert plain_config(Namespace(a=1, b=[Settings(0.1, Path("x"))])) == {
        "a": 1,
        "b": [{"lr": 0.1, "path": "x"}],
    }
    assert plain_config({"n": np.float64(0.5), "t": (1, 2), "s": {2, 1}, 3: None}) == {
        "n": 0.5,
        "t": [1, 2],
        "s": [1, 2],
        "3": None,
    }


def test_config_that_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UsageError, match=r"config\.model\[0\] is of type object"):
        plain_config({"model": [object()]})


def test_config_diff() -> None:
    before = {"lr": 0.1, "data": {"seed": 1, "n": 3}, "flag": 1, "nan": float("nan")}
    now = {"lr": 0.2, "data": {"seed": 1}, "flag": True, "nan": float("nan"), "new": {}}
    assert config_diff(before, now) == [
        "data.n: 3 -> (absent)",
        "flag: 1 -> True",
        "lr: 0.1 -> 0.2",
        "new: (absent) -> {}",
    ]
    assert config_diff(before, before) == []
    assert config_diff(1, 2) == ["config: 1 -> 2"]


def test_a_relative_address_in_a_worker_of_ray_is_told(tmp_path: Path, monkeypatch, capsys) -> None:
    """The folder and the variable are as Ray 2.60 gives them to a worker."""
    folder = tmp_path / "session_2026-11-27_19-53-39_432400_24900" / "artifacts" / "train-1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    told = environment.passing_folder_line
    assert told("runs/gpt", {}) == ""
    monkeypatch.setenv("RAY_RAYLET_PID", "7")
    assert told("s3://bucket/gpt") == told("memory://x") == told(str(tmp_path / "gpt")) == ""
    with holdfast.Run("runs/gpt", quiet=True) as run:
        list(run.range(1))
    assert f"runs/gpt is in {folder}, and Ray" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert told("runs/gpt") == ""
