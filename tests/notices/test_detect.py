"""What is detected, why, and who is asked then."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from holdfast.notices.detect import LINK_LOCAL, Place, detect
from holdfast.notices.file import file_notifier
from holdfast.notices.listening import notifiers_of
from holdfast.notices.notice import Notice
from holdfast.notices.notifier import Over
from holdfast.notices.slurm import slurm_notifier

AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"


def found(environ: dict[str, str], dmi: Path) -> list[Place]:
    return [place for place in detect(environ, dmi) if place.found]


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        ("sys_vendor", "Amazon EC2", "aws"),
        ("bios_version", "4.11.amazon", "aws"),
        ("product_name", "Google Compute Engine", "gcp"),
        ("chassis_asset_tag", AZURE_TAG, "azure"),
    ],
)
def test_the_hardware_names_its_cloud(tmp_path: Path, file: str, text: str, name: str) -> None:
    (tmp_path / file).write_text(f"{text}\n")
    [place] = found({}, tmp_path)
    assert (place.name, place.where) == (name, LINK_LOCAL)
    assert file in place.why


@pytest.mark.parametrize(
    ("file", "text"),
    [("sys_vendor", "Microsoft Corporation"), ("sys_vendor", "QEMU"), ("product_name", "Google")],
)
def test_other_hardware_is_nobodys(tmp_path: Path, file: str, text: str) -> None:
    assert found({}, tmp_path / "none") == []
    (tmp_path / file).write_text(text)
    assert found({}, tmp_path) == []
    assert [place.name for place in detect({}, tmp_path)] == [
        "aws", "gcp", "azure", "slurm", "file",
    ]  # fmt: skip
    assert notifiers_of(detect({}, tmp_path)) == []


def test_variables_name_places(tmp_path: Path) -> None:
    environ = {
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1",
        "GCE_METADATA_HOST": "127.0.0.1:2",
        "HOLDFAST_AZURE_METADATA_ENDPOINT": "http://127.0.0.1:3",
        "SLURM_JOB_END_TIME": "1764200000",
        "HOLDFAST_NOTICE_FILE": "/tmp/notice",
    }
    places = found(environ, tmp_path)
    assert [place.where for place in places] == [
        "http://127.0.0.1:1",
        "http://127.0.0.1:2",
        "http://127.0.0.1:3",
        "1764200000",
        "/tmp/notice",
    ]
    assert {notifier.name for notifier in notifiers_of(places)} == {
        "AWS",
        "GCP preemption",
        "GCP maintenance",
        "Azure",
        "Slurm",
        "notice file",
    }
    disabled = {**environ, "AWS_EC2_METADATA_DISABLED": "true"}
    assert "aws" not in {place.name for place in found(disabled, tmp_path)}
    chosen = found({**environ, "HOLDFAST_NOTICES": "aws, File"}, tmp_path)
    assert [place.name for place in chosen] == ["aws", "file"]
    assert found({**environ, "HOLDFAST_NOTICES": "none"}, tmp_path) == []
    assert len(found({**environ, "HOLDFAST_NOTICES": "all"}, tmp_path)) == 5


def test_a_file_says_it_too(tmp_path: Path) -> None:
    path = tmp_path / "notice"
    now = [1000.0]
    ask = file_notifier(str(path), clock=lambda: now[0]).ask
    assert ask() == []
    path.touch()
    os.utime(path, (500, 500))
    assert ask() == [Notice("notice file", f"the machine will be taken away ({path})")]
    path.write_text("2026-11-26T19:00:00Z\n")
    text = f"the machine will be taken away ({path}: 2026-11-26T19:00:00Z)"
    assert ask() == [Notice("notice file", text, 1795719600.0)]
    now[0] = 1e9  # it is no older than it was when this began
    assert len(ask()) == 1
    os.utime(path, (399, 399))  # it was about another machine
    assert ask() == []
    path.unlink()
    path.mkdir()
    os.utime(path, (900, 900))
    assert ask() == []


def test_a_slurm_job_is_told_before_its_end() -> None:
    now = [0.0]
    ask = slurm_notifier(1000.0, clock=lambda: now[0]).ask
    assert ask() == []
    now[0] = 969.0
    assert ask() == []
    now[0] = 971.0
    [notice] = ask()
    assert (notice.source, notice.deadline_s, notice.stops) == ("Slurm", 1000.0, True)
    now[0] = 1001.0
    with pytest.raises(Over):
        ask()
