"""A learner of TD-MPC2's shape, written for this measurement: its networks, its losses and one compiled update.

The shape is that of TD-MPC2 with ``model_size`` 5 (Hansen et al. 2024, sections 3 and 4): an encoder, latent dynamics with simplicial
normalisation, a reward head and five Q functions over 101 bins, a policy; consistency, reward and value losses along the horizon, then
the policy's loss, and a slowly following copy of the Q functions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.workloads import W1

LATENT, HIDDEN, ENCODER, BINS, QS, GROUP = 512, 512, 256, 101, 5, 8
DISCOUNT, DECAY, FOLLOW, CLIP = 0.99, 0.5, 0.01, 20.0
LOW, HIGH = -10.0, 10.0
"""Ends of the bins, on the scale of :func:`squash`."""


def squash(value: torch.Tensor) -> torch.Tensor:
    """Returns the symmetric logarithm of a value."""
    return value.sign() * torch.log1p(value.abs())


def two_hot(value: torch.Tensor) -> torch.Tensor:
    """Returns the weights of the two bins around each value: [..., 1] to [..., BINS]."""
    place = (squash(value).clamp(LOW, HIGH) - LOW) / ((HIGH - LOW) / (BINS - 1))
    bins = torch.arange(BINS, device=value.device, dtype=value.dtype)
    return (1 - (place - bins).abs()).clamp(min=0)


def expected(logits: torch.Tensor) -> torch.Tensor:
    """Returns the value that logits over the bins stand for: [..., BINS] to [..., 1]."""
    bins = torch.linspace(LOW, HIGH, BINS, device=logits.device, dtype=logits.dtype)
    mean = (logits.softmax(-1) * bins).sum(-1, keepdim=True)
    return mean.sign() * torch.expm1(mean.abs())


class SimplicialNorm(nn.Module):
    """A softmax over groups of features."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns features of the same shape."""
        return features.unflatten(-1, (-1, GROUP)).softmax(-1).flatten(-2)


def network(*sizes: int, last: nn.Module | None = None) -> nn.Sequential:
    """Returns linear layers with normalisation and Mish between them.

    Args:
        sizes: number of features before and after each layer.
        last: what follows the last layer's normalisation; None leaves that layer bare.
    """
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(inputs, outputs))
        if number < len(sizes) - 2:
            layers += [nn.LayerNorm(outputs), nn.Mish()]
        elif last is not None:
            layers += [nn.LayerNorm(outputs), last]
    return nn.Sequential(*layers)


