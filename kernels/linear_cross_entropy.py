"""Cross-entropy straight from hidden states, for SFT: three matmuls, one chunk of logits.

    logp_t = log softmax(h_t W^T)[y_t]
    L      = -1/M sum_t w_t logp_t               w_t a mask or a weight,  M = sum_t w_t by default
    dL/dlogp_t = -w_t / M                        known before the first logit: three_matmuls.py

Why not torch.nn.functional.linear_cross_entropy: torch 2.13 has it and 2.11 does not; it takes a
weight per class and none per token; and at its best chunk size it is 5-7% slower and
holds 1.25-1.36 times the memory (python -m kernels.bench).

Cost: 3 matmuls of 2 N D V (1 without gradient). Memory: the two gradients and one chunk of logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import linear_logp
from kernels.three_matmuls import check, sum_of_terms, wide


class CrossEntropy(NamedTuple):
    loss: Tensor                  # () nats a token; the only member with a gradient
    logp: Tensor                  # [N] log-probability of each target, nats


def reference(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None = None,
              denominator: float | None = None) -> CrossEntropy:
    """What `fused` computes, written plainly."""
    logp = linear_logp.reference(hidden, head, targets).logp
    weights = weights_of(weights, hidden)
    denominator = total(weights) if denominator is None else denominator
    return CrossEntropy(-(weights * logp).sum() / denominator, logp.detach())


def fused(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None = None,
          denominator: float | None = None) -> CrossEntropy:
    """Weighted mean of -logp over N tokens; the gradient flows to hidden and head.

    hidden [N, D] and head [V, D] of one floating dtype; targets [N] int64; weights [N]: a bool mask
    (True = counted) or floats, None = all 1; denominator: weight of the whole minibatch, None =
    that of these tokens. With weight 0 in all, loss and gradients are 0. A token known to be masked
    is better not passed: it costs as much as any. A first backward costs nothing; a second one
    (with retain_graph) makes the gradients again. Raises ValueError on what does not fit.
    """
    check(hidden, head, 1.0, targets=targets, weights=weights)
    weights = weights_of(weights, hidden)
    share = weights / -(total(weights) if denominator is None else denominator)          # [N]
    return CrossEntropy(*sum_of_terms(hidden, head, targets, 1.0,
                                      lambda rows, logp: (share[rows] * logp, share[rows]))[:2])


def weights_of(weights: Tensor | None, hidden: Tensor) -> Tensor:
    """[N] in float32 at least; 1 for each token where none are given."""
    dtype = wide(hidden)
    if weights is None:
        return hidden.new_ones(len(hidden), dtype=dtype)
    return weights.detach().to(dtype)


def total(weights: Tensor) -> Tensor:
    """The weight of all tokens; 1 where it is 0, so that the loss is 0 and not 0 / 0."""
    weight = weights.sum()
    return torch.where(weight == 0, 1.0, weight)
