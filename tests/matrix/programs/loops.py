"""Programs for the rules of where a run is in its loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.optim import lr_scheduler

import holdfast
from tests.matrix.job import Augmented, Job, Plain


def rule_01_iterators(job: Job) -> None:
    """Rule 1: loops are advanced by hand, and all stay alive, so nothing is collected."""
    net, optimizer, data = job.parts()
    run = job.run().track(net=net, optimizer=optimizer, data=data)
    kept: list[Any] = []
    job.place("before")
    epochs = run.epochs(2)
    while (epoch := next(epochs, None)) is not None:
        job.place("prologue")
        kept.append(run.batches(data))
        for batch in iter(lambda: next(kept[-1], None), None):
            job.step(run, net, optimizer, batch)
        job.note(epoch, job.draw())
        job.place("tail")
    job.end(run, net=net, optimizer=optimizer)


def rule_02_position(job: Job) -> None:
    """Rule 2: three loops deep, with prologues and tails at each depth."""
    net, optimizer, data = job.parts(dataset=Augmented(8))
    run = job.run().track(net=net, optimizer=optimizer, data=data)
    for epoch in run.epochs(2):
        noise = job.draw()
        job.place("prologue")
        for part in run.range(2):
            more = job.draw()
            job.place("prologue")
            for batch in run.batches(data):
                job.step(run, net, optimizer, batch)
                job.note(epoch, part, noise, more)
            job.note(job.draw())
            job.place("tail")
        job.note("tail", noise)
        job.place("tail")
    job.end(run, net=net, optimizer=optimizer)


def rule_03_prologue(job: Job) -> None:
    """Rule 3: a prologue that draws, changes what is tracked, and leaves locals behind."""
    net, optimizer, data = job.parts()
    table = np.zeros(3)
    run = job.run().track(net=net, optimizer=optimizer, data=data, table=table)
    job.place("before")
    for epoch in run.epochs(2):
        job.place("prologue")
        drawn = job.draw()
        table += np.random.permutation(3) + epoch
        with torch.no_grad():
            next(net.parameters()).mul_(0.9)
        for group in optimizer.param_groups:
            group["weight_decay"] += 0.01 * drawn[0]
        job.note("prologue", drawn)
        job.place("prologue")
        for batch in run.batches(data):
            job.step(run, net, optimizer, batch)
            job.note(drawn, table)
    job.end(run, net=net, optimizer=optimizer, table=table)


def rule_04_tail(job: Job) -> None:
    """Rule 4: a tail that draws, steps a scheduler and changes weights; a save at any step."""
    net, optimizer, data = job.parts()
    scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    run = job.run(every=2).track(net=net, optimizer=optimizer, scheduler=scheduler, data=data)
    state = run.box(loss=0.0)
    for _ in run.epochs(2):
        for batch in run.batches(data):
            state.loss = job.step(run, net, optimizer, batch)
        job.place("tail")
        scheduler.step()
        job.note("tail", state.loss, job.draw(), scheduler.get_last_lr())
        job.place("tail")
        with torch.no_grad():
            next(net.parameters()).add_(torch.rand(4))
        run.log(val_loss=job.evaluate(net))
        job.place("tail")
    job.end(run, net=net, optimizer=optimizer, scheduler=scheduler)


def rule_05_variables(job: Job) -> None:
    """Rule 5: what locals would forget is in attributes that `Variables` keeps."""
    net, optimizer, data = job.parts()

    class Trainer:
        average, patience, hidden = 0.0, 3, None

    me: Any = Trainer()
    vars(me).update(average=0.0, patience=3, hidden=torch.zeros(1))
    kept = holdfast.Variables(vars(me), "average", "patience", "hidden")
    run = job.run(every=2).track(net=net, optimizer=optimizer, kept=kept)
    for _ in run.epochs(2):
        for batch in run.batches(data):
            loss = job.step(run, net, optimizer, batch)
            me.average = 0.9 * me.average + loss
            me.hidden = torch.cat([me.hidden[-1:], torch.rand(run.batch + 1)])
            job.place("body")
        me.patience -= me.average > 0.5
        job.note(me.average, me.patience, me.hidden)
        job.place("tail")
    job.end(run, net=net, optimizer=optimizer, kept=vars(me))


def rule_06_break_of_an_inner_loop(job: Job) -> None:
    """Rules 6, 12: an inner loop that is left early, and another one behind it."""
    net, optimizer, data = job.parts()
    run = job.run().track(net=net, optimizer=optimizer, data=data)
    for epoch in run.epochs(3):
        job.place("prologue")
        for batch in run.batches(data):
            if run.batch == 2 - epoch:
                job.place("body")
                job.note("left", batch, job.draw())
                break
            job.step(run, net, optimizer, batch)
        job.place("between")
        job.note(job.draw())
        for index in run.range(2):
            job.saw(run, index)
            job.note(index, job.draw())
            job.place("body")
        job.place("tail")
    job.end(run, net=net, optimizer=optimizer)


def rule_07_early_stopping(job: Job) -> None:
    """Rule 7: `break` out of the outermost loop of a `with` block finishes the run."""
    net, optimizer, data = job.parts()
    with job.run() as run:
        run.track(net=net, optimizer=optimizer, data=data)
        state = run.box(best=float("inf"), stop=False)
        for epoch in run.epochs(9):
            for batch in run.batches(data):
                state.best = min(state.best, job.step(run, net, optimizer, batch))
            job.note(epoch, state.best)
            job.place("tail")
            state.stop = epoch == 1
            if state.stop:
                break
        job.place("after")
    job.end(run, net=net, optimizer=optimizer, box=[state.best])


def rule_07_return(job: Job) -> None:
    """Rule 7: `return` out of nested loops, and `run.finish()`."""
    net, optimizer, data = job.parts()
    run = job.run().track(net=net, optimizer=optimizer, data=data)

    def fit() -> None:
        for epoch in run.epochs(9):
            job.place("prologue")
            for batch in run.batches(data):
                if (epoch, run.batch) == (1, 2):
                    return
                job.step(run, net, optimizer, batch)

    fit()
    job.place("after")
    run.finish()
    job.end(run, net=net, optimizer=optimizer)


def rule_07_left_unfinished(job: Job) -> None:
    """Rule 7: without `with` or `finish` the next start goes on after the last whole item."""
    net, optimizer, data = job.parts()
    run = job.run().track(net=net, optimizer=optimizer, data=data)
    for batch in run.batches(data):
        if run.step == 2:
            break
        job.step(run, net, optimizer, batch)
    job.end(run, net=net, optimizer=optimizer)


def rule_08_continue(job: Job) -> None:
    """Rule 8: `continue` completes the step, in both loops."""
    net, optimizer, data = job.parts()
    run = job.run().track(net=net, optimizer=optimizer, data=data)
    for epoch in run.epochs(3):
        job.place("prologue")
        if epoch == 1:
            job.saw(run, job.draw())
            continue
        for batch in run.batches(data):
            if run.batch == 1:
                job.saw(run, batch)
                job.place("body")
                continue
            job.step(run, net, optimizer, batch)
        job.note(epoch, job.draw())
    job.end(run, net=net, optimizer=optimizer)


def rule_09_exceptions(job: Job) -> None:
    """Rule 9: a body fails half-way, in a `with` block; some failures the program survives."""
    net, optimizer, data = job.parts()
    with job.run() as run:
        run.track(net=net, optimizer=optimizer, data=data)
        for _ in run.epochs(2):
            for batch in run.batches(data):
                try:
                    job.step(run, net, optimizer, batch)
                    if run.batch == 1:
                        raise MemoryError
                except MemoryError:
                    job.note("once more", job.draw())
            job.note(job.draw())
            job.place("tail")
    job.end(run, net=net, optimizer=optimizer)


def rule_10_without_with(job: Job) -> None:
    """Rules 10, 30: nothing but the loop saves; the state has sets and dicts of words."""
    net, optimizer, data = job.parts()
    words: dict[str, Any] = {"seen": set(), "counts": {}}
    run = job.run(every=None).track(net=net, optimizer=optimizer, data=data, words=words)
    job.place("before")
    for epoch in run.epochs(2):
        for batch in run.batches(data):
            job.step(run, net, optimizer, batch)
            word = f"word {epoch} {run.batch}"
            words["seen"].add(word)
            words["counts"][word] = len(words["seen"])
        job.place("tail")
    job.place("after")
    for index in run.range(2):
        job.saw(run, index)
        job.note(job.draw())
        job.place("body")
    job.end(run, net=net, optimizer=optimizer, words=words)


def rule_11_loops_that_do_not_count(job: Job) -> None:
    """Rules 11, 14: loops with `count=False` in bodies and tails."""
    net, optimizer, data = job.parts()
    val = job.loader(Augmented(8))
    run = job.run().track(net=net, optimizer=optimizer, data=data)
    for _ in run.epochs(2):
        job.place("prologue")
        for index in run.range(2, count=False):
            job.note("warm", index, job.draw())
            job.place("body")
        for batch in run.batches(data):
            job.step(run, net, optimizer, batch)
        job.place("between")
        for batch in run.batches(val, count=False):
            job.note("val", batch, job.evaluate(net, [batch]), job.draw())
            job.place("body")
        job.place("tail")
    job.end(run, net=net, optimizer=optimizer)


def rule_12_loops_by_order(job: Job) -> None:
    """Rule 12: three loops in a row, and two outermost ones, matched by their order."""
    net, optimizer, data = job.parts(dataset=Augmented(8))
    more = job.loader(Augmented(8))
    run = job.run().track(net=net, optimizer=optimizer)
    for index in run.range(2):
        job.place("body")
        job.saw(run, index)
        job.note("warm-up", job.draw())
    middle = job.draw()
    job.place("before")
    for _ in run.epochs(2):
        drawn = job.draw()
        job.place("prologue")
        for batch in run.batches(data):
            job.step(run, net, optimizer, batch)
        drawn += job.draw()
        job.place("between")
        for batch in run.batches(more):
            job.step(run, net, optimizer, batch)
            job.note(middle, drawn)
        job.place("between")
        for index in run.range(2):
            job.saw(run, index)
            job.note(job.draw())
            job.place("body")
        job.note("tail", middle, drawn)
        job.place("tail")
    job.end(run, net=net, optimizer=optimizer)


def rule_12_loops_by_name(job: Job) -> None:
    """Rule 12: a loop that runs in some epochs only has a name; so have two stages."""
    net, optimizer, data = job.parts(dataset=Augmented(8))
    extra = job.loader(Augmented(8))
    run = job.run().track(net=net, optimizer=optimizer)
    for _ in run.epochs(1, name="pretrain"):
        for batch in run.batches(data):
            job.step(run, net, optimizer, batch)
        job.place("tail")
    noise = job.draw()
    job.place("before")
    for epoch in run.epochs(3, name="tune"):
        job.place("prologue")
        if epoch % 2:
            for batch in run.batches(extra, name="extra"):
                job.step(run, net, optimizer, batch)
            job.place("between")
        for batch in run.batches(data):
            job.step(run, net, optimizer, batch)
            job.note(noise)
        job.note(epoch, job.draw())
    job.end(run, net=net, optimizer=optimizer)


def rule_14_evaluation(job: Job) -> None:
    """Rule 14: an evaluation that the run knows nothing of, and one with `run.guard`."""
    net, optimizer, data = job.parts()
    val = job.loader(Plain(8), shuffle=False, generator=torch.Generator())
    run = job.run(every=2).track(net=net, optimizer=optimizer, data=data)
    for _ in run.epochs(2):
        for batch in run.batches(data):
            job.step(run, net, optimizer, batch)
        job.place("tail")
        total = 0.0
        for batch in run.guard(val):
            total += job.evaluate(net, [batch])
            job.place("tail")
        job.note(total, job.evaluate(net, val))
        run.log(val_loss=total)
    job.end(run, net=net, optimizer=optimizer)
