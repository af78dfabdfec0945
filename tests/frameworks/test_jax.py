"""Values of JAX come back bit for bit, into the structure and sharding of the program."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import threading
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import holdfast
from holdfast.core.classes import Record
from holdfast.errors import StateError, StructureMismatch, UnsupportedValue, UsageError
from holdfast.jax.arrays import HeldSource, encode_arrays
from holdfast.jax.dtypes import DTYPES, STORED
from tests.support.jax_values import bits, enable_x64
from tests.support.jobs import fresh_address


def there_and_back(value: Any, target: Any = None) -> Any:
    with holdfast.CheckpointManager(fresh_address()) as manager:
        manager.save(1, {"value": {"it": value}}).result()
        into = {"value": {"it": target}}
        manager.restore(into)
        return into["value"]["it"]


# -- arrays -------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(name: str) -> None:
    """Every bit pattern that the dtype has, NaNs with payloads among them."""
    dtype, shape = DTYPES[name], (2, 3, 50)
    chance = np.random.default_rng(1)
    raw = chance.integers(0, 256, (*shape, dtype.itemsize), dtype="u1")
    if name == "bool":
        raw &= 1
    elif dtype.kind == "V" and dtype.itemsize == 1 and STORED[name] == "U8":
        raw = np.asarray(chance.integers(0, 4, shape)).astype(dtype)[..., None].view("u1")
    host = raw.view(dtype).reshape(shape)
    with enable_x64(dtype.itemsize >= 8):
        for part in (host, host[0, 0, 0], host[:0]):
            value = jax.device_put(part)
            assert value.dtype == dtype
            blank = jax.device_put(np.zeros(value.shape, dtype))
            into = [None, blank, jax.ShapeDtypeStruct(value.shape, dtype)]
            assert bits(there_and_back([value] * 3, into)) == bits([value] * 3)


def test_dtypes_have_the_names_of_safetensors() -> None:
    assert STORED["bfloat16"] == "BF16"
    assert STORED["float8_e4m3fn"] == "F8_E4M3"
    assert STORED["int4"] == "U8"
    assert DTYPES["bfloat16"] == np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("value", [2, 2.5, 1j, [1.5, 2.5]])
def test_weak_types(value: Any) -> None:
    """They decide the dtype of results, and whether a jitted step is compiled again."""
    weak = (
        jnp.asarray(value) if not isinstance(value, list) else jnp.zeros(2) * 0 + jnp.full(2, 1.5)
    )
    weak = jnp.full((2,), 2.5) if isinstance(value, list) else weak
    assert weak.weak_type
    assert bits(there_and_back(weak)) == bits(weak)
    assert bits(there_and_back(weak, jnp.zeros_like(weak))) == bits(weak)
    strong = jnp.asarray(weak, weak.dtype)
    assert there_and_back(strong, weak).weak_type is strong.weak_type


def test_an_array_stays_free_or_bound_to_its_device() -> None:
    free, bound = jnp.arange(3), jax.device_put(jnp.arange(3), jax.devices()[2])
    assert not there_and_back(bound, free).committed
    found = there_and_back(free, bound)
    assert found.committed
    assert found.devices() == {jax.devices()[2]}
    assert not there_and_back(bound).committed
    given = jax.device_put(jnp.arange(3), jax.devices()[2])
    given.delete()
    assert there_and_back(free, given).devices() == {jax.devices()[2]}


def test_wide_ones_need_what_they_were_made_with() -> None:
    with enable_x64(True):
        value = jnp.arange(3, dtype=jnp.float64)
    with pytest.raises(
        StateError, match=r"float64\[3\], which JAX would make half as wide"
    ) as told:
        there_and_back(value)
    assert "jax_enable_x64" in told.value.hint
    with pytest.raises(StructureMismatch, match=r"saved as float64\[3\], live is float32\[3\]"):
        there_and_back(value, jnp.zeros(3))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys(impl: str) -> None:
    key, other = jax.random.key(3, impl=impl), jax.random.key(4, impl=impl)
    keys = jax.random.split(key, (2, 3))
    assert bits(there_and_back(key)) == bits(key)
    assert bits(there_and_back(keys, jax.random.split(other, (2, 3)))) == bits(keys)
    drawn = jax.random.normal(there_and_back(key, other), (5,))
    assert bits(drawn) == bits(jax.random.normal(key, (5,)))
    shape = jax.eval_shape(lambda: keys)
    assert bits(there_and_back(keys, shape)) == bits(keys)
    given = jax.random.split(other, (2, 3))
    given.delete()  # what a program has declared may be donated before the loop starts
    assert bits(there_and_back(keys, given)) == bits(keys)
    raw = jax.random.key_data(key)
    assert bits(there_and_back(raw, jnp.zeros_like(raw))) == bits(raw)
    with pytest.raises(StructureMismatch, match=r"saved as uint32\[\d\], live is key<"):
        there_and_back(raw, key)
    with pytest.raises(StructureMismatch, match=rf"a random key \({impl}\), live is uint32"):
        there_and_back(key, raw)
    with pytest.raises(StructureMismatch, match="saved as uint32"):
        there_and_back(keys, key)


def test_keys_of_another_kind_are_told() -> None:
    with pytest.raises(StructureMismatch, match=r"key \(rbg\), live is a random key \(key<fry>"):
        there_and_back(jax.random.key(0, impl="rbg"), jax.random.key(0, impl="threefry2x32"))


# -- pytrees --------------------------------------------------------------------

HOST: Any = {
    "a": {"w": np.ones((3, 4), "f4"), "b": np.zeros(4, "f4")},
    "head": [np.ones((4, 1), "f4")],
}


def params(factor: float = 1) -> Any:
    return jax.tree.map(lambda array: jnp.asarray(array * np.float32(factor)), HOST)


def labels(params: Any) -> Any:
    return {"a": "adam", "head": "sgd"}


OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "chain": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(1e-2, 10), weight_decay=1e-3),
    ),
    "injected": optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.linear_schedule(1e-2, 0, 10), b1=0.8
    ),
    "masked": optax.masked(optax.adam(1e-2), {"a": {"w": True, "b": False}, "head": [True]}),
    "multi": optax.multi_transform({"adam": optax.adam(1e-2), "sgd": optax.sgd(0.1, 0.9)}, labels),
    "steps": optax.MultiSteps(optax.adam(1e-2), 3),
    "ema": optax.chain(optax.lion(1e-3), optax.ema(0.9)),
    "plateau": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_states_of_optax(optimizer: Any) -> None:
    @jax.jit
    def step(params: Any, state: Any, number: Any) -> Any:
        grads = jax.tree.map(lambda p: jnp.cos(p + number), params)
        updates, state = optimizer.update(grads, state, params, value=jnp.float32(1))
        return optax.apply_updates(params, updates), state

    optimizer = optax.with_extra_args_support(optimizer)
    values, state = params(), optimizer.init(params())
    for number in range(2):
        values, state = step(values, state, number)
    found = there_and_back((values, state), (params(0), optimizer.init(params(0))))
    assert bits(found) == bits((values, state))
    assert bits(step(*found, 2)) == bits(step(values, state, 2))


ADAM = optax.adam(1)


class Other(NamedTuple):
    weights: Any
    count: int


class Mine(NamedTuple):
    """A program's own; JAX knows named tuples without being told."""

    weights: Any
    seen: int


