"""State of torch's that changes and is in no checkpoint is named; aliases of saved state are
not. See tests/run/test_unsaved.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from holdfast.torch import contents
from tests.support.unsaved import told

Capture = pytest.CaptureFixture[str]

SETUP = """
from copy import deepcopy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

def step(x):
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss
"""
TRAIN = """
run = Run().track(model=model, optimizer=optimizer)
for _ in run.range(6):
    loss = step(torch.randn(5, 4))
"""

NAMED = {
    "a dict of tensors": (
        """
ema = {name: value.clone() for name, value in model.state_dict().items()}
run = Run().track(model=model, optimizer=optimizer)
for _ in run.range(6):
    step(torch.randn(5, 4))
    for name, value in model.state_dict().items():
        ema[name].lerp_(value, 0.1) if value.is_floating_point() else ema[name].copy_(value)
""",
        ["ema (dict)"],
    ),
    "an average of the weights that refers to the model": (
        """
class EMA:
    def __init__(self, model):
        self.model, self.shadow = model, [p.detach().clone() for p in model.parameters()]
    def update(self):
        self.shadow = [0.9 * old + new.detach()
                       for old, new in zip(self.shadow, self.model.parameters())]

ema = EMA(model)
"""
        + TRAIN
        + "    ema.update()\n",
        ["ema.shadow (list)"],
    ),
    "an AveragedModel": (
        "ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))"
        + TRAIN
        + "    ema.update_parameters(model)\n",
        ["ema (AveragedModel)"],
    ),
    "a teacher": (
        "teacher = deepcopy(model)"
        + TRAIN
        + "    with torch.no_grad():\n"
        + "        for old, new in zip(teacher.parameters(), model.parameters()):\n"
        + "            old.lerp_(new, 0.1)\n",
        ["teacher (Sequential)"],
    ),
    "a module that its optimizer's line does not name": (
        """
net = nn.Linear(2, 2)
extra = torch.optim.SGD(net.parameters(), lr=0.1)
"""
        + TRAIN
        + "    net(torch.ones(2)).sum().backward()\n    extra.step()\n",
        ["net (Linear)"],
    ),
    "prefetched tensors and a generator": (
        """
def get_batch():
    return torch.randint(9, (3, 4), generator=generator)

generator = torch.Generator().manual_seed(1)
X = get_batch()
run = Run().track(model=model, optimizer=optimizer)
for _ in run.range(6):
    step(X.float())
    X = get_batch()
""",
        ["generator (random generator of torch)", "X (int64[3, 4])"],
    ),
    "copies of what an optimizer holds, and what it holds beside its state": (
        """
class Adam(torch.optim.Adam):
    def __init__(self, *args):
        super().__init__(*args)
        self.slow = torch.zeros(3)

optimizer = Adam(model.parameters())
step(torch.randn(5, 4))
copied = {name: moment.clone() for name, moment in optimizer.state[model[0].weight].items()}
slow = optimizer.slow
"""
        + TRAIN
        + """
    optimizer.slow += 1
    for name, moment in optimizer.state[model[0].weight].items():
        copied[name] += moment
""",
        ["copied (dict)", "slow (float32[3])"],
    ),
    "a moment of another optimizer": (
        """
other = torch.optim.Adam(model.parameters())
model(torch.randn(5, 4)).square().mean().backward()
other.step()
moment = other.state[model[0].weight]["exp_avg"]
"""
        + TRAIN
        + "    other.step()\n",
        ["moment (float32[3, 4])"],
    ),
    "a hidden state": (
        """
rnn = nn.LSTM(4, 3)

def train(run):
    hidden = (torch.zeros(1, 3), torch.zeros(1, 3))
    for _ in run.range(4):
        output, hidden = rnn(torch.randn(2, 4), hidden)
        hidden = tuple(part.detach() for part in hidden)

run = Run(every="epoch").track(rnn=rnn)
for _ in run.epochs(2):
    train(run)
""",
        ["hidden (tuple)"],
    ),
}


@pytest.mark.parametrize(("script", "names"), NAMED.values(), ids=NAMED)
def test_what_is_named(script: str, names: list[str], capfd: Capture) -> None:
    assert sorted(told(SETUP + script, capfd, torch=torch, nn=nn)) == sorted(names)


SILENT = {
    "the same tensors under other names": """
params = list(model.parameters())
first, view, state = params[0], model[0].weight[1:], model.state_dict()
flat = {"bias": model[0].bias.detach().numpy()}
grads = [p.grad for p in params]
for p in params:
    p.grad = torch.zeros_like(p)
grads = [p.grad for p in params]
moments = optimizer.state
"""
    + TRAIN,
    "moments of an optimizer that is tracked": """
step(torch.randn(5, 4))
class Probe:
    def __init__(self):
        self.moments = [slots["exp_avg"] for slots in optimizer.state.values()]

slots = optimizer.state[model[0].weight]
moment, probe = slots["exp_avg"], Probe()
flat = {f"{n}.{name}": value for n, of in enumerate(optimizer.state.values())
        for name, value in of.items()}
row, turned, array = moment[1:], moment.T, moment.numpy()
"""
    + TRAIN,
    "the state of an optimizer in an object that is tracked": """
class Trainer:
    def __init__(self):
        self.optimizer = optimizer
    def state_dict(self):
        return {"optimizer": self.optimizer.state_dict()}
    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["optimizer"])