class WorldModel(nn.Module):
    """The networks.

    Args:
        obs_size: features of an observation.
        action_size: features of an action.
    """

    def __init__(self, obs_size: int, action_size: int) -> None:
        super().__init__()
        both = LATENT + action_size
        self.encoder = network(obs_size, ENCODER, LATENT, last=SimplicialNorm())
        self.dynamics = network(both, HIDDEN, HIDDEN, LATENT, last=SimplicialNorm())
        self.reward = network(both, HIDDEN, HIDDEN, BINS)
        self.policy = network(LATENT, HIDDEN, HIDDEN, 2 * action_size)
        self.qs = nn.ModuleList(network(both, HIDDEN, HIDDEN, BINS) for _ in range(QS))
        self.slow_qs = nn.ModuleList(network(both, HIDDEN, HIDDEN, BINS) for _ in range(QS)).requires_grad_(False)
        self.slow_qs.load_state_dict(self.qs.state_dict())

    def act(self, latent: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns actions for latents, and their log-deviations."""
        mean, spread = self.policy(latent).chunk(2, dim=-1)
        spread = spread.tanh() * 4 - 4
        return (mean + noise * spread.exp()).tanh(), spread


def world_loss(
    model: WorldModel, obs: torch.Tensor, action: torch.Tensor, reward: torch.Tensor, done: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss of everything but the policy, and the latents along the horizon, [H + 1, B, LATENT].

    Args:
        model: the networks.
        obs: [H + 1, B, obs_size] float32.
        action: [H, B, A] float32.
        reward: [H, B, 1] float32.
        done: [H, B, 1] float32.
        noise: [H, B, A] float32, of the policy in the targets.
    """
    with torch.no_grad():
        later = model.encoder(obs[1:])
        chosen, _ = model.act(later, noise)
        inputs = torch.cat([later, chosen], -1)
        value = torch.minimum(expected(model.slow_qs[0](inputs)), expected(model.slow_qs[1](inputs)))
        target = two_hot(reward + DISCOUNT * (1 - done) * value)
        reward_target = two_hot(reward)
    latents = [model.encoder(obs[0])]
    consistency = torch.zeros((), device=obs.device)
    for step in range(action.shape[0]):
        latents.append(model.dynamics(torch.cat([latents[-1], action[step]], -1)))
        consistency = consistency + functional.mse_loss(latents[-1], later[step]) * DECAY**step
    whole = torch.stack(latents)
    inputs = torch.cat([whole[:-1], action], -1)
    weights = DECAY ** torch.arange(action.shape[0], device=obs.device)
    reward_loss = -(reward_target * model.reward(inputs).log_softmax(-1)).sum(-1).mean(-1)
    value_loss = torch.stack([-(target * q(inputs).log_softmax(-1)).sum(-1).mean(-1) for q in model.qs]).mean(0)
    loss = 20 * consistency + 0.1 * (weights * (reward_loss + value_loss)).sum()
    return loss / action.shape[0], whole.detach()


def policy_loss(model: WorldModel, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Returns the policy's loss over latents [H + 1, B, LATENT], with noise [H + 1, B, A]."""
    action, spread = model.act(latents, noise)
    inputs = torch.cat([latents, action], -1)
    value = (expected(model.qs[0](inputs)) + expected(model.qs[1](inputs))) / 2
    weights = DECAY ** torch.arange(latents.shape[0], device=latents.device)
    return -(weights * (value + 1e-4 * spread.sum(-1, keepdim=True)).mean((1, 2))).mean()


@dataclass(frozen=True)
class Compilation:
    """How the losses and their gradients are compiled."""

    options: dict[str, Any]
    """Arguments of ``torch.compile``."""

    @classmethod
    def on(cls, device: str) -> Compilation:
        """Returns the one for a device: graphs on CUDA; in a dry run only torch's tracing, which takes no compiler and no minute."""
        return cls({"mode": "reduce-overhead"} if device == "cuda" else {"backend": "eager"})


class Trainer:
    """Makes updates.

    Args:
        obs_size: features of an observation.
        action_size: features of an action.
        device: device that the networks are on.
    """

    def __init__(self, obs_size: int, action_size: int, *, device: str) -> None:
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(1)
        self._device = device
        self._model = WorldModel(obs_size, action_size).to(device)
        compilation = Compilation.on(device)
        self._world_loss: Callable[..., Any] = torch.compile(world_loss, **compilation.options)
        self._policy_loss: Callable[..., Any] = torch.compile(policy_loss, **compilation.options)
        model = self._model
        world = [model.encoder, model.dynamics, model.reward, model.qs]
        self._world = [parameter for part in world for parameter in part.parameters()]
        self._policy = list(model.policy.parameters())
        self._fast, self._slow = list(model.qs.parameters()), list(model.slow_qs.parameters())
        options = {"lr": 3e-4, "fused": True, "capturable": True} if device == "cuda" else {"lr": 3e-4}
        self._world_optimizer = torch.optim.Adam(self._world, **options)
        self._policy_optimizer = torch.optim.Adam(self._policy, **options)
        self.loss = torch.zeros((), device=device)
        """Loss of the last update."""

    def update(self, obs: torch.Tensor, action: torch.Tensor, reward: torch.Tensor, done: torch.Tensor) -> None:
        """Queues one update on a batch; see :func:`world_loss` for the shapes."""
        torch.compiler.cudagraph_mark_step_begin()
        loss, latents = self._world_loss(self._model, obs, action, reward, done, torch.randn_like(action))
        latents = latents.clone()  # a graph's output, which the next graph may overwrite
        self.loss = loss.detach().clone()
        self._descend(loss, self._world, self._world_optimizer)
        noise = torch.randn(*latents.shape[:-1], action.shape[-1], device=self._device)
        self._descend(self._policy_loss(self._model, latents, noise), self._policy, self._policy_optimizer)
        with torch.no_grad():
            torch._foreach_lerp_(self._slow, self._fast, FOLLOW)

    def _descend(self, loss: torch.Tensor, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimizer.step()
        self._world_optimizer.zero_grad(set_to_none=True)  # the policy's loss also reaches the Q functions
        self._policy_optimizer.zero_grad(set_to_none=True)


def compile_ahead(obs_size: int, action_size: int, *, batch_size: int, horizon: int, device: str) -> None:
    """Makes a few updates on noise, so that a later process of this machine finds what they compile in torch's cache on disk."""
    trainer = Trainer(obs_size, action_size, device=device)
    obs = torch.randn(horizon + 1, batch_size, obs_size, device=device)
    action = torch.randn(horizon, batch_size, action_size, device=device)
    reward = torch.randn(horizon, batch_size, 1, device=device)
    for _ in range(3):
        trainer.update(obs, action, reward, torch.zeros_like(reward))


if __name__ == "__main__":
    compile_ahead(*W1.obs_shape, W1.action_size, batch_size=W1.batch_size, horizon=W1.horizon, device="cuda")
