"""A learner: trains a small world model on the episodes of a replay server.

    python examples/learner.py --address 127.0.0.1:50051 --seconds 60 --metrics metrics.jsonl

Waits until the server has `min_history` rows, then trains on slices that the server pushes. One match of ten (column `match`) is
held out: its slices are never trained on, they show how well the model predicts rewards that it has not seen, compared with predicting
their mean. Whole matches, because the four episodes of one match share the ball. If the actors play in lockstep, the model is one of the
whole team at one step. SIGTERM or Ctrl-C ends training as the time limit does, with a last report, the checkpoint and exit status 0.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

try:
    import torch
except ImportError as error:
    raise SystemExit(f"The learner needs torch ({error}). In the clone: pip install ./protos './client[torch]'") from error
from torch import Tensor

from touchline import Batch, BatchStream, ReplayClient, UnavailableError
from world_model import Losses, WorldModel

HOLD_OUT_EVERY = 10
"""Matches number 1, 11, 21, ... of each actor are held out."""
MAX_HELD_OUT_REWARDS = 4096
"""Approximate number of held-out slices that are kept, the newest; in lockstep times the number of players."""
REPORT_EVERY_S = 1.0
CHECKPOINT_EVERY_S = 30.0
LEARNING_RATE = 1e-3
MAX_GRADIENT_NORM = 20.0

Slices = tuple[Tensor, Tensor, Tensor]
"""obs [H+1, B, obs_size], action [H, B, action_size] and reward [H, B, 1], float32; in lockstep with players before the last axis."""


class HeldOut:
    """Slices of matches that are never trained on."""

    def __init__(self) -> None:
        self._parts: deque[Slices] = deque()
        self._size = 0

    def split(self, batch: Batch) -> Slices:
        """Keeps the held-out slices of a batch and returns the others."""
        obs, action, reward = slices_of(batch)
        held_out = batch.extra["match"][0] % HOLD_OUT_EVERY == 1
        if held_out.any():
            self._parts.append((obs[:, held_out], action[:, held_out], reward[:, held_out]))
            self._size += int(held_out.sum())
        while self._size * reward[0, 0].numel() > MAX_HELD_OUT_REWARDS:
            self._size -= self._parts.popleft()[0].shape[1]
        return obs[:, ~held_out], action[:, ~held_out], reward[:, ~held_out]

    def score(self, model: WorldModel) -> dict[str, Any] | None:
        """Returns mean squared errors of the reward, in its own unit, for each step 1..H ahead; None while too little is held out."""
        if self._size < 2:
            return None
        obs, action, reward = (torch.cat(column, dim=1) for column in zip(*self._parts, strict=True))
        error = (model.predict_rewards(obs[0], action) - reward).square().flatten(1).mean(dim=1)
        of_the_mean = reward.flatten(1).var(dim=1, correction=0)  # the least that any constant can reach on these very slices
        return {"slices": self._size, "error": error.tolist(), "error_of_mean": of_the_mean.tolist()}


def slices_of(batch: Batch) -> Slices:
    """Returns the slices of a batch; in lockstep its rewards [H, B, players] get an axis of their own.

    No player ever leaves the pitch. Where agents may, the losses would be weighted by ``batch.extra["alive"][1:]``.
    """
    obs, action, reward, _ = batch
    return obs, action, reward.unsqueeze(-1) if is_team(batch) else reward


def is_team(batch: Batch) -> bool:
    """Returns whether the episodes are whole matches."""
    return batch.obs.ndim > 3


class Learner:
    """The model, its optimiser and their reports.

    Args:
        model: model to train.
        metrics: file to which a line of JSON is appended about every second; None for none.
        checkpoint: file for the model's weights: loaded if it exists, and written; None for none.
    """

    def __init__(self, model: WorldModel, *, metrics: Path | None = None, checkpoint: Path | None = None) -> None:
        self._model = model
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.Adam(self._parameters, lr=LEARNING_RATE)
        self._metrics, self._checkpoint = metrics, checkpoint
        self._held_out = HeldOut()
        self._losses: list[Losses] = []
        self._transport: dict[str, str] = {}
        self.updates = 0
        self._reported = self._saved = time.monotonic()
        if checkpoint is not None and checkpoint.exists():
            model.load_state_dict(torch.load(checkpoint, map_location=self._parameters[0].device, weights_only=True))
            logging.info("goes on from %s", checkpoint)

    def train(self, batch: Batch, stream: BatchStream) -> None:
        """Makes one update, if the batch has slices that are not held out. ``stream`` is the stream of the batch."""
        self._transport = {"transport": stream.transport}
        if stream.transport_reason:
            self._transport["transport_reason"] = stream.transport_reason
        obs, action, reward = self._held_out.split(batch)
        if not obs.shape[1]:
            return
        losses = self._model.loss(obs, action, reward)
        self._optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRADIENT_NORM)
        self._optimizer.step()
        self._model.follow()
        self._losses.append(Losses(*(loss.detach() for loss in losses)))
        self.updates += 1
        now = time.monotonic()
        if now - self._reported >= REPORT_EVERY_S:
            self.report()
        if now - self._saved >= CHECKPOINT_EVERY_S:
            self.save()

    def report(self, *, final: bool = False) -> None:
        """Prints and writes the transport of the last batch, the mean losses since the last report, and the score on held-out slices."""
        now = time.monotonic()
        line: dict[str, Any] = {"time": time.time(), "updates": self.updates, "final": final}
        line |= self._transport
        line["batches_per_s"] = len(self._losses) / max(now - self._reported, 1e-9)
        if self._losses:
            means = torch.tensor(self._losses).mean(dim=0).tolist()
            line |= dict(zip(Losses._fields, means, strict=True))
        line["held_out"] = self._held_out.score(self._model)
        self._losses, self._reported = [], now
        print(json.dumps(line), flush=True)
        if self._metrics is not None:
            with self._metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Writes the checkpoint; a reader sees the old one or the new one, never a part."""
        self._saved = time.monotonic()
        if self._checkpoint is not None:
            partial = self._checkpoint.with_suffix(".partial")
            torch.save(self._model.state_dict(), partial)
            os.replace(partial, self._checkpoint)


