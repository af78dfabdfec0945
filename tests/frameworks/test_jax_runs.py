"""Training in JAX that is killed at any place and started again ends as if left alone."""

from __future__ import annotations

import inspect
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import holdfast
from holdfast.errors import StateError, StructureMismatch, UsageError
from holdfast.jax import arrays
from tests.support.interrupted import check_stopped_and_killed
from tests.support.jax_values import bits
from tests.support.jobs import (
    Countdown,
    copied,
    fresh_address,
    kill_everywhere,
    process,
    steps_of,
)

DATA = np.random.default_rng(1).normal(size=(6, 8, 3)).astype("f4")
BATCHES = DATA[:3]


def hidden(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["a"]["w"] + params["a"]["b"]) @ params["head"][0]


def fresh(seed: int) -> Any:
    one, two = jax.random.split(jax.random.key(seed))
    return {
        "a": {"w": jax.random.normal(one, (3, 5)), "b": jnp.zeros(5)},
        "head": [jax.random.normal(two, (5, 1))],
    }


OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.inject_hyperparams(optax.adamw)(optax.cosine_decay_schedule(1e-2, 20)),
)


@partial(jax.jit, donate_argnums=(0, 1))
def step(params: Any, state: Any, key: Any, x: Any) -> Any:
    def loss(params: Any) -> Any:
        kept = jax.random.bernoulli(key, 0.8, x.shape)
        return jnp.mean((hidden(params, x * kept) - x.sum(1, keepdims=True)) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


def train(
    address: str,
    die: Countdown,
    trace: list[Any],
    *,
    seed: int = 0,
    mesh: int = 0,
    epochs: int = 2,
    **options: Any,
) -> Any:
    params = fresh(seed)
    if mesh:
        spec = jax.sharding.PartitionSpec()
        devices = jax.sharding.Mesh(np.array(jax.devices()[:mesh]), ("data",))
        params = jax.device_put(params, jax.sharding.NamedSharding(devices, spec))
    with holdfast.Run(address, quiet=True, **{"every": "2steps", **options}) as run:
        run.track(trace=trace)
        now = run.box(params=params, state=OPTIMIZER.init(params), key=jax.random.key(seed))
        for _ in run.epochs(epochs):
            for x in run.batches(BATCHES):
                die()
                now.key, key = jax.random.split(now.key)
                now.params, now.state, loss = step(now.params, now.state, key, x)
                trace.append(float(loss))
                run.log(loss=loss)
                die()
        trace.append(bits((now.params, now.state, now.key)))
    return now.params, run


def test_killed_anywhere() -> None:
    """Donated arrays, a typed key, an optimizer with a schedule; in and between epochs."""
    assert kill_everywhere(train) == 12


def test_a_run_that_is_done_gives_what_it_came_to() -> None:
    address, trace, again = fresh_address(), list[Any](), list[Any]()
    params, _ = train(address, Countdown(), trace)
    found, run = train(address, Countdown(0), again, seed=5)
    assert bits(found) == bits(params)
    assert again == trace
    assert run.step == 6
    longer = list[Any]()
    train(address, Countdown(), longer, epochs=3)
    whole = list[Any]()
    train(fresh_address(), Countdown(), whole, epochs=3)
    assert longer[-1] == whole[-1]


def test_the_best_and_the_last_are_kept() -> None:
    address, trace = fresh_address(), list[Any]()
    train(address, Countdown(), trace, every=1, keep="last=1 best=1:loss", epochs=3)
    losses = trace[:-1]
    best = 1 + losses.index(min(losses))
    assert steps_of(address) == sorted({best, 9})
    address = fresh_address()
    train(address, Countdown(), [], every=1, keep="every=3", epochs=3)
    assert steps_of(address) == [1, 3, 6, 9]


def test_saves_by_time() -> None:
    address = fresh_address()
    now = [0.0]

    def clock() -> float:
        now[0] += 10.0
        return now[0]

    train(address, Countdown(), [], every="1min", keep=None, clock=clock)
    steps = steps_of(address)
    assert steps[-1] == 6
    assert 1 < len(steps) <= 6


@pytest.mark.parametrize(("before", "after"), [(4, 2), (4, 0)])
def test_goes_on_with_other_devices(before: int, after: int) -> None:
    """Replicated here, so that the numbers are the same whatever the devices."""
    address, trace, whole, died = fresh_address(), list[Any](), list[Any](), Countdown(6)
    with process():
        train(address, died, [], mesh=before, every=1)
    assert died.calls == 6
    address = copied(address)
    params, _ = train(address, Countdown(), trace, mesh=after, every=1)
    train(fresh_address(), Countdown(), whole)
    assert trace[:-1] == whole[:-1]
    assert len(jax.tree.leaves(params)[0].devices()) == max(after, 1)


# -- modules -------------------------------------------------------------------


ADAM = optax.adam(1e-2)


@eqx.filter_jit(donate="all-except-first")
def step_equinox(x: Any, model: Any, state: Any) -> Any:
    def loss(model: Any) -> Any:
        return jnp.mean((jax.vmap(model)(x) - 1) ** 2)

    value, grads = eqx.filter_value_and_grad(loss)(model)
    updates, state = ADAM.update(grads, state, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, updates), state, value


def train_equinox(address: str, die: Countdown, trace: list[Any]) -> None:
    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))
    with holdfast.Run(address, every="2steps", quiet=True) as run:
        run.track(trace=trace)
        now = run.box(model=model, state=ADAM.init(eqx.filter(model, eqx.is_array)))
        for x in run.batches(DATA):
            die()
            now.model, now.state, loss = step_equinox(x, now.model, now.state)
            trace.append(float(loss))
        trace.append(bits(eqx.filter((now.model, now.state), eqx.is_array)))


