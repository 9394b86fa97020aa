"""A learner without torch: trains a small model of rewards on numpy batches from a replay server.

    python examples/train_numpy.py --address 127.0.0.1:50051 --updates 500

For users of numpy: `batches(as_numpy=True)` yields writable numpy arrays; `train_jax.py` is the same for JAX. The model
is one hidden layer that predicts each reward from the observation before it and the action, trained by Adam. Prints lines of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from touchline import Batch, ReplayClient

Array = NDArray[np.float32]
REPORT_EVERY = 100
LEARNING_RATE = 3e-3


class RewardModel:
    """One hidden layer of tanh units, and Adam (Kingma and Ba 2015) with its usual constants."""

    def __init__(self, inputs: int, *, hidden: int = 64, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        shapes = {"w1": (inputs, hidden), "b1": (hidden,), "w2": (hidden, 1), "b2": (1,)}
        self._weights = {
            name: (rng.normal(size=shape) / np.sqrt(shape[0]) * (len(shape) > 1)).astype(np.float32) for name, shape in shapes.items()
        }
        self._mean = {name: np.zeros_like(weight) for name, weight in self._weights.items()}
        self._square = {name: np.zeros_like(weight) for name, weight in self._weights.items()}
        self._updates = 0

    def train(self, inputs: Array, targets: Array) -> float:
        """Makes one update and returns the mean squared error before it. Inputs [N, inputs], targets [N, 1]."""
        hidden = np.tanh(inputs @ self._weights["w1"] + self._weights["b1"])
        error = hidden @ self._weights["w2"] + self._weights["b2"] - targets
        slope = 2 * error / len(error)
        back = (slope @ self._weights["w2"].T) * (1 - hidden**2)
        self._step({"w1": inputs.T @ back, "b1": back.sum(0), "w2": hidden.T @ slope, "b2": slope.sum(0)})
        return float(np.square(error).mean())

    def _step(self, gradients: dict[str, Array]) -> None:
        self._updates += 1
        for name, gradient in gradients.items():
            self._mean[name] += 0.1 * (gradient - self._mean[name])
            self._square[name] += 0.001 * (gradient**2 - self._square[name])
            mean, square = self._mean[name] / (1 - 0.9**self._updates), self._square[name] / (1 - 0.999**self._updates)
            self._weights[name] -= LEARNING_RATE * mean / (np.sqrt(square) + 1e-8)


def pairs_of(batch: Batch) -> tuple[Array, Array]:
    """Returns observation and action [H * B, ...], and the reward that followed [H * B, 1]."""
    obs, action, reward, _ = batch
    before = obs[:-1].reshape(action.shape[0], action.shape[1], -1)
    inputs = np.concatenate([before, action], axis=2)
    return inputs.reshape(-1, inputs.shape[-1]), reward.reshape(-1, 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    parser.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    parser.add_argument("--updates", type=int, default=500, help="number of updates")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    with ReplayClient(args.address) as client:
        client.wait_until_ready()
        with client.batches(as_numpy=True) as batches:
            first = next(batches)
            inputs, targets = pairs_of(first)
            model = RewardModel(inputs.shape[1])
            scale = targets.std() + 1e-6  # losses below 1 beat predicting the mean
            shift = targets.mean()
            losses: list[float] = []
            for update, batch in enumerate(islice(batches, args.updates), start=1):
                inputs, targets = pairs_of(batch)
                losses.append(model.train(inputs, (targets - shift) / scale))
                if update % REPORT_EVERY == 0:
                    print(json.dumps({"update": update, "loss": float(np.mean(losses[-REPORT_EVERY:]))}), flush=True)


if __name__ == "__main__":
    main()
