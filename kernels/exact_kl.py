"""The exact KL divergence of the policy from the reference, over the whole vocabulary.

    z = h W^T / temperature,  z' = h' W'^T / temperature                                    [N, V]
    p = softmax(z),           p' = softmax(z')
    KL_i = sum_j p_ij (log p_ij - log p'_ij)
         = sum_j p_ij (z_ij - z'_ij) - logsumexp z_i + logsumexp z'_i

Let a_ij = z'_ij - z_ij, with the mean m_i = sum_j p_ij a_ij under the policy. The two normalisers
then drop out of the gradient:

    dKL_i/dz_ij = -p_ij (a_ij - m_i)
    dL/dh_i     = g_i / temperature (dKL/dz W)_i           g = dL/dKL
    dL/dW       = (dKL/dz)^T (g h) / temperature

The reference (h', W') is frozen and gets no gradient. Estimates from samples (kl_k1, kl_k3) cost no
matmul; the exact KL has no variance and includes the tokens that were not sampled.

Both passes walk over tiles of 1024 tokens x 416 columns of the vocabulary (on a CPU). For each
token the forward pass keeps the running maxima m and m', and three sums:

    s = sum_j 2^(z_j - m)      s' = sum_j 2^(z'_j - m')      t = sum_j 2^(z_j - m) a_j

A new maximum scales the sums of its model by 2^(old - new). From m, s and t / s, one number per
token each, the backward pass computes dKL/dz of any tile without looking for a maximum again.

Cost: 2 matmuls forward and 4 more backward; g is known only in the backward pass, so the logits are
computed again there. Memory besides the results: two tiles, which are 3.3 MiB in float32 at any N
and V. The reference holds 2 N V logits and as many log-probabilities. The backward pass also holds
a slice [1024, D] of the hidden states and, in half precision, the gradients in float32.
"""

import torch
from torch import Tensor

from kernels.three_matmuls import LN2, add_, check, logits_, wide

TILE_ROWS = 1024
# Logits per tile. On a CPU: 416 columns, because the rows of 512 columns, 2 KiB each, would compete
# for a few sets of the cache. Elsewhere: 256 MiB of float32.
TILE = 13 * 2**15, 2**26


def reference(hidden: Tensor, head: Tensor, hidden_ref: Tensor, head_ref: Tensor,
              temperature: float = 1.0) -> Tensor:
    """Computes the same as `fused`, in the plain form."""
    logps = ((hidden @ head.T).to(wide(hidden)) / temperature).log_softmax(-1)          # [N, V]
    logits_ref = (hidden_ref @ head_ref.T).to(wide(hidden_ref)).detach() / temperature
    logps_ref = logits_ref.log_softmax(-1)
    return (logps.exp() * (logps - logps_ref)).sum(-1)


def fused(hidden: Tensor, head: Tensor, hidden_ref: Tensor, head_ref: Tensor,
          temperature: float = 1.0) -> Tensor:
    """KL(policy || reference) of each token in nats, [N], float32 or wider, >= 0 up to rounding.

    hidden [N, D], head [V, D]: of the policy. hidden_ref [N, D'], head_ref [V, D']: of the
    reference, whose width may differ. temperature > 0. hidden and head get gradients, and a second
    backward call (with retain_graph) works. Equal models give exactly 0. Raises ValueError when
    shapes, dtypes or the temperature do not fit.
    """
    check(hidden, head, temperature)
    check(hidden_ref, head_ref, temperature)
    if len(hidden_ref) != len(hidden) or len(head_ref) != len(head):
        raise ValueError(f"hidden_ref, head_ref: expected N, V = {len(hidden)}, {len(head)} of the "
                         f"policy, got {len(hidden_ref)}, {len(head_ref)}; pass the same tokens, "
                         "and a reference with the same vocabulary")
    return _ExactKL.apply(hidden, head, hidden_ref.detach(), head_ref.detach(), temperature)


class _ExactKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *models_and_temperature):
        *models, ctx.temperature = models_and_temperature
        kl, *sums = divergence(*models_and_temperature)
        ctx.save_for_backward(*models, *sums)
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_kl):
        models, sums = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        made = gradients(*models, ctx.temperature, *sums, grad_kl, ctx.needs_input_grad[:2])
        return *made, None, None, None


