"""Where a task's checkpoints are, and whose it goes on from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import BadAddress, StoreUnavailable, UsageError
from holdfast.metaflow.origins import origins_of
from holdfast.metaflow.places import Place, Root, RunName, key_part, lineage, root_of, text_of
from holdfast.stores.looking import folders_in
from holdfast.stores.object_address import parse_object_address
from tests.metaflow.tasks import written

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.text(
    "._-=/ @?#%a9Zäñ", max_size=6
)
names = st.builds(RunName, texts, texts)


@given(texts)
def test_any_name_is_part_of_a_key_and_comes_back(text: str) -> None:
    part = key_part(text)
    assert text_of(part) == text
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._=-]*", part)
    assert ".." not in part
    assert parse_object_address(f"s3://bucket/{part}").prefix == part


@given(names)
def test_any_run_and_its_origin_come_back(name: RunName) -> None:
    assert RunName.parse(name.part) == name
    assert parse_object_address(f"s3://bucket/{name.part}").prefix == name.part


@given(st.lists(names, min_size=2, max_size=2, unique=True))
def test_two_runs_have_two_folders(two: list[RunName]) -> None:
    assert two[0].part != two[1].part


@given(st.text(".-_=a0cefé", max_size=10))
def test_what_is_no_run_is_said_to_be_none(part: str) -> None:
    try:
        found = RunName.parse(part)
    except ValueError:
        return
    assert found.part == part


def test_branches_and_rounds_of_a_step_are_apart() -> None:
    places = [
        Place("F", "s", RunName("1"), foreach, iterations).task
        for foreach in [(), (1,), (1, 2), (12,), (11, 2)]
        for iterations in [(), (1,), (1, 2), (12,)]
    ]
    assert len(set(places)) == len(places)


# -- who goes on from whom -----------------------------------------------------------------

few = st.sampled_from(["1", "2", "3", "4", "5"])
histories = st.dictionaries(few, st.sampled_from(["", "1", "2", "3", "4", "5"]), max_size=5)


@given(few, st.sampled_from(["", "1", "2", "3", "4", "5"]), histories, st.sets(few))
def test_lineage_is_what_a_naive_search_finds(
    run: str, origin: str, origins: dict[str, str], silent: set[str]
) -> None:
    """The origin and all that resumed it, then the same of its origin, none of them twice.
    `silent` runs have saved nothing: they are not found, but what is behind them is."""
    origins = {**origins, run: origin}
    expected: list[set[str]] = []
    at, taken = origin, {run}
    while at and at not in taken:
        family = {r for r, of in origins.items() if r == at or of == at} - taken - silent
        taken |= family | {at}
        expected.append(family)
        at = origins.get(at, "")
    runs = [RunName(r, of) for r, of in origins.items() if r not in silent]
    families = lineage(
        RunName(run, origin), runs, lambda: {r: origins[r] for r in silent & {*origins}}
    )
    assert [{r.run for r in family} for family in families] == expected


def test_nobody_is_asked_for_what_the_folders_say() -> None:
    runs = [RunName("1"), RunName("2", "1")]
    assert len(list(lineage(RunName("3", "2"), runs, lambda: pytest.fail("asked")))) == 2


def test_the_origins_of_runs_that_have_saved_nothing(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    assert origins_of(root, "F") == {}
    for name in ("9..7", "sfn-1.2e..7", "x.y", ".8..7.tmp"):
        written(tmp_path / "mf.holdfast" / "F" / "run-origins", **{name: ""})
    assert origins_of(root, "F") == {"9": "7", "sfn-1.": "7"}
    assert origins_of(root, "G") == {}


# -- looking -------------------------------------------------------------------------------


def test_no_folder_is_no_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("a")
    assert folders_in(str(tmp_path)) == ["a"]
    assert folders_in(str(tmp_path / "nothing")) == []
    assert folders_in(str(tmp_path / "file")) == []


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(5, "I/O error")])
def test_a_folder_that_cannot_be_listed_is_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def scandir(path: str) -> None:
        raise error

    monkeypatch.setattr("os.scandir", scandir)  # permissions say nothing to root
    with pytest.raises(StoreUnavailable, match=str(error.strerror)):
        folders_in(str(tmp_path))


def test_what_cannot_be_listed_is_said_so() -> None:
    with pytest.raises(BadAddress):
        folders_in("memory://x")
    with pytest.raises(UsageError, match="'hdfs'"):
        root_of("hdfs", "/x")


def test_roots_of_datastores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert root_of("local", ".metaflow").address("a", "b") == str(tmp_path / ".metaflow/a/b")
    assert root_of("gs", "gs://b/x/").address("a") == "gs://b/x/a"
    assert root_of("azure", "box/x", endpoint="").address("a") == "az://box/x/a"
