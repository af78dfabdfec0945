"""From Metaflow's task to its checkpoints. Called by the decorator; imports Metaflow."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from holdfast.metaflow.attributes import Attributes
from holdfast.metaflow.checkpoints import Checkpoints, new_writer
from holdfast.metaflow.current import CurrentCheckpoint
from holdfast.metaflow.gang import await_choice, publish
from holdfast.metaflow.loop import TaskLoop
from holdfast.metaflow.places import MAIN, Place, Root, RunName, root_of

if TYPE_CHECKING:
    from holdfast.metaflow.card import Card

# What a process that the task starts needs to find its checkpoints.
VARIABLE = "HOLDFAST_METAFLOW_TASK"


@dataclass(frozen=True)
class Node:
    """Which node of a step that runs on several, or the only one (rank None)."""

    rank: int | None = None

    @property
    def writer(self) -> str:
        return f"rank-{self.rank}" if self.rank else MAIN


def datastore_root(flow_datastore: Any) -> Root:
    """The root of the datastore that the flow runs with."""
    from metaflow import metaflow_config as config

    kind = flow_datastore.TYPE
    settings: dict[str, str] = {}
    if kind == "s3":
        settings["endpoint"] = str(config.S3_ENDPOINT_URL or "")
    elif kind == "azure":
        settings["endpoint"] = str(config.AZURE_STORAGE_BLOB_SERVICE_ENDPOINT or "")
    return root_of(kind, flow_datastore.datastore_root, **settings)


def place_of(flow: Any, step: str, run: str, origin: str, node: Node) -> Place:
    """The task of `flow` that runs now."""
    frames = getattr(flow, "_foreach_stack", None) or []
    # The control task of a foreach over an unbounded iterator has no index in it.
    foreach = tuple(int(frame.index) for frame in frames if frame.index is not None)
    if node.rank is not None:
        foreach = foreach[:-1]  # the last one is the node's
    iterations = tuple(int(n) for n in getattr(flow, "_iteration_stack", None) or [])
    return Place(flow.name, step, RunName(run, origin), foreach, iterations)


def node_of(flow: Any, step: str) -> Node:
    """Which node this is, if the step runs on several."""
    if not getattr(flow._graph[step], "parallel_step", False):
        return Node()
    return Node(int(flow._foreach_stack[-1].index))


@dataclass(frozen=True)
class Task:
    """The task of Metaflow's that this process runs."""

    root: Root
    place: Place
    node: Node
    pathspec: str
    attempt: int
    namespace: str

    def checkpoints(self, writer: str, **options: Any) -> Checkpoints:
        """What this process sees of its checkpoints, with options of `Checkpoints`."""
        return Checkpoints(
            self.root,
            self.place,
            pathspec=self.pathspec,
            attempt=self.attempt,
            namespace=self.namespace,
            writer=writer,
            rank=self.node.rank,
            **options,
        )


def running_task(flow: Any, flow_datastore: Any) -> Task:
    """The task of `flow` that runs now: as soon as decorators are told that it begins."""
    from metaflow.metaflow_current import current

    step = str(current.step_name)
    node = node_of(flow, step)
    return Task(
        datastore_root(flow_datastore),
        place_of(flow, step, str(current.run_id), str(current.origin_run_id or ""), node),
        node,
        pathspec=str(current.pathspec),
        attempt=current.retry_count,
        namespace=str(current.namespace or ""),
    )


def begin(
    task: Task,
    flow: Any,
    *,
    policy: str,
    keep: str | None,
    every: int | str | None,
    attributes: Collection[str],
    temp_dir_root: str | None,
    tell: Callable[[str], None],
    card: Card | None = None,
) -> CurrentCheckpoint:
    """What `current.checkpoint` is for this task; what it goes on from is loaded."""
    about: dict[str, Any] = {
        "pathspec": task.pathspec,
        "attempt": task.attempt,
        "namespace": task.namespace,
        "rank": task.node.rank,
        "keep": keep,
    }
    os.environ[VARIABLE] = json.dumps(
        {"root": asdict(task.root), "place": asdict(task.place), **about}
    )
    node = task.node
    checkpoints = task.checkpoints(node.writer, keep=keep, card=card)
    carried = Attributes(vars(flow), attributes)
    current = CurrentCheckpoint(
        checkpoints,
        temp_dir_root=temp_dir_root,
        attributes=carried,
        loop=TaskLoop(
            checkpoints,
            carried,
            policy=policy,
            every=every,
            keep=keep,
            several=node.rank is not None,
            tell=tell,
        ),
        tell=tell,
    )
    if node.rank is None:
        current.go_on(policy)
    elif node.rank == 0:
        current.go_on(policy)
        if policy != "none":  # what all nodes load is what the control node could
            publish(task.root, task.place, task.attempt, current.info)
    elif policy != "none" and (chosen := await_choice(task.root, task.place, task.attempt)):
        start = time.monotonic()
        current.go_on_from(chosen)
        if card:
            card.went_on(chosen, time.monotonic() - start)
    return current


def of_parent() -> Checkpoints | None:
    """For a process that a task has started: the task's checkpoints; None outside of one."""
    if not (told := os.environ.get(VARIABLE)):
        return None
    about = json.loads(told)
    root = Root(**about.pop("root"))
    place = about.pop("place")
    place = Place(
        place["flow"],
        place["step"],
        RunName(*place["run"]),
        tuple(place["foreach"]),
        tuple(place["iterations"]),
    )
    return Checkpoints(root, place, writer=new_writer(), **about)
