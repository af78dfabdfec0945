"""The package as others get it: its names, its weight, its wheel."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import holdfast
from tests.support.wheel import Environment, build_wheel, copy_of_sources

ROOT = Path(__file__).resolve().parent.parent

PUBLIC = [
    "CheckpointInfo",
    "CheckpointManager",
    "Directory",
    "File",
    "HoldfastError",
    "Pending",
    "Preempted",
    "Preemption",
    "Run",
    "Variables",
    "__version__",
    "average",
    "ensemble",
    "errors",
    "import_checkpoint",
    "open",
]

# Nothing that a script of a few lines, or the command line, should have to wait for.
HEAVY = {
    "torch", "tensorflow", "jax", "keras", "xgboost", "lightgbm", "sklearn", "transformers",
    "lightning", "boto3", "obstore", "numpy", "rich", "pandas", "scipy",
}  # fmt: skip
FRAMEWORKS = HEAVY - {"numpy"}


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    report = "import json, sys; print(json.dumps(sorted(m.split('.')[0] for m in sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


# -- names -----------------------------------------------------------------------


def test_public_names() -> None:
    assert sorted(holdfast.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(holdfast))


@pytest.mark.parametrize("name", [n for n in PUBLIC if n != "__version__"])
def test_public_names_are_documented(name: str) -> None:
    value = getattr(holdfast, name)
    assert value.__doc__, name
    assert len(value.__doc__) > 20


def test_type_checkers_and_runtime_see_the_same_names() -> None:
    source = (ROOT / "src" / "holdfast" / "__init__.py").read_text()
    re_exported = re.findall(
        r"^(?:    )?from holdfast\S* import (\w+) as \1$", source, re.MULTILINE
    )
    assert sorted([*re_exported, "__version__"]) == PUBLIC


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Runn'"):
        holdfast.Runn  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", ["Run", "CheckpointManager", "Pending", "Preemption"])
def test_public_methods_are_documented(name: str) -> None:
    members = vars(getattr(holdfast, name)).items()
    methods = {
        m: v for m, v in members if not m.startswith("_") and (callable(v) or _is_property(v))
    }
    assert methods
    assert [m for m, v in methods.items() if not v.__doc__] == []


def _is_property(value: object) -> bool:
    return isinstance(value, property)


# -- weight ----------------------------------------------------------------------


def test_import_is_light() -> None:
    assert not modules_after("import holdfast") & HEAVY


def test_using_it_imports_no_framework() -> None:
    loaded = modules_after("import holdfast; holdfast.Run; holdfast.CheckpointManager")
    assert "numpy" in loaded
    assert not loaded & FRAMEWORKS


def test_the_command_line_imports_no_framework() -> None:
    loaded = modules_after("from holdfast.cli import cli; [c.name for c in cli.commands.values()]")
    assert not loaded & HEAVY


def test_import_takes_little_time() -> None:
    """By the import system's own count, which other processes disturb less than a clock."""
    best = min(import_ms("import holdfast") for _ in range(3))
    assert best < 100, f"import holdfast took {best:.0f} ms"


def import_ms(code: str) -> float:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
    )
    rows = [line.split("|") for line in done.stderr.splitlines() if line.count("|") == 2]
    [microseconds] = [int(total) for _, total, name in rows if name.strip() == code.split()[-1]]
    return microseconds / 1000


# -- metadata and wheel ----------------------------------------------------------


def test_version_matches_metadata() -> None:
    assert holdfast.__version__ == importlib.metadata.version("holdfast")


def test_core_needs_no_framework() -> None:
    requires = importlib.metadata.requires("holdfast") or []
    core = {re.split(r"[^\w-]", r)[0] for r in requires if "extra ==" not in r}
    assert core == {"numpy", "blake3", "xxhash", "msgspec", "click"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = copy_of_sources(tmp_path_factory.mktemp("source"))
    return build_wheel(sources, tmp_path_factory.mktemp("dist"))


@pytest.mark.slow
def test_wheel_content(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "holdfast/py.typed" in names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    sources = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src").rglob("*.py")}
    assert sources <= names
    assert any(name.startswith("metaflow_extensions/holdfast/") for name in sources)
    [top_level] = [name for name in names if name.endswith("/top_level.txt")]
    told = zipfile.ZipFile(wheel).read(top_level).decode().split()
    # Metaflow looks only into distributions whose list names it.
    assert told == ["holdfast", "metaflow_extensions"]
    assert not [n for n in names if n.startswith(("tests", "examples", "demo", "docs"))]


@pytest.mark.slow
def test_wheel_works_without_extras(wheel: Path, tmp_path: Path) -> None:
    """In a clean environment, without torch, and with `src/` out of reach."""
    home = tmp_path / "venv"
    installed = Environment.new(home)
    installed.install(str(wheel))
    python = Path(installed.python)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(python, "-c", "import holdfast; print(holdfast.__file__)")
    assert Path(where.strip()).is_relative_to(home)
    run(
        python,
        "-c",
        "import importlib.util as u; assert u.find_spec('torch') is None\n"
        "import holdfast\n"
        "with holdfast.CheckpointManager('run') as ckpts:\n"
        "    ckpts.save(7, {'answer': 42}).result()\n"
        "assert holdfast.open('run')['answer'] == 42\n",
    )
    assert holdfast.__version__ in run(home / "bin" / "holdfast", "--version")
    assert json.loads(run(home / "bin" / "holdfast", "ls", "run", "--json"))
    assert "Usage" in run(python, "-m", "holdfast", "--help")