@dataclasses.dataclass
class Registered:
    weights: Any
    scale: float
    act: Any


jax.tree_util.register_dataclass(Registered, ["weights", "scale"], ["act"])


class Unnamed:
    def __init__(self, first: Any, second: Any, width: int) -> None:
        self.first, self.second, self.width = first, second, width


jax.tree_util.register_pytree_node(
    Unnamed, lambda u: ((u.first, u.second), u.width), lambda width, items: Unnamed(*items, width)
)


@flax.struct.dataclass
class Frozen:
    weights: Any
    apply: Any = flax.struct.field(pytree_node=False)


def test_classes_of_the_program() -> None:
    def make(value: float) -> Any:
        array = jnp.full((2,), value, jnp.float32)
        return {
            "mine": Mine(array, int(value)),
            "registered": Registered([array, {"x": array + 1}], value, jnp.tanh),
            "unnamed": Unnamed(array, (array, None), 3),
            "frozen": Frozen(array, print),
        }

    found = there_and_back(make(2.0), make(0.0))
    assert bits(found["mine"]) == bits(make(2.0)["mine"])
    assert type(found["mine"]) is Mine
    assert found["registered"].act is jnp.tanh
    assert found["registered"].scale == 2.0
    assert bits(found["registered"]) == bits(make(2.0)["registered"])
    assert found["unnamed"].width == 3
    assert bits(found["unnamed"].second) == bits(make(2.0)["unnamed"].second)
    assert bits(found["frozen"]) == bits(make(2.0)["frozen"])


