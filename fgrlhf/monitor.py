"""What a PPO run logs of its rollouts each iteration, none of it needed for training.

    k1, k3     KL(policy || reference) from the sampled tokens; see ppo.kl_estimates
    exact      the same KL over the whole vocabulary, sum_j p_j log (p_j / p'_j), at the tokens of a
               few responses: two more forward passes of them (kernels/exact_kl.py)
"""

import torch
from torch import Tensor

from fgrlhf.model import LLaMA
from fgrlhf.ppo import kl_estimates
from fgrlhf.rollout import Rollout, Sequences, by_length, locate, states_before
from kernels import exact_kl


def rollout_metrics(rollout: Rollout, logp_ref: Tensor, rewards: Tensor) -> dict[str, float]:
    """The namespace rollout/: KL in nats a token, calibrated reward, lengths in tokens.

    logp_ref and rewards [B, T]; the KL is not yet taken off the rewards.
    """
    sequences, mask = rollout.sequences, rollout.sequences.response_mask
    truncated = rollout.truncated.float().mean().item()
    kl = kl_estimates(rollout.logp_old, logp_ref, mask)
    return {f"rollout/{name}": value for name, value in kl.items()} | {
        "rollout/reward": rewards.sum().item() / len(rewards),
        "rollout/reward_per_token": rewards[mask].mean().item(),
        "rollout/length": sequences.response_lengths.float().mean().item(),
        "rollout/eos": 1 - truncated,
        "rollout/truncated": truncated}


@torch.no_grad()
def whole_kl(policy: LLaMA, ref: LLaMA, sequences: Sequences, temperature: float, responses: int,
             microbatch: int) -> float:
    """KL(policy || ref) over the whole vocabulary, nats a token, of the first `responses` rows."""
    total, count = 0.0, 0
    rows = list(range(min(responses, len(sequences.tokens))))
    for group in by_length(sequences, rows, microbatch):
        part = sequences.rows(group)
        at = locate(part)
        states = [states_before(model, part, at) for model in (policy, ref)]
        kl = exact_kl.fused(states[0], policy.head, states[1], ref.head, temperature)        # [N]
        total, count = total + kl.sum().item(), count + len(kl)
    return total / count
