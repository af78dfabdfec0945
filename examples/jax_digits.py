"""A small network on scikit-learn's handwritten digits, with JAX and Optax.

    pip install 'holdfast[jax]' optax scikit-learn
    python examples/jax_digits.py      # press Ctrl-C, use kill -9 ...
    python examples/jax_digits.py      # ... and the same command goes on where it was
    holdfast ls runs/jax

JAX's values do not change: a step makes new ones. They live in the run's box, and are saved from
there. The step donates the old ones, as large models do.
"""

from __future__ import annotations

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import holdfast

HELD_OUT = 297
BATCH = 50
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))


def network(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


@partial(jax.jit, donate_argnums=(0, 1))
def step(params, opt_state, key, x, y):  # type: ignore[no-untyped-def]
    def loss(params: dict[str, jax.Array]) -> jax.Array:
        noisy = x + 0.1 * jax.random.normal(key, x.shape)
        return optax.softmax_cross_entropy_with_integer_labels(network(params, noisy), y).mean()

    updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def accuracy(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> float:
    return float((network(params, x).argmax(axis=1) == y).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", default="runs/jax", help="where the checkpoints are kept")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--every", default="5s", help='steps ("50"), "5s" or "5min"')
    args = parser.parse_args()

    digits, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(digits / 16, jnp.float32), jnp.asarray(labels)
    key, first, second = jax.random.split(jax.random.key(0), 3)
    params = {
        "w1": jax.random.normal(first, (64, 128)) / 8,
        "b1": jnp.zeros(128),
        "w2": jax.random.normal(second, (128, 10)) / 11,
        "b2": jnp.zeros(10),
    }

    np.random.seed(0)  # its state is saved with the run, and goes on
    every = int(args.every) if args.every.isdigit() else args.every
    with holdfast.Run(args.run, every=every, keep="last=2 best=1:accuracy:max") as run:
        now = run.box(params=params, opt_state=optimizer.init(params), key=key)
        for _ in run.epochs(args.epochs):
            order = np.random.permutation(len(x) - HELD_OUT)
            for rows in run.batches(np.split(order, len(order) // BATCH)):
                now.key, noise = jax.random.split(now.key)
                now.params, now.opt_state = step(now.params, now.opt_state, noise, x[rows], y[rows])
            run.log(accuracy=accuracy(now.params, x[-HELD_OUT:], y[-HELD_OUT:]))
        read = accuracy(now.params, x[-HELD_OUT:], y[-HELD_OUT:])
        total = float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(now.params)))

    print(f"{read:.4f} of the held-out digits read; sum of all weights {total:.6f}")


if __name__ == "__main__":
    main()
