"""As others get it: the wheel beside its rival and alone, and tasks on other machines."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from tests.metaflow.support import FLOWS, Metaflow
from tests.support.wheel import Environment, build_wheel, copy_of_sources

pytestmark = pytest.mark.slow

# Where the names come from that both extensions have.
_WHOSE = """
import json, metaflow
from importlib.util import find_spec
from metaflow import checkpoint, model, Checkpoint, delete_model, load_model
decorators, others = (checkpoint, model), (Checkpoint, delete_model, load_model)
print(json.dumps({
    "decorators": [each.args[0].__module__ for each in decorators],
    "others": sorted({each.__module__ for each in others}),
    "rival": find_spec("metaflow_extensions.obcheckpoint") is not None,
}))
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_sources(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(sources, tmp_path_factory.mktemp("dist"))


def test_the_names_are_ours(sources: Path, wheel: Path, metaflow: Metaflow, tmp_path: Path) -> None:
    """In one environment: alone, then beside its rival, then beside it from a folder of sources."""
    environment = Environment.new(tmp_path / "venv")
    environment.install(f"{wheel}[metaflow]")
    assert_ours(metaflow, environment, rival=False)
    goes_on(metaflow, environment)

    environment.install("metaflow-checkpoint")
    assert_ours(metaflow, environment, rival=True)
    run(metaflow, environment, "beside")
    weights = {"weights": "as trained"}
    hub = {"deep/config": "org/tiny"}
    assert metaflow.told == [
        {"trained": weights, "saved": weights, "from_hub": hub, "theirs": weights},
        {"again": hub, "repo": "org/tiny"},
        {"refused": True},
        {"deleted": True, "left": ["deep"]},
    ]

    environment.install("--editable", f"{sources}[metaflow]")
    assert_ours(metaflow, environment, rival=True)
    goes_on(metaflow, environment)


def assert_ours(metaflow: Metaflow, environment: Environment, *, rival: bool) -> None:
    told = environment.run("-c", _WHOSE, cwd=metaflow.folder, **metaflow.environment())
    assert json.loads(told.splitlines()[-1]) == {
        "decorators": [
            "metaflow_extensions.holdfast.plugins.decorator",
            "metaflow_extensions.holdfast.plugins.models",
        ],
        "others": ["metaflow_extensions.holdfast.toplevel.toplevel"],
        "rival": rival,
    }


def goes_on(metaflow: Metaflow, environment: Environment) -> None:
    run(metaflow, environment, "counting", DIES_AT="4")
    assert [line.get("loaded") for line in metaflow.told] == [0, 4, None]


def run(metaflow: Metaflow, environment: Environment, flow: str, **more: str) -> None:
    metaflow.forget()
    variables = {**metaflow.environment(), **more}
    script = str(FLOWS / f"{flow}.py")
    environment.run(script, "--no-pylint", "run", cwd=metaflow.folder, **variables)


# -- tasks on other machines -------------------------------------------------------


@pytest.fixture
def unpacked(metaflow: Metaflow, tmp_path: Path) -> Path:
    """What a task on another machine begins with: the code package, unpacked."""
    metaflow.run("counting", "package", "save", str(tmp_path / "package.tgz"))
    folder = tmp_path / "unpacked"
    with tarfile.open(tmp_path / "package.tgz") as package:
        package.extractall(folder, filter="data")
    return folder


def task_elsewhere(metaflow: Metaflow, unpacked: Path, environment: Environment, run: str) -> str:
    """The fourth attempt of the first step of `run`, as AWS Batch starts it; what it printed."""
    script = (
        "import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, '')\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: print('status', end.code)\n"
    )
    return environment.run(
        *("-u", "-c", script, "counting.py", "--quiet", "--metadata=local", "--environment=local"),
        *("--datastore=local", f"--datastore-root={metaflow.folder / '.metaflow'}"),
        *("--event-logger=nullSidecarLogger", "--monitor=nullSidecarMonitor", "--no-pylint"),
        *("step", "start", "--run-id", run, "--task-id", "1"),
        *("--input-paths", f"{run}/_parameters/0", "--namespace", "user:tester"),
        *("--retry-count", "3", "--max-user-code-retries", "4"),
        cwd=unpacked,
        **{
            **metaflow.environment(),
            "PYTHONPATH": str(unpacked / ".mf_code"),
            "METAFLOW_EXTRACTED_ROOT": str(unpacked),
        },
    )


def test_a_task_elsewhere_goes_on_with_the_packaged_holdfast(
    metaflow: Metaflow, unpacked: Path, tmp_path: Path
) -> None:
    """Only what is compiled is installed there, neither Holdfast nor Metaflow; what lacks of it
    is said, and where to add it."""
    metaflow.run("counting", FAILS_AT="6", status=1)
    [run] = {line["run"] for line in metaflow.told}
    metaflow.forget()
    environment = Environment.new(tmp_path / "venv")
    environment.install("xxhash", "requests")
    output = task_elsewhere(metaflow, unpacked, environment, run)
    assert "status 1" in output
    assert "@checkpoint on step start needs what is not installed" in output
    assert 'numpy, blake3, msgspec. Add it there: @pypi(packages={"holdfast": "' in output
    assert "Traceback" not in output
    assert not metaflow.told

    environment.install("numpy", "blake3", "msgspec")
    task_elsewhere(metaflow, unpacked, environment, run)
    [told] = metaflow.told
    assert (told["attempt"], told["loaded"], told["metadata"]) == (3, 5, {"count": 5})
    files = [path for path in unpacked.rglob("*") if path.suffix == ".py"]
    assert unpacked / ".mf_code" / "holdfast" / "__init__.py" in files
    assert not [path for path in files if "tests" in path.relative_to(unpacked).parts]
