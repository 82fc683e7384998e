"""Losses and statistics of PPO: equation (7), the critic's loss, the first-minibatch check.

    rho_t   = exp(logp_t - logp_old_t)
    (7)       L_clip = -mean over response tokens of min(rho_t A_t, clip(rho_t, 1-eps, 1+eps) A_t)
    critic    L_V = 1/2 mean max((V_t - G_t)^2, (clip(V_t, V_old_t +- eps_V) - G_t)^2)

Means are over the response tokens of the whole minibatch: every loss takes that count as
`denominator`, so that splitting a minibatch into microbatches changes nothing (rule 6).
"""

import torch
from torch import Tensor

from fgrlhf.model import LLaMA
from fgrlhf.rollout import Sequences, locate, states_before
from kernels import linear_ppo


def policy_loss(policy: LLaMA, sequences: Sequences, logp_old: Tensor, advantages: Tensor,
                clip_eps: float, temperature: float, denominator: int):
    """Equation (7) by the fused kernel: no B x T x V logits, three matmuls of the head.

    logp_old, advantages [B, T] -> the kernel's loss and statistics.
    """
    at = locate(sequences)
    hidden = states_before(policy, sequences, at)                                # [N, D]
    return linear_ppo.fused(hidden, policy.head, at.target, logp_old[at.row, at.step],
                            advantages[at.row, at.step], clip_eps, temperature, denominator)


def value_loss(values: Tensor, values_old: Tensor, returns: Tensor, mask: Tensor, clip_eps: float,
               denominator: int) -> Tensor:
    """The clipped critic loss L_V above; all [B, T], masked."""
    # Masked before the arithmetic: after it, a NaN in the padding would be 0 here, NaN in backward.
    values, values_old, returns = (torch.where(mask, x, 0.0) for x in (values, values_old, returns))
    clipped = values_old + (values - values_old).clamp(-clip_eps, clip_eps)
    worse = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * worse.sum() / max(denominator, 1)


def kl_estimates(logp: Tensor, logp_ref: Tensor, mask: Tensor) -> dict[str, float]:
    """KL(pi || ref) in nats a token, from samples of pi.

    k1 = mean(-log r) and k3 = mean(r - 1 - log r), r = pi_ref / pi, are unbiased; k3 is never
    negative (Schulman 2020, "Approximating KL divergence").
    """
    log_r = (logp_ref - logp)[mask]
    return {"kl_k1": -log_r.mean().item(), "kl_k3": (log_r.exp() - 1 - log_r).mean().item()}


def check_first_ratio(logp: Tensor, logp_old: Tensor, tolerance: float = 1e-3) -> float:
    """Rule 2: before the first update the ratio is 1, or sampling and scoring disagree.

    Returns the largest |log ratio|; raises FloatingPointError above `tolerance` nats.
    """
    worst = (logp - logp_old).abs().max().item()
    if not worst <= tolerance:
        raise FloatingPointError(
            f"ratio on the first minibatch: expected |log ratio| <= {tolerance}, got {worst:.3g}; "
            "sampling and scoring compute different functions (temperature, precision, padding or "
            "dropout)")
    return worst
