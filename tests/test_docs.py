"""The documentation is true: its code runs, its commands and links exist."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import click
import msgspec
import numpy as np
import pytest
import torch

import holdfast
from holdfast.cli import cli
from holdfast.core import decode, records, values
from holdfast.manager import history

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

_BLOCK = re.compile(
    r"(?:^<!-- (?P<word>\w+)(?:: (?P<about>[^\n]*))? -->\n)?"
    r"^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_INLINE = re.compile(r"`((?:python -m )?holdfast [^`\n]+)`")
_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)[^)]*\)")


@dataclass(frozen=True)
class Block:
    """A fenced block and the comment right before it."""

    language: str
    text: str
    line: int
    word: str
    about: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            match["language"],
            match["text"],
            text.count("\n", 0, match.start("text")) + 1,
            match["word"] or "",
            match["about"] or "",
        )
        for match in _BLOCK.finditer(text)
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def to_run(page: Path) -> list[Block]:
    others = ("fragment", "flow")
    return [b for b in blocks(page) if b.language == "python" and b.word not in others]


@pytest.mark.parametrize("page", [p for p in PAGES if to_run(p)], ids=name_of)
def test_python_runs(page: Path, tmp_path: Path) -> None:
    """The blocks of a page are one program; line numbers in a traceback are the page's."""
    program = ""
    for block in to_run(page):
        program += "\n" * (block.line - 1 - program.count("\n")) + block.text
    script = tmp_path / f"page_{page.stem}.py"  # "torch.py" would hide torch
    script.write_text(program)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_fragments_say_why() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.word == "fragment":
                assert len(block.about.split()) >= 3, f"{name_of(page)}:{block.line}"


def commands(page: Path) -> list[str]:
    """What the page says to type: `holdfast …` in console blocks and in the text."""
    found = _INLINE.findall(page.read_text())
    for block in blocks(page):
        if block.language == "console":
            lines = [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]
            found += [ln for ln in lines if ln.startswith(("holdfast ", "python -m holdfast "))]
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=name_of)
def test_commands_exist(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(line.removeprefix("python -m "))[1:]
        command: click.Command = cli
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            name = words.pop(0)
            assert name in command.commands, f"{line!r}: no command {name!r}"
            command = command.commands[name]
        else:
            known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
            known.add("--help")
            for word in itertools.takewhile(lambda word: word != "--", words):
                if word.startswith("-"):
                    assert word.split("=")[0] in known, f"{line!r}: no option {word}"


def test_commands_in_messages_exist() -> None:
    """A hint that names a command must not send people to one that is not there."""
    for source in (ROOT / "src" / "holdfast").rglob("*.py"):
        for name in re.findall(r"holdfast ([a-z]+) --?[a-z]", source.read_text()):
            assert name in cli.commands, f"{source.relative_to(ROOT)}: no command {name!r}"


def test_every_command_is_documented() -> None:
    said = {shlex.split(line.removeprefix("python -m "))[1] for p in PAGES for line in commands(p)}
    assert set(cli.commands) <= said


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


def test_files_named_in_the_text_exist() -> None:
    """`core/log.py` and the like: from the root, or from the package."""
    starts = (ROOT, ROOT / "src" / "holdfast")
    for page in (ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"):
        named = re.findall(r"`([a-z_.]+(?:/[a-z_]+)*(?:/|\.py|\.md|\.toml))`", page.read_text())
        assert len(named) > 3
        gone = [name for name in named if not any((start / name).exists() for start in starts)]
        assert not gone, f"{name_of(page)}: {gone}"


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target in _LINK.findall(index.read_text())}
    assert set(ROOT.glob("docs/**/*.md")) - linked == {index}


# -- the format ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "heading"),
    [
        (records.RunInfo, "## `holdfast.json`"),
        (records.Entry, "## The log"),
        (records.Holder, "## The log"),
        (records.SegmentRef, "### Segments"),
        (records.Segment, "### Segments"),
        (records.Record, "### Records"),
        (records.Manifest, "## Manifests"),
        (records.Pack, "## Manifests"),
        (records.Leaf, "## Manifests"),
        (records.Chunk, "## Manifests"),
        (records.OtherRank, "## Further ranks"),
        (records.Fragment, "## Fragments"),
        (records.Outcome, "## Fragments"),
        (records.Failure, "## Fragments"),
        *((kind, "## Events") for kind in get_args(history.Event)),
    ],
)
def test_every_field_is_specified(kind: type[msgspec.Struct], heading: str) -> None:
    page = (ROOT / "docs" / "format.md").read_text()
    section = re.split(r"^#+ ", page.partition(f"{heading}\n")[2], flags=re.MULTILINE)[0]
    unnamed = [name for name in kind.__struct_fields__ if f"`{name}`" not in section]
    assert unnamed == []


