"""FedJAX's own federated averaging, compiled, with as many threads as XLA likes."""

from __future__ import annotations

import fedjax
import jax
import jax.numpy as jnp
import numpy as np
from fedjax.algorithms import fed_avg
from turns import BATCH, RATE, Turns, cohort, load

x, y, held_x, held_y = load()
clients = [fedjax.ClientDataset({"x": x[user], "y": y[user]}) for user in range(len(x))]


def scores(params, inputs):  # type: ignore[no-untyped-def]
    return jax.nn.relu(inputs @ params["w0"] + params["b0"]) @ params["w1"] + params["b1"]


def loss(params, batch, rng):  # type: ignore[no-untyped-def]
    chosen = jax.nn.log_softmax(scores(params, batch["x"]))
    return -jnp.mean(jnp.take_along_axis(chosen, batch["y"][:, None], 1))


rng = np.random.default_rng(0)
start = {
    "w0": jnp.array(rng.uniform(-1, 1, (784, 64)).astype(np.float32) / 28),
    "b0": jnp.zeros(64),
    "w1": jnp.array(rng.uniform(-1, 1, (64, 10)).astype(np.float32) / 8),
    "b1": jnp.zeros(10),
}
algorithm = fed_avg.federated_averaging(
    jax.jit(jax.grad(loss)),
    fedjax.optimizers.sgd(RATE),
    fedjax.optimizers.sgd(1.0),
    fedjax.ShuffleRepeatBatchHParams(batch_size=BATCH, num_epochs=1),
)
state, turns, number = algorithm.init(start), Turns(), 0
turns.ready()
while True:
    number += 1
    members = cohort(number, len(x))
    keys = jax.random.split(jax.random.PRNGKey(number), len(members))
    state, _ = algorithm.apply(state, [(user, clients[user], key) for user, key in zip(members, keys, strict=True)])
    state.params["b1"].block_until_ready()
    params = state.params
    turns.round_done(lambda params=params: float((scores(params, held_x).argmax(1) == held_y).mean()))  # type: ignore[misc]
