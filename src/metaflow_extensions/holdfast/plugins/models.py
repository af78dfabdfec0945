"""`@model`. Imported with Metaflow itself, in every process: what it needs is imported by the tasks
that use it."""

import os
from functools import wraps

from metaflow.decorators import StepDecorator
from metaflow.exception import MetaflowException
from metaflow.metaflow_current import current

from .shared import check_installed, package, switch, text_as_value

_ARTIFACT = "_task_stored_models"


class ModelException(MetaflowException):
    headline = "Model error"


class LoadingException(ModelException):
    headline = "A model cannot be loaded"


class ModelDecorator(StepDecorator):
    """
    Gives a step `current.model`: what it saves there stays until it is deleted, in the flow's own
    datastore, and later steps and other programs load it by what `save` returned.

    Parameters
    ----------
    load : str or list, optional
        Which attributes of `self` hold what is loaded before the step begins: a name, several, or
        pairs of a name and the folder to load into. They hold what `current.model.save`,
        `current.checkpoint.save` or `current.huggingface_hub.snapshot_download` returned, or its
        key. `current.model.loaded[name]` is the folder.
    best_effort_load : bool, default False
        Whether the step begins though some of them are missing: `current.model.loaded[name]` is
        None then.
    temp_dir_root : str, optional
        Where folders are made for what is loaded.
    """

    name = "model"
    defaults = {  # noqa: RUF012 - Metaflow copies it
        "load": None,
        "best_effort_load": False,
        "temp_dir_root": None,
    }

    _current = None

    def init(self):
        # `--with model:…`, and the runtime to the task, give everything as text.
        values = self.attributes
        for name, value in values.items():
            values[name] = text_as_value(value)
        values["best_effort_load"] = switch(values["best_effort_load"])
        if values["temp_dir_root"] is not None:
            values["temp_dir_root"] = os.fspath(values["temp_dir_root"])

    def step_init(self, flow, graph, step_name, decorators, environment, flow_datastore, logger):
        self._flow_datastore = flow_datastore
        self._logger = logger
        self._step_name = step_name
        # For joins, whose own step need not have this decorator: each branch has its own.
        from metaflow.flowspec import INTERNAL_ARTIFACTS_SET

        INTERNAL_ARTIFACTS_SET.add(_ARTIFACT)
        try:
            self._load = _pairs(self.attributes["load"])
        except (TypeError, ValueError):
            raise self._refusal("load", "be a name, or a list of names or of pairs") from None
        if not isinstance(self.attributes["best_effort_load"], bool):
            raise self._refusal("best_effort_load", "be True or False")

    def _refusal(self, name, what):
        return ModelException(
            f"{name} of @model on step *{self._step_name}* must {what}, "
            f"not {self.attributes[name]!r}."
        )

    def task_pre_step(
        self,
        step_name,
        task_datastore,
        metadata,
        run_id,
        task_id,
        flow,
        graph,
        retry_count,
        max_user_code_retries,
        ubf_context,
        inputs,
    ):
        if retry_count > max_user_code_retries:
            return  # @catch runs its fallback instead of the step
        check_installed(f"@model on step *{step_name}*", self._flow_datastore.TYPE)
        from holdfast.errors import HoldfastError
        from holdfast.metaflow.models import begin
        from holdfast.metaflow.task import running_task

        try:
            self._current = begin(
                running_task(flow, self._flow_datastore),
                flow,
                load=self._load,
                best_effort_load=self.attributes["best_effort_load"],
                temp_dir_root=self.attributes["temp_dir_root"],
                tell=self._tell,
            )
        except HoldfastError as error:
            raise LoadingException(f"@model on step *{step_name}*: {error}") from None
        self._flow = flow
        current._update_env({"model": self._current})

    def task_decorate(
        self, step_func, flow, graph, retry_count, max_user_code_retries, ubf_context
    ):
        if self._current is None:
            return step_func

        @wraps(step_func)
        def step(*args, **kwargs):
            try:
                return step_func(*args, **kwargs)
            finally:  # also at SystemExit, which no hook is told of
                self._finish()

        return step

    def task_exception(self, exception, step_name, flow, graph, retry_count, max_user_code_retries):
        self._finish()

    def _finish(self):
        if self._current is None:
            return
        # Before Metaflow persists what the flow has, which it does after every end it sees.
        self._flow._task_stored_models = self._current.saved
        self._current.finish()

    def _tell(self, text):
        self._logger(text, head="[@model] ", timestamp=False)

    def add_to_package(self):
        return package()


def _pairs(load):
    """`load` as pairs of a name and a folder, or None. Raises ValueError or TypeError."""
    if load is None:
        return []
    load = load.items() if isinstance(load, dict) else [load] if isinstance(load, str) else load
    pairs = []
    for each in load:
        name, path = (each, None) if isinstance(each, str) else each
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(name)
        pairs.append((name, path if path is None else os.fspath(path)))
    return pairs