def mlp(seed: int, width: int = 4, depth: int = 2, **options: Any) -> Any:
    return eqx.nn.MLP(2, 1, width, depth, key=jax.random.key(seed), **options)


def test_modules_of_equinox() -> None:
    """Static fields and functions are those of the program that goes on."""
    found = there_and_back(mlp(1), mlp(2, activation=jax.nn.gelu))
    assert bits(eqx.filter(found, eqx.is_array)) == bits(eqx.filter(mlp(1), eqx.is_array))
    assert found.activation is jax.nn.gelu
    sequence = eqx.nn.Sequential(
        [eqx.nn.Linear(2, 3, key=jax.random.key(1)), eqx.nn.Lambda(jnp.tanh), eqx.nn.Dropout(0.5)]
    )
    other = jax.tree.map(lambda x: x * 0 if eqx.is_array(x) else x, sequence)
    assert bits(there_and_back(sequence, other)) == bits(sequence)
    new = "mode" in inspect.signature(eqx.nn.BatchNorm).parameters
    options: Any = {"mode": "ema"} if new else {}
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", **options)
    again = there_and_back((norm, state), (norm, state))
    assert bits(again) == bits((norm, state))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: (mlp(1), mlp(1, 5)), r"it/layers/0/weight: saved as float32\[4, 2\], live is fl"),
        (lambda: (mlp(1), mlp(1, depth=3)), r"it/layers: saved as 3 items, live is 4 items"),
        (lambda: (mlp(1, depth=3), mlp(1)), r"it/layers: saved as 4 items, live is 3 items"),
        (lambda: (mlp(1), mlp(1).layers[0]), r"a equinox\S+MLP, live is a equinox\S+Linear"),
        (lambda: (mlp(1, use_bias=False), mlp(1)), r"it/layers/0/bias"),
        (lambda: (mlp(1), None), r"live is nothing, which does not say how one is made: declare"),
        (lambda: (mlp(1), jnp.zeros(3)), r"live is ArrayImpl, which does not say how one"),
        (lambda: (jnp.zeros(3), mlp(1)), r"saved as an array, live is a equinox"),
        (lambda: (1.5, mlp(1)), r"saved as 1.5, live is MLP"),
        (lambda: (few(), many()), r"missing.*\n.*it/b"),
        (lambda: (many(), few()), r"unexp.*\n.*it/b"),
        (lambda: (list(few()), list(many().values())), r"saved as 1 items, live is 2"),
        (lambda: (tuple(many().values()), tuple(few().values())), r"saved as 2 items, live is 1"),
        (lambda: (Mine(jnp.ones(2), 1), Unnamed(1, 2, 3)), r"live is .*Unnamed"),
        (lambda: (Mine(jnp.ones(2), 1), Other(jnp.ones(2), 1)), r"Mine.*, live is .*Other"),
        (lambda: (ADAM, optax.sgd(1, 0.9)), r"a optax\S+ScaleByAdamState, live is a \S+TraceState"),
        (lambda: (optax.sgd(1), ADAM), r"a optax\S+EmptyState, live is a \S+ScaleByAdamState"),
        (lambda: (optax.chain(optax.clip(1), ADAM), ADAM), r"a optax\S+EmptyState, live is a"),
    ],
)
def test_another_structure_is_told_by_path(make: Any, told: str) -> None:
    saved, live = (
        one.init(params()) if isinstance(one, optax.GradientTransformation) else one
        for one in make()
    )
    before = bits(live)
    with pytest.raises(StructureMismatch, match=told):
        there_and_back(saved, live)
    assert bits(live) == before


