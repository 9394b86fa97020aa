"""A world model in plain JAX, trained on batches from a replay server that JAX reads where they lie.

    touchline-server serve &
    python examples/train_jax.py --address 127.0.0.1:50051 --updates 1000

A point on a plane is pushed around and pulled back by a spring. The model predicts its next observation and the reward, over a slice of H
transitions on its own predictions, and `batches(as_jax=True)` feeds it: arrays of JAX over the memory of the ring, with no copy between the
server and the jitted update. The actor adds an episode after every 25 updates. Prints lines of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from touchline import ReplayClient

STEPS = 100
BATCH = 64
HORIZON = 5
EPISODE_EVERY = 25
REPORT_EVERY = 100
LEARNING_RATE = 3e-3

Weights = dict[str, jax.Array]


def play(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns one episode of random pushes: obs [T+1, 4] is position and velocity, the reward is minus the distance from the middle."""
    position, velocity = rng.uniform(-1, 1, 2), np.zeros(2)
    rows = [(np.concatenate([position, velocity]), np.full(2, np.nan), np.nan)]
    for _ in range(STEPS):
        action = rng.uniform(-1, 1, 2)
        velocity = 0.9 * velocity + 0.1 * action - 0.05 * position
        position = position + velocity
        rows.append((np.concatenate([position, velocity]), action, -float(np.linalg.norm(position))))
    obs, action, reward = (np.float32(np.stack(column)) for column in zip(*rows, strict=True))
    return {"obs": obs, "action": action, "reward": reward}


def initial_weights(key: jax.Array, hidden: int = 64) -> Weights:
    """Returns the weights of one hidden layer from (observation, action) to (change of the observation, reward)."""
    first, second = jax.random.split(key)
    return {
        "w1": jax.random.normal(first, (6, hidden)) / 6**0.5,
        "b1": jnp.zeros(hidden),
        "w2": 0.1 * jax.random.normal(second, (hidden, 5)) / hidden**0.5,
        "b2": jnp.zeros(5),
    }


def loss_of(weights: Weights, obs: jax.Array, action: jax.Array, reward: jax.Array) -> jax.Array:
    """Returns the mean squared error of H steps on the model's own predictions. obs [H+1, B, 4], action [H, B, 2], reward [H, B, 1]."""

    def step(state: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        pushed, following, earned = inputs
        hidden = jnp.tanh(jnp.concatenate([state, pushed], axis=-1) @ weights["w1"] + weights["b1"])
        output = hidden @ weights["w2"] + weights["b2"]
        state = state + output[:, :4]
        return state, jnp.mean((state - following) ** 2) + jnp.mean((output[:, 4:] - earned) ** 2)

    _, errors = jax.lax.scan(step, obs[0], (action, obs[1:], reward))
    return jnp.mean(errors)


@jax.jit
def update(
    weights: Weights, moments: tuple[Weights, Weights], count: jax.Array, obs: jax.Array, action: jax.Array, reward: jax.Array
) -> tuple[Weights, tuple[Weights, Weights], jax.Array]:
    """Makes one update by Adam (Kingma and Ba 2015); returns the weights and moments after it, and the loss before it."""
    loss, gradients = jax.value_and_grad(loss_of)(weights, obs, action, reward)
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradients)
    square = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g**2, moments[1], gradients)

    def change(weight: jax.Array, m: jax.Array, s: jax.Array) -> jax.Array:
        return weight - LEARNING_RATE * (m / (1 - 0.9**count)) / (jnp.sqrt(s / (1 - 0.999**count)) + 1e-8)

    return jax.tree.map(change, weights, mean, square), (mean, square), loss


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    parser.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    parser.add_argument("--updates", type=int, default=1_000, help="number of updates")
    parser.add_argument("--seed", type=int, default=0, help="seed of the network, the episodes and the draws")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    rng = np.random.default_rng(args.seed)
    weights = initial_weights(jax.random.key(args.seed))
    zeros = jax.tree.map(jnp.zeros_like, weights)
    moments = (zeros, zeros)
    losses: list[jax.Array] = []
    with ReplayClient(args.address) as client:
        client.load(play(rng) for _ in range(20))
        with client.batches(as_jax=True, batch_size=BATCH, horizon=HORIZON, seed=args.seed) as batches:
            for number, (obs, action, reward, _) in enumerate(islice(batches, args.updates), start=1):
                weights, moments, loss = update(weights, moments, jnp.float32(number), obs, action, reward)
                losses.append(loss)  # computed in the background: nothing waits for it before the report
                if number % EPISODE_EVERY == 0:
                    client.add(play(rng))
                if number % REPORT_EVERY == 0:
                    report: dict[str, Any] = {"update": number, "loss": float(jnp.mean(jnp.stack(losses)))}
                    losses.clear()
                    print(json.dumps({**report, "transport": batches.transport}), flush=True)


if __name__ == "__main__":
    main()
