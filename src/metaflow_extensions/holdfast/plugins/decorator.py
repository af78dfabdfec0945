"""`@checkpoint`. Imported with Metaflow itself, in every process: what it needs is imported by
the tasks that use it."""

import os
from functools import cache, wraps

from metaflow.decorators import StepDecorator
from metaflow.exception import MetaflowException
from metaflow.metaflow_current import current

from .shared import check_installed, package, switch, text_as_value


class CheckpointException(MetaflowException):
    headline = "Checkpoint error"


_POLICIES = {
    "load_policy": ("fresh", "eager", "none"),
    "on_preemption": ("stop", "tell", "none"),
}
_ARTIFACTS = ("_task_checkpoints", "_task_latest_checkpoint")


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
    every : Union[str, int], optional
        When `current.checkpoint.run` saves: "10min" (without it), 500 steps, "epoch".
    attributes : List[str], optional
        Attributes of `self` that are part of every checkpoint, and set again before the step's
        code goes on: ["epoch", "history"], or "epoch,history".
    on_preemption : str, default "stop"
        What happens when AWS Batch, Kubernetes or a spot instance of EC2 say that they take the
        machine away. "stop": the next save ends the attempt once it is durable, if there is a
        retry left and the task runs on Batch or Kubernetes. "tell": `current.checkpoint.preempted`
        becomes true. "none", None: nobody looks.
    temp_dir_root : str, optional
        Where `current.checkpoint.directory` is made.
    show_card : bool, default False
        Whether the task has a card of type "checkpoint": what was saved, loaded and removed.
    """

    name = "checkpoint"
    defaults = {  # noqa: RUF012 - Metaflow copies it
        "load_policy": "fresh",
        "keep": None,
        "every": None,
        "attributes": None,
        "on_preemption": "stop",
        "temp_dir_root": None,
        "show_card": False,
    }

    _current = None
    _card = None
    _stopping = None

    def init(self):
        # `--with checkpoint:…`, and the runtime to the task, give everything as text.
        values = self.attributes
        for name, value in values.items():
            values[name] = text_as_value(value)
        for name in ("load_policy", "on_preemption"):
            if values[name] is None:
                values[name] = "none"
        if values["temp_dir_root"] is not None:
            values["temp_dir_root"] = os.fspath(values["temp_dir_root"])
        if isinstance(values["attributes"], str):
            values["attributes"] = [name.strip() for name in values["attributes"].split(",")]
        values["show_card"] = switch(values["show_card"])

    def step_init(self, flow, graph, step_name, decorators, environment, flow_datastore, logger):
        self._flow_datastore = flow_datastore
        self._logger = logger
        self._step_name = step_name
        # For joins, whose own step need not have this decorator: each branch has its own.
        from metaflow.flowspec import INTERNAL_ARTIFACTS_SET

        INTERNAL_ARTIFACTS_SET.update(_ARTIFACTS)
        for name, policies in _POLICIES.items():
            if self.attributes[name] not in policies:
                raise self._refusal(name, f"be one of {', '.join(map(repr, policies))}")
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
        keep = self.attributes["keep"]
        if not isinstance(keep, (str, type(None))):
            raise self._refusal("keep", "be a rule such as 'last=3 best=2:val_loss'")
        if keep is not None:
            from holdfast.core.retention import parse_keep

            self._check_rule("keep", parse_keep)
        if self.attributes["every"] is not None:
            from holdfast.core.schedule import parse_every

            self._check_rule("every", parse_every)
        _keep_origin(self._flow_datastore, flow.name, run_id)

    def _check_rule(self, name, parse):
        from holdfast.errors import HoldfastError

        try:
            parse(self.attributes[name])
        except HoldfastError as error:
            raise self._refusal(name, f"be understood: {error}") from None

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
        check_installed(f"@checkpoint on step *{step_name}*", self._flow_datastore.TYPE)
        from holdfast.metaflow.task import begin, running_task

        task = running_task(flow, self._flow_datastore)
        if self.attributes["show_card"]:
            from holdfast.metaflow.card import card_of

            self._card = card_of(
                self._flow_datastore,
                pathspec=task.pathspec,
                attempt=task.attempt,
                keep=self.attributes["keep"],
            )
        self._current = begin(
            task,
            flow,
            policy=self.attributes["load_policy"],
            keep=self.attributes["keep"],
            every=self.attributes["every"],
            attributes=self.attributes["attributes"] or (),
            temp_dir_root=self.attributes["temp_dir_root"],
            tell=self._tell,
            card=self._card,
        )
        self._flow = flow
        current._update_env({"checkpoint": self._current})

    def task_decorate(
        self, step_func, flow, graph, retry_count, max_user_code_retries, ubf_context
    ):
        if self._current is None:
            return step_func
        # Here, for every other decorator has said by now where the task runs.
        from holdfast.metaflow.stopping import Stopping

        self._stopping = Stopping(
            current,
            self._current,
            policy=self.attributes["on_preemption"],
            may_retry=retry_count < max_user_code_retries,
            tell=self._tell,
        )

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
        failed = True
        try:
            self._current.finish(complete=not failing)
            failed = failing
        except HoldfastError as error:
            if not failing:
                raise
            self._tell(f"the last save failed: {error}")
        finally:
            if self._stopping is not None:
                self._stopping.close()
            if self._card is not None:
                self._card.end(failed=failed)

    def task_finished(self, step_name, flow, graph, is_task_ok, retry_count, max_retries):
        if self._card is not None:
            self._card.wait()

    def _tell(self, text):
        self._logger(text, head="[@checkpoint] ", timestamp=False)

    def add_to_package(self):
        return package()


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
