from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.errors import BadAddress
from holdfast.stores.local import LocalStore
from holdfast.stores.open import open_store
from tests.stores.contract import ANY


@pytest.mark.parametrize("form", [str, Path, "file://{}".format, "file://localhost{}".format])
def test_a_folder_in_every_form(tmp_path: Path, form) -> None:
    store = open_store(form(tmp_path / "run"))
    assert isinstance(store, LocalStore)
    assert store.put_new("a", [b"x"])
    assert (tmp_path / "run" / "a").read_bytes() == b"x"


def test_opening_touches_nothing(tmp_path: Path) -> None:
    open_store(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_path_stays_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = open_store("runs/x")
    assert store.address == "runs/x"
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.put_new("a", [b"x"])
    assert (tmp_path / "runs/x/a").exists()


def test_escapes_in_a_file_url(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}/50%25%20%23%3F").put_new("a", [b"x"])
    assert (tmp_path / "50% #?" / "a").exists()


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    open_store("~/runs").put_new("a", [b"x"])
    assert (tmp_path / "runs/a").exists()


@pytest.mark.parametrize(
    ("address", "opened"),
    [
        ("s3://bucket/exp/gpt/", "s3://bucket/exp/gpt"),
        ("GS://bucket", "gs://bucket"),
        ("az://container/x?account=me", "az://container/x?account=me"),
        (
            "s3://bucket/a=1?region=eu-west-1&endpoint=http://127.0.0.1:9000",
            "s3://bucket/a=1?endpoint=http://127.0.0.1:9000&region=eu-west-1",
        ),
    ],
)
def test_object_stores(address: str, opened: str) -> None:
    store = open_store(address)
    assert store.address == opened
    assert open_store(opened).address == opened


@pytest.mark.parametrize("name", ["with:colon", "s3:/one-slash", "C:/windows", "@x"])
def test_odd_paths_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store(name).put_new("a", [b"x"])
    assert (tmp_path / name / "a").exists()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("", "not a path"),
        ("a\0b", "not a path"),
        ("s3://", "no bucket"),
        ("GS://b", "no bucket"),
        ("az://container/../x", "bad prefix"),
        ("s3://bucket/.hidden", "bad prefix"),
        ("s3://bucket/x?access_key_id=SECRET", "does not take the option 'access_key_id'"),
        ("gs://bucket/x?region=eu", "does not take the option 'region'"),
        ("s3://key:SECRET@bucket/x", "does not take"),
        ("s3://bucket/x?endpoint=http://key:SECRET@host", "no plain http"),
        ("s3://bucket/x?endpoint=ftp://host", "no plain http"),
        ("s3://bucket/x?region=a&region=b", "given twice"),
        ("s3://bucket/x?region", "not a URL"),
        ("s3://bucket/x#y", "does not take"),
        ("ftp://host/x", "unknown scheme ftp://"),
        ("file://host/x", "on this machine"),
        ("file://relative", "on this machine"),
        ("file:///x?y", "no query"),
        ("file:///x#y", "no query"),
        ("file:///x%00y", "not a path"),
        ("file://[/x", "not a URL"),
        ("memory://", "bad name"),
        ("memory://../x", "bad name"),
        ("memory:///x", "bad name"),
    ],
)
def test_bad_addresses(address: str, says: str) -> None:
    with pytest.raises(BadAddress, match=says) as caught:
        open_store(address)
    assert caught.value.hint
    assert "SECRET" not in str(caught.value)


def test_the_hint_lists_what_is_supported() -> None:
    with pytest.raises(BadAddress) as caught:
        open_store("ftp://bucket/x")
    assert "s3://" in caught.value.hint
    assert "file://" in caught.value.hint
    assert "memory://" in caught.value.hint


def test_get_through_a_url(tmp_path: Path) -> None:
    open_store(tmp_path).put_new("a", [b"x"])
    assert open_store(f"file://{tmp_path}").get("a", max_bytes=ANY) == b"x"
