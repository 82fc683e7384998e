"""Log-probabilities of chosen tokens directly from hidden states, without the [N, V] logits.

    z_ij   = h_i . W_j / temperature                       logits
    logp_i = z_i,y(i) - log sum_j exp z_ij                 y(i) is the chosen token

    dL/dh_i = -g_i / temperature (q W)_i                   g = dL/dlogp, q = softmax(z) - onehot(y)
    dL/dW   = -q^T (g h) / temperature

The forward pass keeps no logits. It walks over tiles of 2048 tokens x 512 columns of the vocabulary
(on a CPU; 256 columns with entropy, which needs two buffers). For each token it keeps the running
maximum m and two sums, s = sum_j exp(z_ij - m) and t = sum_j exp(z_ij - m) (z_ij - m):

    logsumexp = m + log s        entropy = log s - t / s
    on a new maximum m':         t <- c (t + s (m - m')),  s <- c s,  c = exp(m - m')

g is known only in the backward pass, which computes the logits again (three_matmuls.py). A loss
whose g is known in the forward pass saves this fourth matmul: linear_ppo.py,
linear_cross_entropy.py.

Cost: 1 matmul of 2 N D V operations without gradient, 4 with. Memory besides the results: one tile
(4 MiB) without gradient, one chunk of logits with. The reference holds N V logits and as many
log-probabilities.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.three_matmuls import LN2, check, gradients, logits_, wide

TILE_ROWS = 2048
TILE = 2**20, 2**28               # logits per tile: 4 MiB of float32 on a CPU, 1 GiB elsewhere


class LogProb(NamedTuple):
    logp: Tensor                  # [N] log-probability of the target, nats; float32 or wider
    logsumexp: Tensor             # [N] log-normaliser of the logits, nats; has no gradient
    entropy: Tensor | None        # [N] entropy of the distribution, nats; has no gradient


def reference(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0,
              entropy: bool = False) -> LogProb:
    """Computes the same as `fused`, in the plain form."""
    logits = (hidden @ head.T).to(wide(hidden)) / temperature                           # [N, V]
    logps = logits.log_softmax(-1)
    return LogProb(logps.gather(-1, targets[:, None])[:, 0], logits.detach().logsumexp(-1),
                   -(logps.exp() * logps).sum(-1).detach() if entropy else None)


def fused(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0,
          entropy: bool = False) -> LogProb:
    """The log-probability of each target under softmax(hidden head^T / temperature).

    hidden [N, D], head [V, D]: of one floating dtype. targets [N] int64 in [0, V). temperature > 0.
    Through logp, hidden and head get gradients; a second backward call (with retain_graph) works.
    Non-finite numbers pass through, and the caller decides what they mean. Raises ValueError when
    shapes, dtypes or the temperature do not fit.
    """
    check(hidden, head, temperature, targets=targets)
    return LogProb(*_LinearLogProb.apply(hidden, head, targets, temperature, entropy))


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, entropy):
        ctx.save_for_backward(hidden, head, targets)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        out = score(hidden, head, targets, temperature, entropy)
        ctx.mark_non_differentiable(*out[1:2 + entropy])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp, *_):
        if grad_logp is None:
            return None, None, None, None, None
        made = gradients(*ctx.saved_tensors, ctx.temperature,
                         lambda rows, logp: grad_logp[rows], ctx.needs_input_grad[:2])
        return made.hidden, made.head, None, None, None


def score(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float,
          entropy: bool) -> LogProb:
    """The forward pass, without gradient: one matmul, one tile of logits at a time."""
    n, v = len(hidden), len(head)
    size = min(TILE_ROWS, n)
    columns = TILE[hidden.device.type != "cpu"] // (max(size, 1) * (1 + entropy))
    columns = min(v, max(1, columns))
    buffer = hidden.new_empty(size * columns)
    spare = torch.empty_like(buffer, dtype=wide(hidden)) if entropy else None
    out = hidden.new_empty(2 + entropy, n, dtype=wide(hidden))
    for start in range(0, n, max(1, size)):
        rows = slice(start, min(start + size, n))
        torch.mul(torch.stack(tiles(hidden[rows], head, targets[rows], temperature, buffer, spare)),
                  LN2, out=out[:, rows])
    return LogProb(out[0], out[1], out[2] if entropy else None)


def tiles(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, buffer: Tensor,
          spare: Tensor | None) -> tuple[Tensor, ...]:
    """Returns (logp, logsumexp) of n tokens in bits, [n] each, and the entropy if `spare` is given.

    buffer, spare: space for one tile of logits each.
    """
    n, first, entropy = len(hidden), True, spare is not None
    columns = len(buffer) // n
    for start in range(0, len(head), columns):
        words = head[start:start + columns]
        x = logits_(buffer[:n * len(words)].view(n, len(words)), hidden, words, temperature)
        x = x.to(wide(x))                                                           # [n, columns]
        here = (targets - start).clamp(0, len(words) - 1)
        found = x.gather(-1, here[:, None])[:, 0]
        x_top = x.amax(-1)
        new_top = x_top if first else torch.maximum(top, x_top)
        x -= new_top[:, None]
        e = torch.exp2(x, out=spare[:x.numel()].view_as(x)) if entropy else x.exp2_()
        x_total = e.sum(-1)
        x_mean = e.mul_(x).sum(-1) if entropy else None
        if first:
            chosen, top, total, mean, first = found, x_top, x_total, x_mean, False
            continue
        chosen = torch.where(here == targets - start, found, chosen)
        shift = top - new_top
        decay = shift.exp2()
        if entropy:
            mean = decay * (mean + total * shift) + x_mean
        total = decay * total + x_total
        top = new_top
    spread = total.log2()
    lse = top + spread
    return (chosen - lse, lse, spread - mean / total) if entropy else (chosen - lse, lse)
