"""Trains with PyTorch on two nodes. In its first attempt node 0 dies after the second epoch, in
its second node 1 after the fourth. Each node ends with what a training that was never interrupted
does."""

from __future__ import annotations

import os

from metaflow import FlowSpec, checkpoint, current, parallel, retry, step
from telling import die, tell

DIES = {(0, 2): 0, (1, 4): 1}
"""Which node does, by attempt and epoch."""


class Replicas(FlowSpec):
    @step
    def start(self):
        self.next(self.fit, num_parallel=2)

    @retry(times=2, minutes_between_retries=0)
    @checkpoint
    @parallel
    @step
    def fit(self):
        import torch
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        rank, attempt = current.parallel.node_index, current.retry_count
        dist.init_process_group(
            "gloo",
            init_method=f"file://{os.environ['TOLD']}-{attempt}",
            rank=rank,
            world_size=current.parallel.num_nodes,
        )

        def built():
            torch.manual_seed(rank)
            model = torch.nn.Linear(4, 1)
            return model, torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)

        def train(model, optimizer, epochs, after):
            together = DistributedDataParallel(model)
            for epoch in epochs:
                optimizer.zero_grad()
                x = torch.full((2, 4), 1.0 + rank + epoch % 3)
                (together(x) ** 2).mean().backward()
                optimizer.step()
                after(epoch)
            return [parameter.tolist() for parameter in model.parameters()]

        def save_or_die(epoch):
            if rank == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, file)
                current.checkpoint.save(metadata={"epoch": epoch})
            dist.barrier()
            if DIES.get((attempt, epoch)) == rank:
                die()

        model, optimizer = built()
        file = os.path.join(current.checkpoint.directory, "state.pt")
        loaded = 0
        if current.checkpoint.is_loaded:  # on every node
            state = torch.load(file)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            loaded = current.checkpoint.info.metadata["epoch"]
        tell(rank=rank, attempt=attempt, loaded=loaded)
        weights = train(model, optimizer, range(loaded + 1, 7), save_or_die)
        never_interrupted = train(*built(), range(1, 7), lambda epoch: None)
        tell(rank=rank, same=weights == never_interrupted)
        dist.destroy_process_group()
        self.next(self.joined)

    @step
    def joined(self, inputs):
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    Replicas()
