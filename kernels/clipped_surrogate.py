"""PPO's clipped loss on given log-probabilities, with its gradient in closed form: equation (7).

    rho_t = exp(logp_t - logp_old_t)
    L     = -1/M sum_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)                    (7)
    dL/dlogp_t = -1/M rho_t A_t  when the unclipped term is the smaller one, else 0

The unclipped term is the smaller one unless (A_t > 0 and rho_t > 1 + eps) or (A_t < 0 and
rho_t < 1 - eps). M is the number of response tokens of the whole minibatch, so the losses of its
microbatches add up.

Cost: no matmul. Each of the N numbers is read once, and one gradient per token is kept for the
backward pass. Autograd through the reference keeps four tensors of N numbers and a mask.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.three_matmuls import wide


class Surrogate(NamedTuple):
    """Sums over the unmasked tokens, divided by `denominator`, so microbatches add up."""
    loss: Tensor                  # () the only member with a gradient
    clip_fraction: Tensor         # () fraction of the tokens with |rho - 1| > eps
    kl_k1: Tensor                 # () mean of -log rho: an estimate of KL(old || new) in nats
    kl_k3: Tensor                 # () mean of rho - 1 - log rho: another, which is never negative


def reference(logp: Tensor, logp_old: Tensor, advantages: Tensor, clip_eps: float,
              mask: Tensor | None = None, denominator: float | None = None) -> Surrogate:
    """The clipped loss (7) and its statistics, in plain lines.

    logp, logp_old (nats), advantages: tensors of one shape. mask: the same shape, True on response
    tokens, None for all. clip_eps >= 0. denominator: the response tokens of the whole minibatch,
    None for those of this mask. Loss and gradient are 0 when every token is masked.
    """
    mask = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    denominator = max(int(mask.sum()), 1) if denominator is None else denominator
    # A masked entry may hold anything. It is replaced before the arithmetic: 0 * inf is not 0.
    log_ratio = torch.where(mask, logp.to(wide(logp)) - logp_old, 0.0)
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).sum() / denominator
    return Surrogate(loss, *statistics(log_ratio.detach(), clip_eps, denominator))


def fused(logp: Tensor, logp_old: Tensor, advantages: Tensor, clip_eps: float,
          mask: Tensor | None = None, denominator: float | None = None) -> Surrogate:
    """Computes the same as `reference`, with the gradient in closed form. Only `logp` gets one.

    Raises ValueError when the shapes differ.
    """
    for name, x in (("logp_old", logp_old), ("advantages", advantages), ("mask", mask)):
        if x is not None and x.shape != logp.shape:
            raise ValueError(f"{name}: expected the shape of logp, {tuple(logp.shape)}, got "
                             f"{tuple(x.shape)}; pass the same tokens")
    if denominator is None:
        denominator = max(logp.numel() if mask is None else int(mask.sum()), 1)
    return Surrogate(*_ClippedSurrogate.apply(logp, logp_old.detach(), advantages.detach(), mask,
                                              clip_eps, denominator))


class _ClippedSurrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, logp_old, advantages, mask, clip_eps, denominator):
        log_ratio = logp.to(wide(logp)) - logp_old
        if mask is not None:
            log_ratio, advantages = log_ratio.where(mask, 0.0), advantages.where(mask, 0.0)
        value, slope = objective(log_ratio, advantages, clip_eps)
        ctx.save_for_backward(slope)
        ctx.scale, ctx.dtype = -1 / denominator, logp.dtype
        out = (-value.sum() / denominator, *statistics(log_ratio, clip_eps, denominator))
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        (slope,) = ctx.saved_tensors
        return (slope * (grad_loss * ctx.scale)).to(ctx.dtype), None, None, None, None, None


def objective(log_ratio: Tensor, advantages: Tensor, clip_eps: float) -> tuple[Tensor, Tensor]:
    """Returns min(rho A, clip(rho) A) and its derivative with respect to log rho, per token.

    NaN stays NaN in both.
    """
    ratio = log_ratio.exp()
    free = ratio * advantages
    bound = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    return torch.minimum(free, bound), torch.where(free > bound, 0.0, free)


def statistics(log_ratio: Tensor, clip_eps: float, denominator: float) -> tuple[Tensor, ...]:
    """Returns clip_fraction, kl_k1, kl_k3. A token with log_ratio 0 adds nothing to any of them."""
    over = log_ratio.expm1()                                                       # rho - 1
    return ((over.abs() > clip_eps).sum() / denominator, -log_ratio.sum() / denominator,
            (over - log_ratio).sum() / denominator)
