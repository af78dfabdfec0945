"""`@checkpoint`. Imported with Metaflow itself, in every process: what it needs is imported by
the tasks that use it."""

import os
from functools import cache, wraps
from importlib.util import find_spec

from metaflow.decorators import StepDecorator
from metaflow.exception import MetaflowException
from metaflow.metaflow_current import current


class CheckpointException(MetaflowException):
    headline = "Checkpoint error"


_POLICIES = ("fresh", "eager", "none")
_ARTIFACTS = ("_task_checkpoints", "_task_latest_checkpoint")
_SWITCHES = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0", "none"), False),
}

# Compiled for one Python and one kind of machine, so that a code package cannot bring them.
_NEEDED = ("numpy", "blake3", "xxhash", "msgspec")
_NEEDED_FOR = {"s3": ("obstore",), "gs": ("obstore",), "azure": ("obstore",)}


class CheckpointDecorator(StepDecorator):
    """
    Gives a step `current.checkpoint`: what it saves there survives retries, `resume` and
    machines that go away, in the flow's own datastore.

    Parameters
    ----------
    load_policy : str, default "fresh"
        What is in `current.checkpoint.directory` when the step begins. "fresh": what an earlier
        attempt of the task has saved last, or the task of the run that is resumed. "eager": or
        else what this task of any run of the flow, in the same namespace, has saved last.
        "none", None: nothing.
    keep : str, optional
        Which checkpoints stay: "last=3 best=2:val_loss". Without it all do, but of
        `current.checkpoint.run` the last three.
    every : str or int, optional
        When `current.checkpoint.run` saves: "10min" (without it), 500 steps, "epoch".
    attributes : List[str], optional
        Attributes of `self` that are part of every checkpoint, and set again before the step's
        code goes on: ["epoch", "history"], or "epoch,history".
    temp_dir_root : str, optional
        Where `current.checkpoint.directory` is made.
    show_card : bool, default False
        Taken for compatibility.
    """

    name = "checkpoint"
    defaults = {  # noqa: RUF012 - Metaflow copies it
        "load_policy": "fresh",
        "keep": None,
        "every": None,
        "attributes": None,
        "temp_dir_root": None,
        "show_card": False,
    }

    _current = None

    def init(self):
        # `--with checkpoint:…`, and the runtime to the task, give everything as text.
        values = self.attributes
        for name, value in values.items():
            if isinstance(value, str) and value.strip().lower() in ("none", "null", ""):
                values[name] = None
        if values["load_policy"] is None:
            values["load_policy"] = "none"
        if values["temp_dir_root"] is not None:
            values["temp_dir_root"] = os.fspath(values["temp_dir_root"])
        if isinstance(values["attributes"], str):
            values["attributes"] = [name.strip() for name in values["attributes"].split(",")]
        values["show_card"] = _SWITCHES.get(str(values["show_card"]).lower(), values["show_card"])

    def step_init(self, flow, graph, step_name, decorators, environment, flow_datastore, logger):
        self._flow_datastore = flow_datastore
        self._logger = logger
        self._step_name = step_name
        # For joins, whose own step need not have this decorator: each branch has its own.
        from metaflow.flowspec import INTERNAL_ARTIFACTS_SET

        INTERNAL_ARTIFACTS_SET.update(_ARTIFACTS)
        policy = self.attributes["load_policy"]
        if policy not in _POLICIES:
            raise self._refusal("load_policy", f"be one of {', '.join(map(repr, _POLICIES))}")
        if not isinstance(self.attributes["show_card"], bool):
            raise self._refusal("show_card", "be True or False")
        self._check_attributes(flow)

    def _check_attributes(self, flow):
        names = self.attributes["attributes"]
        if names is None:
            return
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise self._refusal("attributes", "be names such as ['epoch', 'history']")
        for name in names:
            what = None
            if not name.isidentifier() or name.startswith("_"):
                what = f"{name!r} is no name of an artifact"
            elif hasattr(type(flow), name) or name in vars(flow):
                what = f"{name!r} is a parameter, a step or another part of the flow's class"
            if what:
                raise self._refusal("attributes", f"be what the step assigns to self ({what})")

    def runtime_init(self, flow, graph, package, run_id):
        # Not in step_init, which every command of a flow and every task comes through.
        self._check_keep()
        self._check_every()
        _keep_origin(self._flow_datastore, flow.name, run_id)

    def _check_every(self):
        if self.attributes["every"] is None:
            return
        from holdfast.core.schedule import parse_every
        from holdfast.errors import HoldfastError

        try:
            parse_every(self.attributes["every"])
        except HoldfastError as error:
            raise self._refusal("every", f"be understood: {error}") from None

    def _check_keep(self):
        keep = self.attributes["keep"]
        if keep is None:
            return
        if not isinstance(keep, str):
            raise self._refusal("keep", "be a rule such as 'last=3 best=2:val_loss'")
        from holdfast.core.retention import parse_keep
        from holdfast.errors import HoldfastError

        try:
            parse_keep(keep)
        except HoldfastError as error:
            raise self._refusal("keep", f"be understood: {error}") from None

    def _refusal(self, name, what):
        return CheckpointException(
            f"{name} of @checkpoint on step *{self._step_name}* must {what}, "
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
        _check_installed(step_name, self._flow_datastore.TYPE)
        from holdfast.metaflow.task import begin

        self._current = begin(
            flow_datastore=self._flow_datastore,
            flow=flow,
            graph=graph,
            step=step_name,
            run=str(run_id),
            task=str(task_id),
            attempt=retry_count,
            origin=str(current.origin_run_id or ""),
            namespace=str(current.namespace or ""),
            policy=self.attributes["load_policy"],
            keep=self.attributes["keep"],
            every=self.attributes["every"],
            attributes=self.attributes["attributes"] or (),
            temp_dir_root=self.attributes["temp_dir_root"],
            tell=self._tell,
        )
        self._flow = flow
        current._update_env({"checkpoint": self._current})

    def task_decorate(
        self, step_func, flow, graph, retry_count, max_user_code_retries, ubf_context
    ):
        if self._current is None:
            return step_func

        @wraps(step_func)
        def step(*args, **kwargs):
            try:
                return step_func(*args, **kwargs)
            except BaseException:  # also SystemExit, which no hook is told of
                self._finish(failing=True)
                raise

        return step

    def task_post_step(self, step_name, flow, graph, retry_count, max_user_code_retries):
        self._finish(failing=False)

    def task_exception(self, exception, step_name, flow, graph, retry_count, max_user_code_retries):
        self._finish(failing=True)

    def _finish(self, failing):
        if self._current is None:
            return
        from holdfast.errors import HoldfastError

        # Before Metaflow persists what the flow has, which it does after every end it sees.
        saved = self._current.saved
        self._flow._task_checkpoints = saved
        latest = [each for each in saved if each["latest"]]
        self._flow._task_latest_checkpoint = latest[-1] if latest else None
        try:
            self._current.finish(complete=not failing)
        except HoldfastError as error:
            if not failing:
                raise
            self._tell(f"the last save failed: {error}")

    def _tell(self, text):
        self._logger(text, head="[@checkpoint] ", timestamp=False)

    def add_to_package(self):
        return _package()


@cache  # every step with the decorator asks for it
def _keep_origin(flow_datastore, flow, run_id):
    """Write down which run this one resumes, if it does: what resumes this one must know,
    though it has not saved, or has not come to a step with the decorator."""
    from metaflow._vendor import click
    from metaflow.util import get_latest_run_id

    context = click.get_current_context(silent=True)  # no hook is told of the origin
    if context is None or context.command.name != "resume":
        return
    origin = context.params.get("origin_run_id") or get_latest_run_id(context.obj.echo, flow)
    from holdfast.metaflow.origins import keep_origin
    from holdfast.metaflow.places import RunName

    keep_origin(flow_datastore, flow, RunName(str(run_id), str(origin or "")))


def _check_installed(step_name, datastore):
    """Raise if this task's environment, often another one than that of `run`, lacks something."""
    needed = _NEEDED + _NEEDED_FOR.get(datastore, ())
    missing = [name for name in needed if find_spec(name) is None]
    if not missing:
        return
    from holdfast import __version__

    packages = f'"holdfast": "{__version__}"'
    if "obstore" in needed:
        packages += ', "obstore": ">=0.12,<0.13"'
    raise CheckpointException(
        f"@checkpoint on step *{step_name}* needs what is not installed where the step runs: "
        f"{', '.join(missing)}. Add it there: @pypi(packages={{{packages}}}) above the step, "
        "or the same packages in its image."
    )


@cache  # asked for once for each step with the decorator, in every run
def _package():
    """Every file of Holdfast, for tasks on other machines."""
    import holdfast

    root = os.path.dirname(holdfast.__file__)
    files = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if name.endswith((".py", ".typed"))
    ]
    return [(file, os.path.join("holdfast", os.path.relpath(file, root))) for file in files]