def few() -> Any:
    return {"a": jnp.ones(2)}


def many() -> Any:
    return {"a": jnp.ones(2), "b": {"c": jnp.ones(2)}}


def test_without_the_program() -> None:
    """Named tuples are found by name; other nodes come as records of their children."""
    address = fresh_address()
    state = {"opt": optax.adam(1).init(params()), "model": mlp(1), "key": jax.random.key(1)}
    with holdfast.CheckpointManager(address) as manager:
        manager.save(1, state).result()
    found = holdfast.open(address)
    assert bits(found["opt"]) == bits(state["opt"])
    assert bits(found["key"]) == bits(state["key"])
    record = found["model"]["layers"][0]
    assert isinstance(record, Record)
    assert bits(record.fields["weight"]) == bits(mlp(1).layers[0].weight)
    assert found["model"]["activation"] is None


def test_parts_of_a_node_can_be_chosen() -> None:
    with holdfast.CheckpointManager(fresh_address()) as manager:
        manager.save(1, {"model": mlp(1)}).result()
        into = {"model": mlp(2)}
        manager.restore(into, only=["model/layers/0"])
    assert bits(into["model"].layers[0]) == bits(mlp(1).layers[0])
    assert bits(into["model"].layers[1:]) == bits(mlp(2).layers[1:])


def test_one_array_in_two_places_is_stored_once_and_comes_back_twice() -> None:
    """So that a step that donates both does not give one buffer away twice."""
    array = jnp.arange(100_000, dtype=jnp.float32)
    with holdfast.CheckpointManager(fresh_address()) as manager:
        info = manager.save(1, {"params": {"a": array}, "ema": {"a": array}}).result()
        assert info.nbytes < 1.5 * array.nbytes
        into = {"params": {"a": array * 0}, "ema": {"a": array * 0}}
        manager.restore(into)
    first, second = into["params"]["a"], into["ema"]["a"]
    assert bits(first) == bits(second) == bits(array)
    assert first.unsafe_buffer_pointer() != second.unsafe_buffer_pointer()


# -- several devices ---------------------------------------------------------------


