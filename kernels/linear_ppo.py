"""PPO's clipped loss directly from hidden states: three matmuls, one chunk of logits.

    logp_t = log softmax(h_t W^T / temperature)[y_t],   rho_t = exp(logp_t - logp_old_t)
    L      = -1/M sum_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)                   (7)

dL/dlogp_t is known as soon as logp_t is known (clipped_surrogate.py):

    g_t = -1/M rho_t A_t  when the unclipped term is the smaller one, else 0

So dL/dh and dL/dW are computed chunk by chunk, while the logits of the chunk exist
(three_matmuls.py). The backward pass only multiplies them by the scalar that it gets. (The path
through linear_logp.py computes the logits again in the backward pass, a fourth matmul. The
reference needs three matmuls, but keeps N V logits twice.)

M is the number of response tokens of the whole minibatch, so losses and statistics of its
microbatches add up. There is no mask: pass the response tokens only (`hidden[response_mask]`), so
that padding costs no matmul.

Cost: 3 matmuls of 2 N D V operations (1 without gradient). Memory: the two gradients and one chunk
of logits.
"""

from typing import NamedTuple

from torch import Tensor

from kernels import clipped_surrogate, linear_logp
from kernels.three_matmuls import check, sum_of_terms


class PPOLoss(NamedTuple):
    """All except logp are sums over the N tokens, divided by `denominator`; microbatches add up."""
    loss: Tensor                  # () the only member with a gradient
    logp: Tensor                  # [N] log-probabilities under the current policy, nats
    clip_fraction: Tensor         # () fraction of the tokens with |rho - 1| > eps
    kl_k1: Tensor                 # () mean of -log rho: an estimate of KL(old || new) in nats
    kl_k3: Tensor                 # () mean of rho - 1 - log rho: another, which is never negative
    entropy: Tensor               # () mean entropy in nats; NaN when hidden gets no gradient


def reference(hidden: Tensor, head: Tensor, targets: Tensor, logp_old: Tensor, advantages: Tensor,
              clip_eps: float, temperature: float = 1.0,
              denominator: float | None = None) -> PPOLoss:
    """Computes the same as `fused`, in the plain form."""
    denominator = max(len(hidden), 1) if denominator is None else denominator
    logp, _, entropy = linear_logp.reference(hidden, head, targets, temperature, entropy=True)
    out = clipped_surrogate.reference(logp, logp_old, advantages, clip_eps, denominator=denominator)
    return PPOLoss(out.loss, logp.detach(), *out[1:], entropy.sum() / denominator)


def fused(hidden: Tensor, head: Tensor, targets: Tensor, logp_old: Tensor, advantages: Tensor,
          clip_eps: float, temperature: float = 1.0, denominator: float | None = None) -> PPOLoss:
    """The clipped loss (7) of N response tokens. hidden and head get gradients.

    hidden [N, D], head [V, D]: of one floating dtype. targets [N] int64. logp_old [N] in nats.
    advantages [N]. clip_eps >= 0. temperature > 0: the temperature of sampling. denominator: the
    response tokens of the whole minibatch, None for N. Loss and gradients are 0 when N = 0.

    The first backward call costs nothing; a second (with retain_graph) computes the gradients
    again. Raises ValueError when shapes, dtypes or the temperature do not fit.
    """
    check(hidden, head, temperature, targets=targets, logp_old=logp_old, advantages=advantages)
    logp_old, advantages = logp_old.detach(), advantages.detach()
    denominator = max(len(hidden), 1) if denominator is None else denominator

    def term(rows, logp):
        value, slope = clipped_surrogate.objective(
            logp - logp_old[rows], advantages[rows], clip_eps)
        return value / -denominator, slope / -denominator

    loss, logp, entropy = sum_of_terms(hidden, head, targets, temperature, term)
    entropy = logp.new_tensor(float("nan")) if entropy is None else entropy.sum() / denominator
    moved = clipped_surrogate.statistics(logp - logp_old, clip_eps, denominator)
    return PPOLoss(loss, logp, *moved, entropy)
