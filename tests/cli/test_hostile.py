"""Names from a store that anyone may have written are shown, never obeyed, by any command."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.cli import cli
from tests.cli.conftest import Command
from tests.cli.world import HOSTILE

COMMANDS = [
    ["ls", "{run}"],
    ["ls", "{run}", "--metric", "{name}"],
    ["show", "{run}", "--leaves"],
    ["show", "{run}@best:nothing"],
    ["show", "{run}/{name}"],
    ["stats", "{run}"],
    ["diff", "{run}@1", "hostile/names@2", "--values"],
    ["verify", "{run}"],
    ["restore", "{run}@1", "out/{name}"],
    ["export", "{run}", "out/{name}.safetensors"],
    ["export", "hostile/names", "out/{name}.safetensors", "--only", "{name}"],
    ["export", "{run}@1", "out/{name}", "--to", "hf", "--only", "{name}", "--files", "{name}"],
    ["export", "{run}@1", "out/{name}.pt", "--to", "pt", "--force"],
    ["import", "hostile.safetensors", "out/{name}", "--as", "{name}", "--tag", "{name}"],
    ["import", "{name}", "out/{name}", "--metric", "{name}=1"],
    ["average", "{run}@all", "--to", "means/{name}"],
    ["average", "{run}@all", "--export", "{name}/x", "--only", "{name}"],
    ["cp", "{run}", "--all", "copies/{name}"],
    ["sync", "{run}", "{name}", "--dry-run"],
    ["verify", "{run}", "--repair-from", "nowhere/{name}"],
    ["tag", "{run}@1", "mine"],
    ["tag", "{run}", "{name}", "--delete"],
    ["pin", "{run}@1", "--reason", "{name}"],
    ["rm", "{run}@1", "--dry-run"],
    ["prune", "{run}", "--keep", "best=1:{name}", "--dry-run"],
    ["gc", "{run}", "--dry-run"],
    ["doctor", "{run}", "--full"],
    ["rehearse", "--report", "{name}/report.json", "--", "{name}"],
    ["run", "--on-exit-code", "{name}", "--", "{name}"],
    ["init", "slurm", "--run", "{name}", "--", "{name}"],
    ["init", "slurm", "--name", "{name}", "--", "{name}"],
    ["init", "slurm", "-o", "{name}/job.sh", "--", "{name}"],
    ["init", "k8s", "--image", "train:1", "--run", "/runs/{name}", "--", "{name}"],
    ["init", "k8s", "--image", "{name}", "--", "{name}"],
]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_no_command_obeys(name: str, holdfast_cli: Command) -> None:
    run = f"hostile/{name}" if Path("hostile", name).exists() else "hostile/names"
    for words in COMMANDS:
        line = [word.format(run=run, name=name) for word in words]
        for extra in ([], ["--json"]):
            done = holdfast_cli(line[0], *extra, *line[1:])
            said = done.out + done.err
            assert said, line
            for shown in said.split("\n"):
                assert shown.isprintable(), (line, shown)
                assert not shown.lstrip().startswith("Error: two"), (line, said)
            assert not extra or done.out.isascii()


def test_every_command_is_tried() -> None:
    assert set(cli.commands) == {words[0] for words in COMMANDS}