DENSE: Any = flax.linen.Dense(1)


@partial(jax.jit, donate_argnums=0)
def step_linen(state: Any, x: Any) -> Any:
    def loss(params: Any) -> Any:
        return jnp.mean((state.apply_fn(params, x) - 1) ** 2)

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


def train_linen(address: str, die: Countdown, trace: list[Any]) -> None:
    params = DENSE.init(jax.random.key(0), DATA[0])
    state = TrainState.create(apply_fn=DENSE.apply, params=params, tx=ADAM)
    with holdfast.Run(address, every="2steps", quiet=True) as run:
        run.track(trace=trace)
        now = run.box(state=state)
        for x in run.batches(DATA):
            die()
            now.state, loss = step_linen(now.state, x)
            trace.append(float(loss))
        assert int(now.state.step) == 6
        trace.append(bits((now.state.params, now.state.opt_state)))


class Net(nnx.Module):
    """Parameters, statistics, random streams, an array, a list of parts."""

    def __init__(self, rngs: nnx.Rngs, width: int = 4) -> None:
        self.first = nnx.Linear(3, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        blocks = [nnx.Linear(width, width, rngs=rngs) for _ in range(2)]
        self.blocks: Any = nnx.List(blocks) if hasattr(nnx, "List") else blocks
        self.last = nnx.Linear(width, 1, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x: Any) -> Any:
        x = self.drop(jax.nn.relu(self.norm(self.first(x))))
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def calls(model: Net) -> Any:
    return model.calls[...] if hasattr(model.calls, "get_value") else model.calls.value


def set_calls(model: Net, value: Any) -> None:
    if hasattr(model.calls, "set_value"):
        model.calls.set_value(value)
    else:
        model.calls.value = value


@nnx.jit
def step_nnx(model: Net, optimizer: Any, metrics: Any, x: Any) -> Any:
    def loss(model: Net) -> Any:
        return jnp.mean((model(x) - 1) ** 2)

    value, grads = nnx.value_and_grad(loss)(model)
    if "model" in inspect.signature(optimizer.update).parameters:
        optimizer.update(model, grads)
    else:  # Flax before 0.11: the optimizer holds the model
        optimizer.update(grads)
    metrics.update(loss=value)
    set_calls(model, calls(model) + 1)
    return value


def train_nnx(address: str, die: Countdown, trace: list[Any]) -> None:
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))
    with holdfast.Run(address, every="2steps", quiet=True) as run:
        run.track(trace=trace, model=model, optimizer=optimizer, metrics=metrics)
        for x in run.batches(DATA):
            die()
            trace.append(float(step_nnx(model, optimizer, metrics, x)))
        assert int(calls(model)) == 6
        trace.append(float(metrics.compute()["loss"]))
        trace.append(bits([nnx.to_pure_dict(nnx.state(one)) for one in (model, optimizer)]))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def step_of_state(definition: Any, state: Any, x: Any) -> Any:
    model = nnx.merge(definition, state)
    loss = jnp.mean(model(x) ** 2)
    return nnx.state(model), loss


def train_nnx_state(address: str, die: Countdown, trace: list[Any]) -> None:
    """As values: the state is split off, and lives in the box."""
    definition, state = nnx.split(Net(nnx.Rngs(0)))
    with holdfast.Run(address, every="2steps", quiet=True) as run:
        run.track(trace=trace)
        now = run.box(state=state)
        for x in run.batches(DATA):
            die()
            now.state, loss = step_of_state(definition, now.state, x)
            trace.append(float(loss))
        trace.append(bits(nnx.to_pure_dict(now.state)))


@pytest.mark.parametrize("script", [train_equinox, train_linen, train_nnx, train_nnx_state])
def test_modules_killed_anywhere(script: Any) -> None:
    assert kill_everywhere(script) == 6


def test_modules_of_nnx_are_filled_in_place() -> None:
    model, other = Net(nnx.Rngs(1)), Net(nnx.Rngs(2))
    kernel = other.first.kernel
    with holdfast.CheckpointManager(fresh_address()) as manager:
        manager.save(1, {"model": model}).result()
        into = {"model": other}
        manager.restore(into)
        assert into["model"] is other
        assert other.first.kernel is kernel
        assert bits(nnx.to_pure_dict(nnx.state(other))) == bits(nnx.to_pure_dict(nnx.state(model)))
        wide = Net(nnx.Rngs(2), width=5)
        before = bits(nnx.to_pure_dict(nnx.state(wide)))
        with pytest.raises(
            StructureMismatch, match=r"model/first/kernel: saved as float32\[3, 4\]"
        ):
            manager.restore({"model": wide})
        assert bits(nnx.to_pure_dict(nnx.state(wide))) == before
        linear = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        with pytest.raises(StructureMismatch, match=r"(?s)missing.*model/bias.*unexp.*model/first"):
            manager.restore({"model": linear})
        manager.restore({"model": wide}, only=["model/drop"])
        assert bits(nnx.to_pure_dict(nnx.state(wide.drop))) == bits(
            nnx.to_pure_dict(nnx.state(model.drop))
        )


