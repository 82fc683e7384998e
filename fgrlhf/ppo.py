"""The clipped policy loss, equation (7), and the statistics of a PPO iteration.

    rho_t = exp(logp_t - logp_old_t)
    (7)     L_clip = -mean over response tokens of min(rho_t A_t, clip(rho_t, 1-eps, 1+eps) A_t)
    KL      of the policy from the reference, by three estimates: k1, k3, exact

The mean is over the response tokens of the whole minibatch. The loss takes their number as
`denominator`, so that splitting a minibatch into microbatches changes nothing (rule 6).
"""

import torch
from torch import Tensor

from fgrlhf.model import LLaMA
from fgrlhf.rollout import Rollout
from fgrlhf.sequences import Sequences, by_length, hidden_before, locate
from fgrlhf.tokenizer import Tokenizer
from kernels import exact_kl, linear_ppo


def policy_loss(policy: LLaMA, sequences: Sequences, logp_old: Tensor, advantages: Tensor,
                clip_eps: float, temperature: float, denominator: int) -> linear_ppo.PPOLoss:
    """Equation (7). In its plain form:

        logp = score(policy, sequences, temperature)                         # [B, T]
        ratio = (logp - logp_old).exp()
        clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
        objective = torch.minimum(ratio * advantages, clipped * advantages)
        loss = -objective[sequences.response_mask].sum() / denominator

    logp_old [B, T] in nats; advantages [B, T], standardised. Returns the loss with a gradient, logp
    of each response token [N], and statistics. kernels/clipped_surrogate.py:reference is the plain
    form as code; the kernel used here computes the same from hidden states and never holds the
    logits [B, T, V].
    """
    at = locate(sequences)
    hidden = hidden_before(policy, sequences, at)                                # [N, D]
    return linear_ppo.fused(hidden, policy.head, at.target, logp_old[at.row, at.t],
                            advantages[at.row, at.t], clip_eps, temperature, denominator)


def check_first_ratio(logp: Tensor, logp_old: Tensor, tolerance: float = 1e-3,
                      what: str = "ratio on the first minibatch",
                      cause: str = "sampling and scoring compute different functions (temperature, "
                      "precision, padding or dropout)") -> float:
    """Checks rule 2: before the first update the ratio is 1, or sampling and scoring disagree.

    Returns the largest |log ratio|. Raises FloatingPointError when it exceeds `tolerance` nats.
    """
    worst = (logp - logp_old).abs().max().item()
    if not worst <= tolerance:
        raise FloatingPointError(f"{what}: expected |log ratio| <= {tolerance}, got {worst:.3g}; "
                                 f"{cause}")
    return worst


def kl_estimates(logp: Tensor, logp_ref: Tensor, mask: Tensor) -> dict[str, float]:
    """Estimates KL(pi || ref) in nats per token, from samples of pi.

    With q = pi_ref / pi: k1 = mean(-log q) and k3 = mean(q - 1 - log q). Both are unbiased, and k3
    is never negative (Schulman 2020, "Approximating KL divergence"). All arguments are [B, T].
    """
    log_q = (logp_ref - logp)[mask]
    return {"kl_k1": -log_q.mean().item(), "kl_k3": (log_q.exp() - 1 - log_q).mean().item()}


@torch.no_grad()
def exact_kl_of(policy: LLaMA, ref: LLaMA, sequences: Sequences, temperature: float, responses: int,
                microbatch: int) -> float:
    """Returns KL(policy || ref) over the whole vocabulary, nats per token, on some responses.

    responses: of how many, from the first. This costs two forward passes over them
    (kernels/exact_kl.py).
    """
    total, count = 0.0, 0
    rows = list(range(min(responses, len(sequences.tokens))))
    for group in by_length(sequences, rows, microbatch):
        part = sequences.rows(group)
        at = locate(part)
        hidden, hidden_ref = (hidden_before(model, part, at) for model in (policy, ref))
        kl = exact_kl.fused(hidden, policy.head, hidden_ref, ref.head, temperature)          # [N]
        total, count = total + kl.sum().item(), count + len(kl)
    return total / count


def rollout_metrics(rollout: Rollout, logp_ref: Tensor, rewards: Tensor) -> dict[str, float]:
    """Returns the metrics rollout/...: KL in nats per token, calibrated reward, lengths in tokens.

    logp_ref, rewards are [B, T]; the KL has not been taken off the rewards. All responses count.
    """
    mask = rollout.sequences.response_mask
    truncated = rollout.truncated.float().mean().item()
    kl = kl_estimates(rollout.logp_old, logp_ref, mask)
    return {f"rollout/{name}": value for name, value in kl.items()} | {
        "rollout/reward": rewards.sum().item() / len(rewards),
        "rollout/reward_per_token": rewards[mask].mean().item(),
        "rollout/length": rollout.sequences.response_lengths.float().mean().item(),
        "rollout/eos": 1 - truncated,
        "rollout/truncated": truncated}


def samples_of(rollout: Rollout, logp_ref: Tensor, rewards: Tensor, tokenizer: Tokenizer,
               prompts: list[tuple[int, str]]) -> list[dict]:
    """Returns the responses of an iteration as text, with their KL in nats and summed reward.

    logp_ref, rewards [B, T]. prompts [B]: the number of each prompt among those that are used,
    from 0, and the id of its record.
    """
    sequences, mask = rollout.sequences, rollout.sequences.response_mask
    kl, totals = ((rollout.logp_old - logp_ref) * mask).sum(-1), (rewards * mask).sum(-1)
    result = []
    for b, (prompt, record_id) in enumerate(prompts):
        start, n = int(sequences.prompt_lengths[b]), int(sequences.response_lengths[b])
        ids = sequences.tokens[b, start:start + n].tolist()
        result.append({"prompt": prompt, "id": record_id, "tokens": n,
                       "kl": round(kl[b].item(), 4), "reward": round(totals[b].item(), 4),
                       "output": tokenizer.decode(ids).strip()})
    return result