def divergence(hidden: Tensor, head: Tensor, hidden_ref: Tensor, head_ref: Tensor,
               temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward pass: returns KL in nats [N], and m (bits), s, t / s (bits), [N, 1] each."""
    kl = hidden.new_empty(len(hidden), dtype=wide(hidden))
    sums = kl.new_zeros(5, len(hidden), 1)
    sums[:2] = -torch.inf
    for rows, tiles in slices(hidden, head):
        top, top_ref, s, s_ref, t = sums[:, rows]                                       # [n, 1]
        for words, z, a in tiles:                                                # [n, columns]
            write_(a, hidden_ref[rows], head_ref[words], temperature)
            new = torch.maximum(top_ref, a.amax(-1, keepdim=True))
            e = torch.sub(a, new, out=z).exp2_()                           # z is written later
            s_ref.mul_((top_ref - new).exp2_()).add_(e.sum(-1, keepdim=True))
            top_ref.copy_(new)
            write_(z, hidden[rows], head[words], temperature)
            new = torch.maximum(top, z.amax(-1, keepdim=True))
            decay = (top - new).exp2_()
            top.copy_(new)
            a -= z
            e = z.sub_(new).exp2_()
            s.mul_(decay).add_(e.sum(-1, keepdim=True))
            t.mul_(decay).add_(a.mul_(e).sum(-1, keepdim=True))
    top, top_ref, s, s_ref, t = sums
    mean = t / s
    shift = (top_ref - top) + (s_ref.log2() - s.log2())              # logsumexp z' - logsumexp z
    return torch.mul((shift - mean)[:, 0], LN2, out=kl), top, s, mean


def gradients(hidden: Tensor, head: Tensor, hidden_ref: Tensor, head_ref: Tensor,
              temperature: float, top: Tensor, s: Tensor, mean: Tensor, grad_kl: Tensor,
              needs: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """The backward pass: returns (grad_hidden, grad_head), None for a gradient not needed.

    top, s, mean [N, 1]: m, s, t / s from `divergence`. grad_kl [N]: g.
    """
    dtype = wide(hidden)
    grad_hidden = hidden.new_empty(hidden.shape, dtype=dtype) if needs[0] else None
    grad_head = head.new_zeros(head.shape, dtype=dtype) if needs[1] else None
    for rows, tiles in slices(hidden, head):
        g = grad_kl[rows, None] * (LN2 / -temperature)                                  # [n, 1]
        if dtype == head.dtype:
            g = g / s[rows]
        scaled = (hidden[rows] * g).to(head.dtype) if needs[1] else None                # [n, D]
        for words, z, a in tiles:                                                # [n, columns]
            write_(z, hidden[rows], head[words], temperature)
            write_(a, hidden_ref[rows], head_ref[words], temperature)
            a.sub_(z).sub_(mean[rows])
            q = a.mul_(z.sub_(top[rows]).exp2_())
            if dtype != head.dtype:                      # s may exceed the range of float16
                q = q.div_(s[rows]).to(head.dtype)
            if needs[0]:
                add_(grad_hidden[rows], q, head[words], first=words.start == 0)
            if needs[1]:
                add_(grad_head[words], q.T, scaled, first=rows.start == 0)
        del scaled                                       # freed before the next slice
        if needs[0]:
            grad_hidden[rows] *= g
    return tuple(None if x is None else x.to(head.dtype) for x in (grad_hidden, grad_head))


def slices(hidden: Tensor, head: Tensor):
    """Yields (rows, tiles) for slices of the tokens; tiles yields (words, z, a) for columns.

    words: a slice of the vocabulary. z, a [n, columns]: space for the logits of both models. All
    tiles use the same two buffers.
    """
    size = max(1, min(TILE_ROWS, len(hidden)))
    columns = min(len(head), max(1, TILE[hidden.device.type != "cpu"] // size))
    buffers = [hidden.new_empty(size * columns, dtype=wide(hidden)) for _ in range(2)]

    def tiles(n):
        for start in range(0, len(head), columns):
            words = slice(start, min(start + columns, len(head)))
            width = words.stop - start
            yield words, *(x[:n * width].view(n, width) for x in buffers)
    for start in range(0, len(hidden), size):
        rows = slice(start, min(start + size, len(hidden)))
        yield rows, tiles(rows.stop - start)


def write_(out: Tensor, hidden: Tensor, head: Tensor, temperature: float) -> None:
    """out [n, columns] = the logits in bits, written by the matmul directly if the dtypes agree."""
    if out.dtype == hidden.dtype:
        logits_(out, hidden, head, temperature)
    else:
        out.copy_(logits_(hidden.new_empty(out.shape), hidden, head, temperature))
