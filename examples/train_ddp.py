"""Data-parallel training with torch.distributed: each rank trains on its part of the same global batches.

    touchline-server serve &
    python examples/record_gymnasium.py --address 127.0.0.1:50051 --episodes 10
    torchrun --nproc-per-node 4 examples/train_ddp.py --address 127.0.0.1:50051 --updates 1000

The model predicts each reward from the observation before it and the action. DistributedDataParallel averages the gradients of the ranks,
and `batches(rank=..., world_size=...)` gives each rank its part of one global batch: four ranks with batches of 64 train as one process
with batches of 256 would. After a restart, `--first-batch` says how many updates were made before. On the CPU, with gloo. Rank 0 prints
lines of JSON, with a checksum over the slices that all ranks have trained on.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from touchline import Batch, ReplayClient

REPORT_EVERY = 20
PRIME = 2**31 - 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    parser.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    parser.add_argument("--updates", type=int, default=1_000, help="number of updates")
    parser.add_argument("--batch-size", type=int, default=64, help="slices of each rank")
    parser.add_argument("--first-batch", type=int, default=0, help="updates that were made before")
    parser.add_argument("--seed", type=int, default=0, help="seed of the network and the draws")
    return parser.parse_args()


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Returns the mean squared error of the predicted rewards."""
    inputs = torch.cat([batch.obs[:-1], batch.action], dim=-1)
    loss: torch.Tensor = (model(inputs) - batch.reward).square().mean()
    return loss


def checksum(batch: Batch) -> torch.Tensor:
    """Returns a number that depends on which slices a batch has, but not on their order."""
    return ((batch.episode_id * 1_000_003 + batch.start * 7919) % PRIME).square().remainder(PRIME).sum()


def main() -> None:
    args = parse_arguments()
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    with ReplayClient(args.address) as client:
        client.wait_until_ready()
        job: dict[str, Any] = {"rank": rank, "world_size": world_size, "first_batch": args.first_batch, "seed": args.seed}
        with client.batches(batch_size=args.batch_size, **job) as batches:
            batch = next(batches)
            torch.manual_seed(args.seed)
            network = nn.Sequential(nn.Linear(batch.obs.shape[-1] + batch.action.shape[-1], 64), nn.Tanh(), nn.Linear(64, 1))
            model = DistributedDataParallel(network)
            optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
            losses, slices = torch.zeros(()), torch.zeros((), dtype=torch.int64)
            for update in range(args.first_batch + 1, args.first_batch + args.updates + 1):
                loss = loss_of(model, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses, slices = losses + loss.detach(), slices + checksum(batch)
                if update % REPORT_EVERY == 0:
                    dist.all_reduce(losses)
                    dist.all_reduce(slices)
                    if rank == 0:
                        mean = float(losses) / REPORT_EVERY / world_size
                        print(json.dumps({"update": update, "loss": mean, "slices": int(slices)}), flush=True)
                    losses, slices = torch.zeros(()), torch.zeros((), dtype=torch.int64)
                batch = next(batches)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