def test_every_tag_is_specified() -> None:
    page = (ROOT / "docs" / "format.md").read_text()
    specified = set[str]()
    for row in re.findall(r"^\| (`[^|]+`) \|", page, re.MULTILINE):
        specified |= set(re.findall(r"`([a-z.]+)`", row))
    sources = [p.read_text() for p in (ROOT / "src" / "holdfast").rglob("*.py")]
    written = {tag for text in sources for tag in re.findall(r'"!": "([a-z.]+)"', text)}
    read = {*decode._TAGS, *values.DECODERS}
    assert len(written | read) > 40
    assert (written | read) - {"id", "ref"} <= specified  # those two are in the text


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_the_reader_in_the_format_page_reads_a_run(tmp_path: Path, compress: str | None) -> None:
    """It uses json, numpy and a BLAKE3 only, and nothing of Holdfast."""
    [reader] = [b for b in blocks(ROOT / "docs" / "format.md") if b.word == "reader"]
    assert "import holdfast" not in reader.text
    namespace: dict[str, object] = {}
    exec(compile(reader.text, "format.md", "exec"), namespace)

    rng = np.random.default_rng(0)
    large = rng.standard_normal((5, 700, 700))  # more than one chunk
    shared = [1, 2, {"deep": True}]
    state = {
        "weights": large,
        "small": {"ints": np.arange(7, dtype=np.int16), "scalar": np.float32(1.5)},
        "counts": shared,
        "again": (shared, (1, 2)),
        "name": "é",
        "empty": np.zeros((0, 3)),
        "fortran": np.asfortranarray(rng.standard_normal((3, 4))),
        "bits": np.array([True, False]),
        "noise": np.frombuffer(rng.bytes(10_000), np.uint8),
        "half": rng.standard_normal(5000).astype(np.float16),
    }
    run = tmp_path / "run"
    with holdfast.CheckpointManager(run, compress=compress) as ckpts:
        ckpts.save(1, {"weights": large[:1]}).result()
        ckpts.save(2, state).result()
        ckpts.tag(2, "kept")
        ckpts.save(3, state).result()  # stores nothing anew

    step, value, leaves = namespace["read_checkpoint"](run)  # type: ignore[operator]
    assert step == 3
    assert value["name"] == "é"
    assert value["counts"] == shared
    assert value["again"] == (shared, (1, 2))
    assert value["again"][0] is value["counts"]
    assert np.array_equal(leaves["weights"], large)
    assert value["weights"] is leaves["weights"]
    assert np.array_equal(leaves["small/ints"], np.arange(7, dtype=np.int16))
    assert np.array_equal(leaves["fortran"], state["fortran"])
    assert leaves["empty"].shape == (0, 3)
    assert leaves["bits"].tolist() == [True, False]
    assert np.array_equal(leaves["noise"], state["noise"])
    assert np.array_equal(leaves["half"], state["half"])
    stored = sum(path.stat().st_size for path in run.glob("packs/*"))
    assert (stored < 1.1 * large.nbytes) == bool(compress), "1.2 of it were saved"


def test_the_reader_in_the_format_page_reads_a_model(tmp_path: Path) -> None:
    [reader] = [b for b in blocks(ROOT / "docs" / "format.md") if b.word == "reader"]
    namespace: dict[str, object] = {}
    exec(compile(reader.text, "format.md", "exec"), namespace)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    run = tmp_path / "run"
    with holdfast.CheckpointManager(run) as ckpts:
        ckpts.save(1, {"model": model, "optimizer": optimizer}).result()

    _, value, leaves = namespace["read_checkpoint"](run)  # type: ignore[operator]
    assert list(value["model"]) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert np.array_equal(value["model"][name], tensor.numpy())
        assert np.array_equal(leaves[f"model/{name}"], tensor.numpy())
    saved, live = value["optimizer"], optimizer.state_dict()
    assert saved["param_groups"][0]["lr"] == 0.5
    assert np.array_equal(saved["state"][0]["exp_avg"], live["state"][0]["exp_avg"].numpy())


def test_the_reader_in_the_format_page_reads_boxes() -> None:
    """A leaf that was cut in any way, as many processes may."""
    [reader] = [b for b in blocks(ROOT / "docs" / "format.md") if b.word == "reader"]
    namespace: dict[str, object] = {}
    exec(compile(reader.text, "format.md", "exec"), namespace)
    _, value, leaves = namespace["read_checkpoint"](ROOT / "tests" / "golden" / "boxes")  # type: ignore[operator]
    assert np.array_equal(leaves["numpy/f4"], np.arange(6, dtype="<f4").reshape(2, 3) * 6)
    assert np.array_equal(value["torch"]["transposed"], np.arange(6).reshape(2, 3).T)
    assert np.array_equal(value["frozen"], np.arange(3000))


def test_the_reader_in_the_format_page_refuses_damage(tmp_path: Path) -> None:
    [reader] = [b for b in blocks(ROOT / "docs" / "format.md") if b.word == "reader"]
    namespace: dict[str, object] = {}
    exec(compile(reader.text, "format.md", "exec"), namespace)
    run = tmp_path / "run"
    with holdfast.CheckpointManager(run) as ckpts:
        ckpts.save(1, {"weights": np.ones(1000)}).result()
    [pack] = (run / "packs").iterdir()
    data = bytearray(pack.read_bytes())
    data[4096 + 17] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        namespace["read_checkpoint"](run)  # type: ignore[operator]
