"""Wrong usage is said in one way, with a hint, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import holdfast
from tests.cli.conftest import Command, failed, same_error_as_json


def test_usage_errors(holdfast_cli: Command) -> None:
    assert "No such command 'sl'" in failed(holdfast_cli("sl"), 2)
    assert "No such option" in failed(holdfast_cli("ls", "--none"), 2)
    assert "See 'holdfast ls --help'" in holdfast_cli("ls", "--none").err
    assert same_error_as_json(holdfast_cli, "show")["exit_code"] == 2


def test_what_follows_two_dashes_is_no_option_of_ours(holdfast_cli: Command) -> None:
    words = ["rehearse", "--steps", "1", "--", "python", "train.py", "--json"]
    assert "needs at least 4 steps and one kill\nHint: " in failed(holdfast_cli(*words), 2)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--tolerance", "nan"), ("--tolerance", "-1"), ("--timeout", "0"), ("--timeout", "inf")],
)
def test_numbers_that_no_rehearsal_can_use(option: str, value: str, holdfast_cli: Command) -> None:
    words = ["rehearse", option, value, "--", "python", "train.py"]
    assert f"Invalid value for '{option}'" in failed(holdfast_cli(*words), 2)


def test_an_unknown_option_is_no_program_to_rehearse(holdfast_cli: Command) -> None:
    assert "No such option '--kill'" in failed(holdfast_cli("rehearse", "--kill", "3"), 2)


def test_places_that_cannot_be_written_have_a_hint(
    run: Path, tmp_path: Path, holdfast_cli: Command
) -> None:
    name = "n" * 300
    error = same_error_as_json(holdfast_cli, "export", run, tmp_path / name)
    assert error["error"].endswith(f": {tmp_path / name}")  # and not the one it was to become
    assert error["hint"] == "Use a shorter name."


def test_version_and_help(holdfast_cli: Command) -> None:
    assert holdfast_cli("--version").out == f"holdfast {holdfast.__version__}\n"
    for words in ([], ["--help"], ["-h"]):
        done = holdfast_cli(*words)
        assert done.status == 0
        assert done.out.startswith("Usage: holdfast ")