def layout(devices: int, *spec: Any) -> NamedSharding:
    shape = (devices,) if len(spec) < 2 or None in spec else (devices // 2, 2)
    names = ("x", "y")[: len(shape)]
    grid = np.array(jax.devices()[:devices]).reshape(shape)
    return NamedSharding(Mesh(grid, names), PartitionSpec(*spec))


def layouts() -> list[Any]:
    return [
        layout(8, "x"),
        layout(8, None, "x"),
        layout(8, "x", "y"),
        layout(8),
        layout(4, "y", "x"),
        layout(1),
        None,
    ]


@pytest.mark.parametrize("number", range(7))
def test_another_layout(number: int) -> None:
    """8 devices, 4, 1 and back, each to the one before, and to itself."""
    before, other = layouts()[number], layouts()[number - 1]
    host = np.random.default_rng(1).normal(size=(16, 8)).astype("f4")
    value = jax.device_put(host, before)
    for after in (before, other):
        blank = jax.device_put(np.zeros_like(host), after)
        shape = jax.ShapeDtypeStruct(blank.shape, blank.dtype, sharding=after)
        for found in there_and_back([value, value], [blank, shape]):
            assert bits(found) == bits(jnp.asarray(host))
            assert found.committed is (after is not None)
            if after is not None:
                assert found.sharding.is_equivalent_to(after, 2)


def test_keys_in_another_layout() -> None:
    keys, others = (jax.random.split(jax.random.key(seed), (16, 8)) for seed in (1, 2))
    before, after = layout(8, "x"), layout(8, "x", "y")
    found = there_and_back(jax.device_put(keys, before), jax.device_put(others, after))
    assert bits(found) == bits(keys)
    assert found.sharding.is_equivalent_to(after, 2)


# -- capture ------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["one", "eight", "copies"])
def test_a_step_may_donate_what_is_being_saved(monkeypatch: pytest.MonkeyPatch, over: str) -> None:
    """The save reads in the background, long after the memory was given away."""
    go_on, read = threading.Event(), HeldSource.copy_range

    def late(source: HeldSource, offset: int, into: memoryview) -> None:
        assert go_on.wait(60)
        read(source, offset, into)

    @partial(jax.jit, donate_argnums=0)
    def step(value: Any) -> Any:
        return value * 1.5 + 1

    monkeypatch.setattr(HeldSource, "copy_range", late)
    sharding = {"one": None, "eight": layout(8, "x"), "copies": layout(8)}[over]
    value = jax.device_put(jnp.arange(1 << 18, dtype=jnp.float32), sharding)
    value = step(value)
    expected = bits(value)
    with holdfast.CheckpointManager(fresh_address()) as manager:
        pending = manager.save(1, {"value": {"it": value}})
        given, value = value, step(value)
        for _ in range(3):
            value = step(value)
        del given
        gc.collect()
        junk = [step(jnp.zeros(1 << 18)) for _ in range(8)]  # memory that is used again
        go_on.set()
        pending.result()
        into = {"value": {"it": jnp.zeros(1 << 18)}}
        manager.restore(into)
        del junk
    assert bits(into["value"]["it"]) == expected


def test_large_arrays_are_not_copied_while_the_loop_waits() -> None:
    value = jnp.arange(1 << 18, dtype=jnp.float32)

    class Noting:
        sources: Any = ()

        def leaves_of(self, sources: Any, paths: Any) -> Any:
            self.sources = sources
            return range(len(sources))

    noting: Any = Noting()
    encode_arrays([(value, "it", {}), (jnp.zeros(3), "small", {})], noting)
    large, small = noting.sources
    assert large.streamed
    assert not small.streamed
    assert large._array.ctypes.data == value.unsafe_buffer_pointer()
    large.close()  # then the memory can be donated in place again
    before = value.unsafe_buffer_pointer()
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(value)
    assert after.unsafe_buffer_pointer() == before


def test_what_was_given_away_is_told() -> None:
    value = jnp.ones(3)
    jax.jit(lambda x: x + 1, donate_argnums=0)(value)
    with pytest.raises(
        StateError, match=r"'value/it' is float32\[3\], and its memory was given"
    ) as told:
        there_and_back(value)
    assert "Put each step's result in the box" in told.value.hint


def test_what_cannot_be_saved() -> None:
    with pytest.raises(UnsupportedValue, match="a tracer"):
        jax.jit(there_and_back)(jnp.ones(3))
    with pytest.raises(UnsupportedValue, match="a tracer"):
        jax.jit(there_and_back)(jax.random.key(0))
    with pytest.raises(UnsupportedValue, match="without data"):
        there_and_back(jax.ShapeDtypeStruct((3,), jnp.float32))


def test_values_are_not_tracked() -> None:
    mine = Mine(jnp.ones(2), 1)
    with holdfast.Run(fresh_address(), quiet=True) as run:
        for value in (jnp.ones(3), ADAM.init(params()), mlp(1), mine, jax.random.key(0)):
            with pytest.raises(UsageError, match="a step makes a new one") as told:
                run.track(params=value)
            assert "state = run.box(params=params)" in told.value.hint
        run.track(params=params())  # a dict may be changed in place


def test_results_are_what_can_come_back_whole() -> None:
    run = holdfast.Run(fresh_address(), quiet=True)
    state = ADAM.init(params())
    with run:
        assert bits(run.once(lambda: state)()) == bits(state)
        with pytest.raises(UnsupportedValue, match="MLP, of which only the arrays would come back"):
            run.once(mlp)(1)