class StopRequest:
    """Interrupts a wait on SIGTERM, SIGINT or when the time is up; once."""

    def __init__(self, *, after_s: float | None) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, self._request)
        signal.setitimer(signal.ITIMER_REAL, after_s or 0.0)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = True
            raise KeyboardInterrupt


def batches(client: ReplayClient, *, batch_size: int, device: str) -> Iterator[tuple[Batch, BatchStream]]:
    """Yields batches on a device without end, each with its stream; waits for a server that is away."""
    while True:
        client.wait_until_ready()
        try:
            with client.batches(batch_size=batch_size, prefetch=8, device=device) as stream:
                for batch in stream:
                    yield batch, stream
        except UnavailableError as error:
            logging.warning("waits for the server: %s", error)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    parser.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    parser.add_argument("--seconds", type=float, help="time limit in seconds, including the wait for data (default: none)")
    parser.add_argument("--updates", type=int, help="number of updates after which it ends (default: no limit)")
    parser.add_argument("--batch-size", type=int, default=128, help="slices in a batch")
    parser.add_argument("--device", default="cpu", help="device to train on: cpu, cuda or cuda:N (default: cpu, since the model is small)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the model's first weights")
    parser.add_argument("--metrics", type=Path, help="file to which a line of JSON is appended about every second")
    parser.add_argument("--checkpoint", type=Path, help="file from which the weights are loaded, if it exists, and to which they are saved")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(1)  # such small matrices gain nothing from more, and the actors need the cores
    torch.manual_seed(args.seed)
    stop = StopRequest(after_s=args.seconds)

    learner: Learner | None = None
    with ReplayClient(args.address) as client:
        try:
            for batch, stream in batches(client, batch_size=args.batch_size, device=args.device):
                if learner is None:
                    model = WorldModel(batch.obs.shape[-1], batch.action.shape[-1], team=is_team(batch)).to(args.device)
                    learner = Learner(model, metrics=args.metrics, checkpoint=args.checkpoint)
                learner.train(batch, stream)
                if stop.requested or learner.updates == args.updates:
                    break
        except KeyboardInterrupt:
            logging.info("ends training")
        stop.requested = True
    if learner is None:
        logging.warning("ended before there was anything to train on")
        return 0
    learner.report(final=True)
    learner.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
