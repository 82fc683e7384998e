"""Cross-entropy directly from hidden states, for SFT: three matmuls, one chunk of logits.

    logp_t = log softmax(h_t W^T)[y_t]
    L      = -1/M sum_t w_t logp_t               w_t a mask or a weight,  M = sum_t w_t by default
    dL/dlogp_t = -w_t / M                        known before the first logit (three_matmuls.py)

torch.nn.functional.linear_cross_entropy is not used for three reasons: it is new in torch 2.13; it
takes a weight per class but none per token; and at its best chunk size it is 5-7% slower and holds
1.25-1.36 times the memory (python -m kernels.bench).

Cost: 3 matmuls of 2 N D V operations (1 without gradient). Memory: the two gradients and one chunk
of logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import linear_logp
from kernels.three_matmuls import check, sum_of_terms, wide


class CrossEntropy(NamedTuple):
    loss: Tensor                  # () nats per token; the only member with a gradient
    logp: Tensor                  # [N] log-probability of each target, nats


def reference(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None = None,
              denominator: float | None = None) -> CrossEntropy:
    """Computes the same as `fused`, in the plain form."""
    logp = linear_logp.reference(hidden, head, targets).logp
    weights = weights_of(weights, hidden)
    denominator = total(weights) if denominator is None else denominator
    return CrossEntropy(-(weights * logp).sum() / denominator, logp.detach())


def fused(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None = None,
          denominator: float | None = None) -> CrossEntropy:
    """The weighted mean of -logp over N tokens. hidden and head get gradients.

    hidden [N, D], head [V, D]: of one floating dtype. targets [N] int64. weights [N]: floats or a
    bool mask (True: counted), None for all 1. denominator: the total weight of the whole minibatch,
    None for that of these tokens. Loss and gradients are 0 when all weights are 0.

    Leave masked tokens out of the call if you can, because they cost as much as others. The first
    backward call costs nothing; a second (with retain_graph) computes the gradients again. Raises
    ValueError when shapes or dtypes do not fit.
    """
    check(hidden, head, 1.0, targets=targets, weights=weights)
    weights = weights_of(weights, hidden)
    slope = weights / -(total(weights) if denominator is None else denominator)          # [N]
    return CrossEntropy(*sum_of_terms(hidden, head, targets, 1.0,
                                      lambda rows, logp: (slope[rows] * logp, slope[rows]))[:2])


def weights_of(weights: Tensor | None, hidden: Tensor) -> Tensor:
    """The weights as [N] in float32 or wider. Every weight is 1 when none are given."""
    dtype = wide(hidden)
    if weights is None:
        return hidden.new_ones(len(hidden), dtype=dtype)
    return weights.detach().to(dtype)


def total(weights: Tensor) -> Tensor:
    """The weight of all tokens together, or 1 if it is 0, so that the loss is 0 and not 0 / 0."""
    weight = weights.sum()
    return torch.where(weight == 0, 1.0, weight)
