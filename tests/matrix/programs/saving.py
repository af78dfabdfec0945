"""Programs for the rules of saves, gradients, metrics and the box."""

from __future__ import annotations

import threading

import torch
from torch.optim import lr_scheduler

import holdfast
from tests.matrix.job import Job


def rule_15_gradient_accumulation(job: Job) -> None:
    """Rule 15: one step of the optimizer for two batches, across the ends of epochs."""
    net, optimizer, data = job.parts()
    run = job.run().track(net=net, optimizer=optimizer, data=data)
    optimizer.zero_grad()
    for _ in run.epochs(3):
        for batch in run.batches(data):
            job.place("body")
            loss = job.loss(net, batch)
            (loss / 2).backward()
            job.place("body")
            if run.step % 2:
                optimizer.step()
                optimizer.zero_grad()
            job.saw(run, batch, loss.item())
            job.place("body")
        job.note([p.grad for p in net.parameters()])
        job.place("tail")
    job.place("after")
    optimizer.step()  # what is left over
    job.end(run, net=net, optimizer=optimizer)


def rule_16_metrics_after_a_loop(job: Job) -> None:
    """Rules 16, 18: metrics of tails, prologues and from behind the outermost loop."""
    net, optimizer, data = job.parts()
    run = job.run(every=1, keep=None).track(net=net, optimizer=optimizer, data=data)
    for epoch in run.epochs(2):
        if epoch:
            run.log(before=job.evaluate(net))
        job.place("prologue")
        for batch in run.batches(data):
            job.step(run, net, optimizer, batch)
        job.place("tail")
        run.log(val_loss=torch.tensor(job.evaluate(net)))
        job.place("tail")
    run.log(test_loss=job.evaluate(net))
    job.place("after")
    # A step that was saved twice is its newest commit.
    found = {info.step: sorted(info.metrics.items()) for info in run.manager.checkpoints()}
    job.say({step: metrics for step, metrics in found.items() if step > 0})
    job.end(run, net=net, optimizer=optimizer)


def rule_17_keep_best(job: Job) -> None:
    """Rules 17, 16: only a best metric saves, in a tail; the box has the history."""
    net, optimizer, data = job.parts()
    with job.run(every=None, keep="last=1 best=1:val_loss", on_finish="final best=1") as run:
        run.track(net=net, optimizer=optimizer, data=data)
        state = run.box(best=float("inf"), history=[])
        for epoch in run.epochs(4):
            for batch in run.batches(data):
                job.step(run, net, optimizer, batch)
            val = abs(1.5 - epoch) + job.evaluate(net) / 1e3
            state.best = min(state.best, val)
            state.history.append((epoch, val))
            run.log(val_loss=val)
            job.place("tail")
    with holdfast.CheckpointManager(job.address) as manager:
        best = manager.best("val_loss")
    job.say("best", best and best.step, state.best)
    job.end(run, net=net, optimizer=optimizer, history=state.history)


def rule_18_a_step_saved_twice(job: Job) -> None:
    """Rules 18, 11: steps that are saved once more after a tail that changed the state."""
    net, optimizer, data = job.parts()
    run = job.run(every=None).track(net=net, optimizer=optimizer, data=data)
    for epoch in run.range(2, count=False):
        for batch in run.batches(data):
            run.save()
            job.step(run, net, optimizer, batch)
        run.save()
        job.note("tail", epoch, job.draw())
        job.place("tail")
    job.end(run, net=net, optimizer=optimizer)


def rule_19_every_epoch(job: Job) -> None:
    """Rule 19: saves at the ends of epochs only, behind their tails."""
    net, optimizer, data = job.parts()
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.8)
    run = job.run(every="epoch").track(net=net, optimizer=optimizer, scheduler=scheduler)
    for _ in run.epochs(3):
        job.place("prologue")
        for batch in run.batches(data):
            job.step(run, net, optimizer, batch)
        scheduler.step()
        job.place("tail")
        job.note(job.draw(), scheduler.get_last_lr())
    job.end(run, net=net, optimizer=optimizer, scheduler=scheduler)


def rule_20_box(job: Job) -> None:
    """Rules 20, 5: history and best values in the box; containers stay the same objects."""
    net, optimizer, data = job.parts()
    run = job.run(every=2).track(net=net, optimizer=optimizer, data=data)
    state = run.box(best=float("inf"), history=[], seen=set(), counts={}, hidden=None)
    history, seen = state.history, state.seen
    for epoch in run.epochs(2):
        for batch in run.batches(data):
            loss = job.step(run, net, optimizer, batch)
            history.append((epoch, run.batch, loss))
            seen.add(run.batch)
            state.hidden = torch.rand(3) if state.hidden is None else state.hidden.roll(1) + loss
            state.counts[run.batch] = state.counts.get(run.batch, 0) + 1
        state.best = min(state.best, history[-1][2])
        job.note(state.best, len(history))
        job.place("tail")
    assert state.history is history
    box = [state.best, history, seen, state.counts, state.hidden]
    job.end(run, net=net, optimizer=optimizer, box=box)


def rule_29_threads(job: Job) -> None:
    """Rule 29: another thread logs, and asks for saves."""
    net, optimizer, data = job.parts()
    run = job.run(every=None).track(net=net, optimizer=optimizer, data=data)

    def report(value: float) -> None:
        run.log(seen=value)
        run.save()

    for _ in run.epochs(2):
        for batch in run.batches(data):
            loss = job.step(run, net, optimizer, batch)
            thread = threading.Thread(target=report, args=(loss,))
            thread.start()
            thread.join()
            job.place("body")
        job.place("tail")
    job.end(run, net=net, optimizer=optimizer)