# -- what a program gets wrong ---------------------------------------------------


def test_a_new_name_does_not_start_anew_in_silence() -> None:
    address = fresh_address()
    train(address, Countdown(), [])
    with holdfast.Run(address, quiet=True) as run:
        run.track(trace=[])
        run.box(weights=fresh(1))
        with pytest.raises(StructureMismatch, match="box/weights"):
            for _ in run.epochs(3):
                pass


def test_a_box_that_was_forgotten_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    params = fresh(0)
    with holdfast.Run(fresh_address(), every="2steps") as run:
        state = OPTIMIZER.init(params)
        run.box(key=jax.random.key(0))
        for x in run.batches(DATA):
            params, state, _ = step(params, state, jax.random.key(1), x)
    assert "in no checkpoint: params (dict), state" in capsys.readouterr().err


def test_a_box_with_what_was_donated_is_told() -> None:
    params = fresh(0)
    state = OPTIMIZER.init(params)
    with (
        pytest.raises(StateError, match=r"'box/params/a/w' is float32.*was given away"),
        holdfast.Run(fresh_address(), every=1, quiet=True) as run,
    ):
        run.box(params=params)
        for x in run.batches(DATA):
            params, state, _ = step(params, state, jax.random.key(1), x)


def test_an_optimizer_of_nnx_beside_its_model_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    with holdfast.Run(fresh_address()) as run:
        run.track(model=model)
        for _ in run.range(1):
            pass
    assert "optimizer will not be saved: not tracked" in capsys.readouterr().err
    assert optimizer is not None


def test_state_of_nnx_is_a_value() -> None:
    run = holdfast.Run(fresh_address(), quiet=True)
    with run, pytest.raises(UsageError, match="a step makes a new one"):
        run.track(state=nnx.state(Net(nnx.Rngs(0))))


# -- processes ----------------------------------------------------------------------

PROGRAM = """
import sys, time, jax, jax.numpy as jnp, optax, holdfast
optimizer = optax.adam(1e-2)
@jax.jit
def step(params, state, key):
    grads = jax.grad(lambda p: ((p * jax.random.normal(key, p.shape) - 1) ** 2).sum())(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state
params = jnp.ones(1000)
with holdfast.Run(sys.argv[1], every=5, quiet=True) as run:
    now = run.box(params=params, state=optimizer.init(params), key=jax.random.key(1))
    for number in run.range(40):
        now.key, key = jax.random.split(now.key)
        now.params, now.state = step(now.params, now.state, key)
        print(number, flush=True)
        time.sleep(0.05)
open(sys.argv[2], "wb").write(jax.device_get(now.params).tobytes())
"""


@pytest.mark.slow
def test_real_processes(tmp_path: Path) -> None:
    check_stopped_and_killed(PROGRAM, tmp_path)


PROCESSES = """
import sys, jax, numpy as np, holdfast, holdfast.errors
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
host = np.arange(4.0, dtype="f4")
array = jax.make_array_from_callback((4,), sharding, lambda index: host[index])
assert not array.is_fully_addressable
try:
    holdfast.CheckpointManager(f"memory://p{sys.argv[2]}").save(1, {"params": {"w": array}})
except holdfast.errors.UnsupportedValue as error:
    print(error)
"""


@pytest.mark.slow
def test_arrays_of_several_processes_are_refused() -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESSES, address, str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for one in both:
        said, err = one.communicate(timeout=120)
        assert one.returncode == 0, err
        assert "'params/w'" in said
        assert "float32[4] that is spread over several processes" in said


@pytest.mark.parametrize("copies", [True, False])
def test_old_versions_get_memory_of_their_own(
    copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX 0.5.3 would free ours under what is computed into it."""
    ours: list[np.ndarray[Any, Any]] = []
    empty = arrays._empty

    def noted(*about: Any) -> np.ndarray[Any, Any]:
        ours.append(empty(*about))
        return ours[-1]

    monkeypatch.setattr(arrays, "_empty", noted)
    monkeypatch.setattr(arrays, "_COPIES", copies)
    with holdfast.CheckpointManager(fresh_address()) as manager:
        manager.save(1, {"x": jnp.arange(100_000.0)}).result()
        into = {"x": jnp.zeros(100_000)}
        manager.restore(into)
    assert jnp.array_equal(into["x"], jnp.arange(100_000.0))
    addresses = [one.ctypes.data for one in ours]
    assert (into["x"].unsafe_buffer_pointer() in addresses) is not copies
