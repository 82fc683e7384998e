"""PPO's clipped loss straight from hidden states: three matmuls, one chunk of logits.

    logp_t = log softmax(h_t W^T / temperature)[y_t],   rho_t = exp(logp_t - logp_old_t)
    L      = -1/M sum_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)                   (7)

dL/dlogp_t is known as soon as logp_t is (clipped_surrogate.py):

    g_t = -1/M rho_t A_t  where the unclipped term is the smaller one, else 0

so dL/dh and dL/dW are finished chunk by chunk while its logits are there (three_matmuls.py), and
backward only multiplies them by the scalar it is given. Log-probabilities whose backward makes the
logits again need a fourth matmul; the reference needs three and keeps N V logits twice.

Cost: 3 matmuls of 2 N D V (1 without gradient). Memory: the two gradients and one chunk of logits.
M is the number of response tokens of the whole minibatch: losses and statistics of microbatches
add. There is no mask: select first (`hidden[response_mask]`), a padded position then costs no
matmul.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import clipped_surrogate, linear_logp
from kernels.three_matmuls import check, sum_of_terms


class PPOLoss(NamedTuple):
    """All but logp are sums over the N tokens / denominator: over microbatches they add."""
    loss: Tensor                  # () the only member with a gradient
    logp: Tensor                  # [N] log-probabilities under the present policy, nats
    clip_fraction: Tensor         # () share of tokens with |rho - 1| > eps
    kl_k1: Tensor                 # () mean of -log rho: estimates KL(old || new) in nats; any sign
    kl_k3: Tensor                 # () mean of rho - 1 - log rho: the same, never negative
    entropy: Tensor               # () mean entropy in nats; NaN where hidden gets no gradient


def reference(hidden: Tensor, head: Tensor, targets: Tensor, logp_old: Tensor, advantages: Tensor,
              clip_eps: float, temperature: float = 1.0,
              denominator: float | None = None) -> PPOLoss:
    """What `fused` computes, written plainly."""
    denominator = max(len(hidden), 1) if denominator is None else denominator
    logp, _, entropy = linear_logp.reference(hidden, head, targets, temperature, entropy=True)
    out = clipped_surrogate.reference(logp, logp_old, advantages, clip_eps, denominator=denominator)
    return PPOLoss(out.loss, logp.detach(), *out[1:], entropy.sum() / denominator)


def fused(hidden: Tensor, head: Tensor, targets: Tensor, logp_old: Tensor, advantages: Tensor,
          clip_eps: float, temperature: float = 1.0, denominator: float | None = None) -> PPOLoss:
    """The clipped loss (7) of N response tokens; the gradient flows to hidden and head.

    hidden [N, D] and head [V, D] of one floating dtype; targets [N] int64; logp_old [N] nats;
    advantages [N]; clip_eps > 0; temperature > 0, the one of sampling; denominator: tokens of the
    whole minibatch, None = N. With N = 0 loss and gradients are 0. A first backward costs nothing;
    a second one (with retain_graph) makes the gradients again. Raises ValueError on what does not
    fit.
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
