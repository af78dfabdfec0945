"""Programs for the rules of what is tracked, and of starting again with something else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import lr_scheduler, swa_utils

from tests.matrix.job import Augmented, Job


def rule_21_wrappers(job: Job) -> None:
    """Rule 21: generators around loops, a model in a wrapper, and a name tracked again."""
    net, optimizer, data = job.parts()
    average = swa_utils.AveragedModel(net)
    run = job.run().track(net=torch.nn.Identity(), optimizer=optimizer, average=average)
    run.track(net=net)

    shown: list[int] = []

    def progress(loop: Any) -> Iterator[Any]:
        for item in loop:
            yield item
            shown.append(run.step)

    for _ in progress(run.epochs(2)):
        job.place("prologue")
        for batch in progress(progress(run.batches(data))):
            job.step(run, net, optimizer, batch)
            average.update_parameters(net)
            job.place("body")
        job.place("tail")
    job.end(run, net=net, optimizer=optimizer, average=average)


def rule_21_a_run_per_fold(job: Job) -> None:
    """Rule 21: a model that is built anew for each fold has a run of its own."""
    for fold in range(2):
        net, optimizer, data = job.parts(dataset=Augmented(8))
        with job.run(sub=f"/fold{fold}") as run:
            run.track(net=net, optimizer=optimizer, data=data)
            for _ in run.epochs(2):
                for batch in run.batches(data):
                    job.step(run, net, optimizer, batch)
                job.place("tail")
        job.say(fold, sorted(run.metrics.items()))
        job.place("before")
    job.end(run, net=net, optimizer=optimizer)  # type: ignore[possibly-undefined]


def rule_22_late_track(job: Job) -> None:
    """Rule 22: an average that is built and tracked in the second epoch."""
    net, optimizer, data = job.parts()
    run = job.run(late=["average"]).track(net=net, optimizer=optimizer, data=data)
    found: list[Any] = []

    def average() -> Any:
        if not found:
            found.append(swa_utils.AveragedModel(net))
            run.track(average=found[0])
        return found[0]

    for epoch in run.epochs(3):
        if epoch >= 1:
            average()
        job.place("prologue")
        for batch in run.batches(data):
            job.step(run, net, optimizer, batch)
            if epoch >= 1:
                average().update_parameters(net)
        job.place("tail")
    job.end(run, net=net, optimizer=optimizer, average=average())


def rule_23_renamed(job: Job) -> None:
    """Rule 23: the processes that follow track the model under another name."""
    net, optimizer, data = job.parts()
    if job.attempt == 0:
        run = job.run().track(net=net, optimizer=optimizer, data=data)
    else:
        run = job.run(rename={"net": "model"}).track(model=net, optimizer=optimizer, data=data)
    for _ in run.epochs(2):
        for batch in run.batches(data):
            job.step(run, net, optimizer, batch)
        job.note(job.draw())
        job.place("tail")
    job.end(run, net=net, optimizer=optimizer)


def rule_24_more_epochs(job: Job) -> None:
    """Rule 24: the first process was to train one epoch; those that follow train three."""
    net, optimizer, data = job.parts(generator=torch.Generator().manual_seed(4))
    run = job.run().track(net=net, optimizer=optimizer, data=data)
    for _ in run.epochs(3 if job.attempt else 1):
        job.place("prologue")
        for batch in run.batches(data):
            job.step(run, net, optimizer, batch)
        job.note(job.draw())
        job.place("tail")
    job.end(run, net=net, optimizer=optimizer)


def rule_25_other_settings(job: Job) -> None:
    """Rules 25, 24: a finished run is trained further at another rate, with a new schedule."""
    parts = job.parts()
    net, data = parts[0], parts[2]
    for rate, epochs in ((0.1, 1), (0.02, 3)):
        optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
        run = job.run(override=["optimizer", "scheduler"])
        if epochs == 1 and run.resumed is not None and run.resumed.step >= 3:
            run.close()
            continue
        run.track(net=net, optimizer=optimizer, scheduler=scheduler, data=data)
        for _ in run.epochs(epochs):
            for batch in run.batches(data):
                job.step(run, net, optimizer, batch)
                scheduler.step()
            job.note(scheduler.get_last_lr(), job.draw())
            job.place("tail")
        job.place("before")
    job.end(run, net=net, optimizer=optimizer, scheduler=scheduler)  # type: ignore[possibly-undefined]


def rule_28_a_cell_that_runs_again(job: Job) -> None:
    """Rule 28: the Run is made anew, but model, optimizer and loader are those of the cell
    before, with all that happened to them since the checkpoint."""
    run = job.run()
    if not job.kernel or run.resumed is None:
        net, optimizer, data = job.parts(generator=torch.Generator().manual_seed(9))
        job.kernel.update(net=net, optimizer=optimizer, data=data)
    net, optimizer, data = (job.kernel[name] for name in ("net", "optimizer", "data"))
    run.track(net=net, optimizer=optimizer, data=data, order=data.generator)
    for _ in run.epochs(2):
        job.place("prologue")
        for batch in run.batches(data):
            job.step(run, net, optimizer, batch)
        job.note(job.draw())
        job.place("tail")
    job.end(run, net=net, optimizer=optimizer)
