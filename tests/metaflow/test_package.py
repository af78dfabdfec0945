"""How Metaflow finds the extension, and what that costs those who do not use it."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys

from tests.metaflow.support import Metaflow

REQUIRES = importlib.metadata.requires("holdfast") or []


def name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0]


def test_an_extra_brings_metaflow() -> None:
    extras = importlib.metadata.metadata("holdfast").get_all("Provides-Extra") or []
    assert "metaflow" in extras
    assert not [extra for extra in extras if "checkpoint" in extra], "a trick, not an offer"


def test_metaflow_loads_it_after_its_rival() -> None:
    """By the name that the metadata has, in exactly this spelling; the marker, which Metaflow
    does not read, keeps every installer from it."""
    rivals = [r.replace('"', "'") for r in REQUIRES if name_of(r) == "metaflow-checkpoint"]
    [rival] = [r for r in rivals if "extra == 'metaflow'" in r]
    assert "python_version < '3'" in rival


def test_it_does_not_require_itself() -> None:
    """Metaflow would wait for it in vain, and raise whenever it is imported."""
    assert "holdfast" not in {name_of(requirement) for requirement in REQUIRES}


def python(flows: Metaflow, code: str, **variables: str) -> object:
    """What `code` leaves in `told`, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{code}\nprint(json.dumps(told))"],
        cwd=flows.folder,
        env={**flows.environment(), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_metaflow_imports_only_the_extension(metaflow: Metaflow) -> None:
    """Not Holdfast, not NumPy: `flow.py show`, the runtime, every card has no use for them."""
    code = "import metaflow\ntold = sorted(sys.modules)"
    nowhere = str(metaflow.folder / "none")
    without = python(metaflow, code, METAFLOW_EXTENSIONS_SEARCH_DIRS=nowhere)
    added = set(python(metaflow, code)) - set(without)  # type: ignore[arg-type]
    assert added
    assert not {"holdfast", "numpy"} & added
    ours = "metaflow_extensions.holdfast"
    assert not [name for name in added if ours not in name and name != "metaflow_extensions"]


def test_what_a_task_checks_for_is_what_holdfast_needs(metaflow: Metaflow) -> None:
    told = python(
        metaflow,
        "import metaflow\n"
        "from metaflow_extensions.holdfast.plugins import shared\n"
        "told = [*shared.NEEDED, 'click']",  # of which tasks use nothing
    )
    core = [name_of(requirement) for requirement in REQUIRES if "extra ==" not in requirement]
    assert sorted(told) == sorted(core)  # type: ignore[call-overload]


def test_a_task_on_a_bucket_is_told_of_its_client_too(metaflow: Metaflow) -> None:
    told = python(
        metaflow,
        "import metaflow\n"
        "from metaflow_extensions.holdfast.plugins import shared\n"
        "sys.modules['obstore'] = None  # as if it were not installed\n"
        "shared.check_installed('fit', 'local')\n"
        "try: shared.check_installed('fit', 's3')\n"
        "except shared.NotInstalled as error: told = str(error)",
    )
    assert "runs: obstore. " in str(told)
    assert '"obstore": ">=' in str(told)


def test_either_decorator_brings_holdfast_into_the_code_package(metaflow: Metaflow) -> None:
    told = python(
        metaflow,
        "import metaflow\n"
        "told = [[at for _, at in each.args[0]().add_to_package()]\n"
        "        for each in (metaflow.checkpoint, metaflow.model)]",
    )
    of_checkpoint, of_model = told  # type: ignore[misc]
    assert of_checkpoint == of_model
    assert "holdfast/metaflow/models.py" in of_model
