"""Uses what `metaflow-checkpoint` has, beside it: its `@huggingface_hub`, with a stand-in for the
hub, and models of its own, which `@model(load=…)` and `load_model` load."""

from __future__ import annotations

import os
from pathlib import Path

from metaflow import (
    FlowSpec,
    checkpoint,
    current,
    delete_model,
    huggingface_hub,
    load_model,
    model,
    step,
)
from metaflow_extensions.obcheckpoint.plugins.machine_learning_utilities.datastore.context import (
    datastore_context,
)
from metaflow_extensions.obcheckpoint.plugins.machine_learning_utilities.hf_hub import decorator
from metaflow_extensions.obcheckpoint.plugins.machine_learning_utilities.modeling_utils import core
from telling import tell


def download(repo_id, local_dir, **options):
    Path(local_dir, "deep").mkdir(parents=True)
    Path(local_dir, "deep", "config").write_text(repo_id)


decorator.download_model_from_huggingface = download


def contents(folder):
    found = [path for path in Path(folder).rglob("*") if not path.is_dir()]
    assert not any(path.is_symlink() for path in found)
    return {str(path.relative_to(folder)): path.read_text() for path in found}


class Beside(FlowSpec):
    @huggingface_hub
    @model
    @checkpoint
    @step
    def start(self):
        file = Path(current.checkpoint.directory, "weights")
        file.write_text("as trained")
        self.saved = current.checkpoint.save(metadata={"epoch": 1})
        self.trained = current.model.save(file, label="trained")
        self.from_hub = current.huggingface_hub.snapshot_download(repo_id="org/tiny")
        theirs = core.ModelSerializer(current.pathspec, 0, datastore_context.get())
        self.theirs = theirs.save(str(file))["key"]
        self.next(self.end)

    @model(load=["trained", "saved", "from_hub", ("theirs", "named")])
    @checkpoint
    @step
    def end(self):
        loaded = current.model.loaded
        tell(**{name: contents(loaded[name]) for name in loaded})
        Path(loaded["from_hub"], "deep", "config").write_text("changed")
        load_model(self.from_hub, "again")
        tell(again=contents("again"), repo=loaded.info["from_hub"]["metadata"]["repo_id"])
        try:
            current.checkpoint.load(self.from_hub)
        except ValueError as error:
            tell(refused="`load_model`" in str(error))
        tell(deleted=delete_model(self.from_hub), left=os.listdir("again"))


if __name__ == "__main__":
    Beside()
