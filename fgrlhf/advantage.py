"""From token rewards to advantages: equations (5) and (6), and GAE for the baseline.

    (5)  r~_t = r_t - beta (logp_old_t - logp_ref_t)
    (6)  A_t  = standardised r~_t                              fine-grained: no critic, no GAE
    GAE  d_t  = r~_t + gamma V_{t+1} - V_t,   A_t = d_t + gamma lambda A_{t+1}     baseline only

All tensors are response-aligned [B, T] with `mask` True on real tokens; padding comes out as 0 and
changes nothing. The paper's reading is gamma = 0: the advantage of a token is its own reward.
"""

import torch
from torch import Tensor


def penalise_kl(rewards: Tensor, logp_old: Tensor, logp_ref: Tensor, mask: Tensor,
                beta: float) -> Tensor:
    """Equation (5), in nats: r_t - beta (logp_old_t - logp_ref_t) on real tokens, 0 in padding."""
    if not rewards.shape == logp_old.shape == logp_ref.shape == mask.shape:
        raise ValueError(f"rewards, logp_old, logp_ref: expected (B, T) = {tuple(mask.shape)}, "
                         f"got {tuple(rewards.shape)}, {tuple(logp_old.shape)}, "
                         f"{tuple(logp_ref.shape)}; pass the response part only")
    return torch.where(mask, rewards - beta * (logp_old - logp_ref), 0.0)


def standardise(x: Tensor, mask: Tensor, how: str = "mean-std", eps: float = 1e-6) -> Tensor:
    """The project's one standardisation, over all real tokens of the batch together.

        mean-std  (x - mean) / (std + eps)     population std, so that one token gives 0, not NaN
        rms       x / (rms + eps)              keeps the sign: a good token stays good
        none      x

    x, mask [B, T] -> [B, T], 0 in the padding. An empty mask gives zeros.
    """
    if how not in ("mean-std", "rms", "none"):
        raise ValueError(f"how: expected mean-std, rms or none, got {how!r}")
    x = torch.where(mask, x, 0.0)
    count = mask.sum().clamp(min=1)
    if how == "mean-std":
        x = torch.where(mask, x - x.sum() / count, 0.0)
    if how == "none":
        return x
    return x / ((x.square().sum() / count).sqrt() + eps)


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + gamma G_{t+1} over the response: [B, T] -> [B, T]. gamma = 0: the rewards."""
    return generalised_advantage(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def generalised_advantage(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float,
                          lam: float) -> tuple[Tensor, Tensor]:
    """GAE (Schulman et al. 2016): (advantages, returns = advantages + values), each [B, T].

    values[:, t] is the critic's estimate before token t is chosen, read one position earlier, like
    logp. After the last token the value is 0, also when truncated: the reward model has judged it.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    later_advantage = later_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * later_value - values[:, t]
        later_advantage = torch.where(mask[:, t], delta + gamma * lam * later_advantage, 0.0)
        later_value = values[:, t]
        advantages[:, t] = later_advantage
    return advantages, torch.where(mask, advantages + values, 0.0)
