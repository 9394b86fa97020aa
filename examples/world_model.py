"""A small latent world model in the style of TD-MPC2 (Hansen et al. 2024, "TD-MPC2: Scalable, Robust World Models", section 3).

An encoder maps an observation to a latent state z, the dynamics maps (z, action) to the next z, the reward head maps (z, action) to the
reward. All learn together on slices of H transitions: from the first observation the model runs on its own predictions, which
have to agree with the observations, with step t weighted by rho^t. The latent targets come from a slowly following (EMA) copy of the
encoder. A team is modelled with the same weights for every player; dynamics and reward also get the mean over the team. TD-MPC2's value
functions, policy prior and planner are left out; the reward is one number here, not a discrete distribution.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Losses(NamedTuple):
    """Losses of one batch, as scalars."""

    total: Tensor
    consistency: Tensor
    """Squared distance between the predicted and the target latents, weighted by step."""
    reward: Tensor
    """Error of the reward, in standard deviations of the reward (smooth L1), weighted by step."""


class SimNorm(nn.Module):
    """Softmax over groups of 8: a latent cannot collapse or blow up (TD-MPC2, section 3.1)."""

    def forward(self, z: Tensor) -> Tensor:
        return F.softmax(z.unflatten(-1, (-1, 8)), dim=-1).flatten(-2)


class Normalizer(nn.Module):
    """Running mean and standard deviation of its inputs, in float64."""

    count: Tensor
    mean: Tensor
    square: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("square", torch.zeros(size, dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """Adds x [..., size] to the statistics."""
        rows = x.reshape(-1, x.shape[-1]).double()
        self.count += len(rows)
        self.mean += (rows.mean(0) - self.mean) * len(rows) / self.count
        self.square += (rows.square().mean(0) - self.square) * len(rows) / self.count

    @property
    def std(self) -> Tensor:
        """[size] float64, at least 1e-3."""
        return (self.square - self.mean.square()).clamp(min=1e-6).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.std).clamp(-10.0, 10.0).float()

    def inverse(self, x: Tensor) -> Tensor:
        return (x * self.std + self.mean).float()


def mlp(inputs: int, outputs: int, *, hidden: int = 128) -> nn.Sequential:
    """Returns linear, LayerNorm, Mish, linear: TD-MPC2's block."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.Mish(), nn.Linear(hidden, outputs))


class WorldModel(nn.Module):
    """Encoder, latent dynamics and reward head.

    Args:
        obs_size: size of the flat observation.
        action_size: size of the flat action.
        latent_size: a multiple of 8.
        rho: weight of step t is rho^t.
        target_follows: share of the encoder that the EMA target adopts at each `follow()`.
        team: whether observations, actions and rewards have an axis of players before their own: [..., players, size].
    """

    def __init__(
        self,
        obs_size: int,
        action_size: int,
        *,
        latent_size: int = 64,
        rho: float = 0.5,
        target_follows: float = 0.01,
        team: bool = False,
    ) -> None:
        super().__init__()
        self.rho, self.target_follows, self.team = rho, target_follows, team
        inputs = (latent_size + action_size) * (2 if team else 1)
        self.obs_norm, self.reward_norm = Normalizer(obs_size), Normalizer(1)
        self.encoder = nn.Sequential(mlp(obs_size, latent_size), SimNorm())
        self.dynamics = nn.Sequential(mlp(inputs, latent_size), SimNorm())
        self.reward = mlp(inputs, 1)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def loss(self, obs: Tensor, action: Tensor, reward: Tensor) -> Losses:
        """Returns the losses of a batch, and updates the normalisation with it.

        Args:
            obs: [H+1, B, obs_size]. action: [H, B, action_size]. reward: [H, B, 1]. Of a team with players before the last axis.
        """
        self.obs_norm.update(obs)
        self.reward_norm.update(reward)
        obs, reward = self.obs_norm(obs), self.reward_norm(reward)
        targets = self.target_encoder(obs[1:])
        z = self.encoder(obs[0])
        consistency = reward_error = torch.zeros(())
        for t in range(len(action)):
            z_action = self._joined(z, action[t])
            z = self.dynamics(z_action)
            consistency = consistency + self.rho**t * F.mse_loss(z, targets[t])
            reward_error = reward_error + self.rho**t * F.smooth_l1_loss(self.reward(z_action), reward[t])
        return Losses(20.0 * consistency + reward_error, consistency.detach(), reward_error.detach())

    @torch.no_grad()
    def predict_rewards(self, obs: Tensor, action: Tensor) -> Tensor:
        """Returns the rewards [H, B, 1] that actions [H, B, action_size] from obs [B, obs_size] should bring, in the reward's own unit."""
        z = self.encoder(self.obs_norm(obs))
        rewards = []
        for step_action in action:
            z_action = self._joined(z, step_action)
            rewards.append(self.reward(z_action))
            z = self.dynamics(z_action)
        return self.reward_norm.inverse(torch.stack(rewards))

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the EMA target a little towards the encoder; call it after each update."""
        for slow, fast in zip(self.target_encoder.parameters(), self.encoder.parameters(), strict=True):
            slow.lerp_(fast, self.target_follows)

    def _joined(self, z: Tensor, action: Tensor) -> Tensor:
        """Returns latents and actions side by side; of a team, each player's followed by the mean over all players."""
        z_action = torch.cat((z, action), dim=-1)
        if not self.team:
            return z_action
        return torch.cat((z_action, z_action.mean(dim=-2, keepdim=True).expand_as(z_action)), dim=-1)
