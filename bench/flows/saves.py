"""A step that saves as the variable PLAN says, and writes down what that took."""

import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
from metaflow import FlowSpec, current, step

PLAN = json.loads(os.environ["PLAN"])
_FILE = 1 << 20


def checkpointed(function):
    """The step with the decorator of the contender. Both bring one of that name, of which
    Metaflow takes Holdfast's: the other's is added by its class."""
    if PLAN["with"] == "Holdfast":
        from metaflow import checkpoint

        return checkpoint(show_card=PLAN["card"])(function)
    if PLAN["with"] == "metaflow-checkpoint":
        from metaflow_extensions.obcheckpoint.plugins.machine_learning_utilities import checkpoints

        decorator = checkpoints.decorator.CheckpointDecorator
        attributes = {"show_card": PLAN["card"]}
        function.decorators.append(decorator(attributes=attributes, statically_defined=True))
    return function


def write(folder, mib, seed):
    """A file of that size, as no other has it; no part of it is left to be written later."""
    numbers = np.random.default_rng(seed)
    with open(Path(folder, "weights"), "wb") as file:
        for _ in range(mib):
            file.write(numbers.bytes(_FILE))
    os.sync()


def sync(folder):
    """What one contender does itself, and the other leaves to the system."""
    if PLAN["with"] != "Holdfast":
        from bench.durable import sync_tree

        sync_tree(Path(folder))


def nbytes():
    from bench.durable import nbytes_of

    return nbytes_of(Path(".metaflow"))


def saved(**options):
    """Seconds until a save of the step's folder has returned, and until it is durable."""
    start = time.perf_counter()
    current.checkpoint.save(**options)
    returned = time.perf_counter() - start
    if PLAN["local"]:
        sync(".metaflow")
    return returned, time.perf_counter() - start


def of_size(mib):
    """Five saves of one file, and one more when all of it has changed."""
    folder = current.checkpoint.directory
    write(folder, mib, seed=0)
    before = nbytes()
    five = [saved(name=f"of-{mib}") for _ in range(5)]
    disk = nbytes() - before
    write(folder, mib, seed=1)
    changed = saved(name=f"of-{mib}")
    return {
        "five": sum(durable for _, durable in five),
        "five_returned": sum(returned for returned, _ in five),
        "changed": changed[1],
        "changed_returned": changed[0],
        "disk": disk,
    }


def of_one_byte(count):
    """The median of saves of one byte."""
    current.checkpoint.refresh_directory()  # what is in it is saved, too
    file = Path(current.checkpoint.directory, "byte")
    took = []
    for number in range(count):
        file.write_bytes(bytes([number % 256]))
        took.append(saved(name="byte")[0])
    return statistics.median(took[1:])


def listed(count):
    """Seconds that a list of `count` saves takes, five times."""
    current.checkpoint.refresh_directory()  # what is in it is saved, too
    file = Path(current.checkpoint.directory, "byte")
    for number in range(count):
        file.write_bytes(bytes([number % 256]))
        current.checkpoint.save(name="listed", metadata={"number": number})
    took = []
    for _ in range(5):
        start = time.perf_counter()
        found = len(current.checkpoint.list(name="listed"))
        took.append(time.perf_counter() - start)
        if found != count:
            raise AssertionError(f"{found} of {count} are listed")
    return took


class Saves(FlowSpec):
    @checkpointed
    @step
    def start(self):
        self.found = {}
        if PLAN["sizes"]:
            self.found["sizes"] = [of_size(mib) for mib in PLAN["sizes"]]
        if PLAN["bytes"]:
            self.found["byte"] = of_one_byte(PLAN["bytes"])
        if PLAN["listed"]:
            self.found["list"] = listed(PLAN["listed"])
        self.returned_at = time.time()
        self.next(self.end)

    @step
    def end(self):
        began_at = time.time()
        Path(PLAN["result"]).write_text(
            json.dumps({**self.found, "tail": began_at - self.returned_at})
        )


if __name__ == "__main__":
    Saves()