step(torch.randn(5, 4))
moment = optimizer.state[model[0].weight]["exp_avg"]
run = Run().track(model=model, trainer=Trainer())
for _ in run.range(6):
    step(torch.randn(5, 4))
""",
    "moments that the first step makes": """
moment, moments, views = None, {}, []
"""
    + TRAIN
    + """
    if moment is None:
        moment = optimizer.state[model[0].weight]["exp_avg"]
        moments.update(optimizer.state[model[0].weight])
        views.extend(moment)
""",
    "what an optimizer of another kind holds in lists": """
optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2, history_size=2)
def step(x):
    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss
    optimizer.step(closure)

step(torch.randn(5, 4))
state = optimizer.state[model[0].weight]
direction, differences = state["d"], list(state["old_dirs"])
"""
    + TRAIN.replace("loss = ", ""),
    "moments of very many parameters": """
many = [nn.Parameter(torch.zeros(2)) for _ in range(4200)]
optimizer.add_param_group({"params": many})
model.extend([nn.Module()])
for number, parameter in enumerate(many):
    model[-1].register_parameter(f"p{number}", parameter)
    parameter.grad = torch.ones(2)
optimizer.step()
moment, parameter = optimizer.state[many[0]]["exp_avg"], many[1]
run = Run().track(model=model, optimizer=optimizer)
for _ in run.range(6):
    for used in many[:2]:
        used.grad = torch.ones(2)
    optimizer.step()
""",
    "wrappers": """
wrapped = nn.DataParallel(model)
class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = wrapped
holder = Holder()
"""
    + TRAIN,
    "a compiled model": "compiled = torch.compile(model, backend='eager')\n"
    + TRAIN.replace("step(", "compiled(torch.randn(5, 4)); step("),
    "an average that is tracked": """
ema = AveragedModel(model)
run = Run().track(model=model, optimizer=optimizer, ema=ema)
for _ in run.range(6):
    step(torch.randn(5, 4))
    ema.update_parameters(model)
""",
    "what has a line of its own": """
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
scaler = torch.amp.GradScaler("cpu")
run = Run().track(model=model)
for _ in run.range(6):
    scaler.scale(model(torch.randn(5, 4)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
""",
    "loaders and what they draw from": """
generator = torch.Generator().manual_seed(1)
data = TensorDataset(torch.randn(12, 4))
loader = DataLoader(data, 3, shuffle=True, generator=generator)
x, = next(iter(loader))
loss = step(x)
run = Run().track(model=model, optimizer=optimizer)
for epoch in run.epochs(2):
    for x, in run.batches(loader):
        loss = step(x)
        run.log(loss=loss)
    print(loss)
""",
    "buffers that each body fills": """
static, noise = torch.zeros(5, 4), torch.zeros(5, 4)
"""
    + TRAIN
    + """
    static.copy_(torch.randn(5, 4))
    noise.normal_()
    step(static + noise)
""",
    "meters": """
class Accuracy(nn.Module):
    def __init__(self):
        super().__init__()
        self.hits = torch.zeros(3)
        self.register_buffer("total", torch.zeros(3), persistent=False)

accuracy, running = Accuracy(), torch.zeros(1)
"""
    + TRAIN
    + """
    accuracy.hits += 1
    accuracy.total += 1
    running += loss.detach()
""",
    "a frozen teacher": "teacher = deepcopy(model).eval()\n"
    + TRAIN
    + "    teacher(torch.randn(5, 4))\n",
    "tensors that intercept operators": """
class Wary(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(function)

wary = torch.zeros(3).as_subclass(Wary)
lazy, sparse, meta = nn.LazyLinear(3), torch.eye(3).to_sparse(), torch.zeros(3, device="meta")
"""
    + TRAIN,
}


@pytest.mark.parametrize("script", SILENT.values(), ids=SILENT)
def test_what_is_not_named(script: str, capfd: Capture) -> None:
    assert told(SETUP + script, capfd, torch=torch, nn=nn) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3, 4),
        lambda: torch.zeros(3, 4).T,
        lambda: torch.zeros(3, 4)[:, ::2],
        lambda: torch.zeros(300, 400),
        lambda: torch.zeros(400, 300).T,
        lambda: torch.zeros(2, 50, 40, 30).contiguous(memory_format=torch.channels_last),
        lambda: torch.zeros(3, dtype=torch.complex128).conj(),
        lambda: torch.zeros(3, dtype=torch.bfloat16),
        lambda: torch.zeros(3, dtype=torch.float8_e5m2),
        lambda: torch.zeros(3, dtype=torch.bool),
        lambda: torch.zeros(3, 4).requires_grad_(),
    ],
)
def test_samples_differ_where_elements_do(make: Any) -> None:
    tensor, same = make(), make()
    sample = contents.sample(tensor, 4096)
    assert sample is not None
    assert sample == contents.sample(same, 4096)
    with torch.no_grad():
        tensor[(0,) * tensor.ndim] = 1
    changed = contents.sample(tensor, 4096)
    assert changed is not None
    assert changed[0] == sample[0]
    assert changed[1] != sample[1]
    assert len(changed[1]) <= 4096


def test_of_some_tensors_there_is_no_sample() -> None:
    assert contents.sample(torch.zeros(1), 4096) is None  # a number
    assert contents.sample(torch.zeros(300, 400)[:, ::2], 4096) is None  # large, with gaps
    assert contents.sample(torch.zeros(3, device="meta"), 4096) is None
    assert contents.sample([1, 2], 4096) is None
