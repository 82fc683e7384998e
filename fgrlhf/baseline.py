"""The baseline PPO-RLHF has what the method deletes: a critic, GAE and the value loss.

    V_t     the critic's estimate of the return before token t is chosen
    GAE     d_t = r~_t + gamma V_{t+1} - V_t,   A_t = d_t + gamma lam A_{t+1},   G_t = A_t + V_t
    L_V     1/2 mean over tokens of max((V_t - G_t)^2, (clip(V_t, V_old_t +- eps_V) - G_t)^2)

lam is --gae-lambda. GAE: Schulman et al. 2016 (arXiv 1506.02438). The baseline is that of the
paper's section 3.1.
"""

import copy

import torch
from torch import Tensor, nn

from fgrlhf.engine import lora
from fgrlhf.reward import RewardModel
from fgrlhf.sequences import Sequences, hidden_before, locate, unflatten


class Critic(nn.Module):
    """V_t: a copy of the reward model, read one position before token t."""

    kind, control, response, confidence = "token", None, "sum", False       # see save_reward

    def __init__(self, reward: RewardModel):
        super().__init__()
        self.trunk, self.head = lora.clone(reward.trunk), copy.deepcopy(reward.head)
        self.layer = reward.layer
        self.register_buffer("mean", reward.mean.clone())
        self.register_buffer("scale", reward.scale.clone())

    def forward(self, sequences: Sequences) -> Tensor:
        """Values [B, T] in calibrated reward. values[:, t] is known before token t is chosen."""
        at = locate(sequences)
        hidden = hidden_before(self.trunk, sequences, at, self.layer)                # [N, D]
        values = (self.head(hidden.to(self.head.weight.dtype))[:, 0] - self.mean) / self.scale
        return unflatten(values, at, sequences)


def generalised_advantage(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float,
                          lam: float) -> tuple[Tensor, Tensor]:
    """GAE of `rewards`, the r~_t of equation (5): returns (advantages, advantages + values = G_t).

    All are [B, T]. values[:, t] is the critic's estimate before token t is chosen. After the last
    token the value is 0, also in a truncated response, because the reward model has already judged
    the whole response.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    later_advantage = later_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * later_value - values[:, t]
        advantages[:, t] = later_advantage = delta + gamma * lam * later_advantage
        later_value = values[:, t]
    return advantages, advantages + values


def value_loss(values: Tensor, values_old: Tensor, returns: Tensor, mask: Tensor, clip_eps: float,
               denominator: int) -> Tensor:
    """The clipped loss L_V of the critic. Every tensor is [B, T].

    `denominator` is the number of response tokens of the whole minibatch (rule 6).
    """
    # Masked before the arithmetic: otherwise a NaN in the padding is a NaN in the backward pass.
    values, values_old, returns = (torch.where(mask, x, 0.0) for x in (values, values_old, returns))
    clipped = values_old + (values - values_old).clamp(-clip_eps, clip_eps)
    worse = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * worse.sum() / max(denominator, 1)
