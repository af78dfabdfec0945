"""The scheduler is not tracked."""

import torch

import holdfast

torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3)

run = holdfast.Run("runs/scheduler")
run.track(model=model, optimizer=optimizer)
for _step in run.range(100):
    loss = model(torch.randn(4, 3)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    run.log(loss=loss)
