"""The exact KL divergence of the policy from the reference over the whole vocabulary, token by
token.

    z = h W^T / temperature,  z' = h' W'^T / temperature                                    [N, V]
    p = softmax(z),           p' = softmax(z')
    KL_i = sum_j p_ij (log p_ij - log p'_ij)
         = sum_j p_ij (z_ij - z'_ij) - logsumexp z_i + logsumexp z'_i

With a_ij = z'_ij - z_ij and its mean under the policy m_i = sum_j p_ij a_ij, the two normalisers
drop out of the gradient:

    dKL_i/dz_ij = -p_ij (a_ij - m_i)
    dL/dh_i     = g_i / temperature (dKL/dz W)_i           g = dL/dKL
    dL/dW       = (dKL/dz)^T (g h) / temperature

The reference (h', W') is frozen: it gets no gradient. Estimators from samples (kl_k1, kl_k3) cost
no matmul; this one has no variance and sees the tokens that were not sampled.

Cost: 2 matmuls forward, 4 more backward (g arrives late, so the logits are made again). Memory
beside the results: two chunks of logits, where the reference holds 2 N V logits and as many
log-probabilities.
"""

import torch
from torch import Tensor

from kernels.three_matmuls import CACHED, LN2, add_, check, chunks, wide


def reference(hidden: Tensor, head: Tensor, hidden_ref: Tensor, head_ref: Tensor,
              temperature: float = 1.0) -> Tensor:
    """What `fused` computes, written plainly."""
    logps = ((hidden @ head.T).to(wide(hidden)) / temperature).log_softmax(-1)          # [N, V]
    logits_ref = (hidden_ref @ head_ref.T).to(wide(hidden_ref)).detach() / temperature
    logps_ref = logits_ref.log_softmax(-1)
    return (logps.exp() * (logps - logps_ref)).sum(-1)


def fused(hidden: Tensor, head: Tensor, hidden_ref: Tensor, head_ref: Tensor,
          temperature: float = 1.0) -> Tensor:
    """KL(policy || reference) in nats of each token, [N], float32 at least, >= 0 up to rounding.

    hidden [N, D], head [V, D] of the policy; hidden_ref [N, D'], head_ref [V, D'] of the reference,
    whose width may differ; temperature > 0. The gradient flows to hidden and head; two backward
    calls (with retain_graph) work. Equal inputs give exactly 0. Raises ValueError on what does not
    fit.
    """
    check(hidden, head, temperature)
    check(hidden_ref, head_ref, temperature)
    if len(hidden_ref) != len(hidden) or len(head_ref) != len(head):
        raise ValueError(f"hidden_ref, head_ref: expected N, V = {len(hidden)}, {len(head)}, got "
                         f"{len(hidden_ref)}, {len(head_ref)}")
    return _ExactKL.apply(hidden, head, hidden_ref.detach(), head_ref.detach(), temperature)


class _ExactKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, hidden_ref, head_ref, temperature):
        ctx.save_for_backward(hidden, head, hidden_ref, head_ref)
        ctx.temperature = temperature
        return walk(hidden, head, hidden_ref, head_ref, temperature)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_kl):
        _, *made = walk(*ctx.saved_tensors, ctx.temperature, grad_kl, ctx.needs_input_grad[:2])
        return *made, None, None, None


def walk(hidden: Tensor, head: Tensor, hidden_ref: Tensor, head_ref: Tensor, temperature: float,
         grad_kl: Tensor | None = None, needs: tuple[bool, bool] = (False, False)):
    """(kl [N], grad_hidden, grad_head), chunk by chunk; the gradients are None where not needed."""
    kl = hidden.new_empty(len(hidden), dtype=wide(hidden))
    grad_hidden = hidden.new_empty(hidden.shape) if needs[0] else None
    grad_head = head.new_zeros(head.shape, dtype=wide(head)) if needs[1] else None
    for (rows, bits), (_, bits_ref) in zip(chunks(hidden, head, temperature),
                                           chunks(hidden_ref, head_ref, temperature)):
        kl[rows], total = divergence_(bits, bits_ref, any(needs))
        if not any(needs):
            continue
        q, g = bits_ref, grad_kl[rows, None] * (LN2 / -temperature)                 # [n, V], [n, 1]
        if q.dtype == head.dtype:
            g = g / total
        else:                                       # the range of a half may not hold `total`
            q = (q / total).to(head.dtype)
        if needs[0]:
            torch.mm(q, head, out=grad_hidden[rows]).mul_(g)
        if needs[1]:
            add_(grad_head, q.T, (hidden[rows] * g).to(head.dtype), first=False)
    return kl, grad_hidden, grad_head.to(head.dtype) if needs[1] else None


def divergence_(bits: Tensor, bits_ref: Tensor, centre: bool) -> tuple[Tensor, Tensor]:
    """KL in nats [n] and sum_j 2^(bits - max) [n, 1] of logits in bits [n, V], which are used up.

    With `centre`, bits_ref becomes that sum times p (a - m), in bits: see the head of this file.
    """
    kl, total = bits.new_empty(len(bits)), bits.new_empty(len(bits), 1)
    size = max(1, CACHED // bits.shape[1]) if bits.device.type == "cpu" else max(1, len(bits))
    for z, a, out, s in zip(*(x.split(size) for x in (bits, bits_ref, kl, total))):
        top, top_ref = z.amax(-1, keepdim=True), a.amax(-1, keepdim=True)               # [n, 1]
        s_ref = (a - top_ref).exp2_().sum(-1, keepdim=True)
        a -= z
        torch.sum(z.sub_(top).exp2_(), -1, keepdim=True, out=s)
        mean = (z * a).sum(-1, keepdim=True) / s
        shift = (top_ref - top) + (s_ref.log2() - s.log2())          # logsumexp z' - logsumexp z
        torch.mul((shift - mean)[:, 0], LN2, out=out)
        if centre:
            a.sub_(mean).mul_(z)
    return kl, total
