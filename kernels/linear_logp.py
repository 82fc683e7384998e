"""Log-probabilities of chosen tokens straight from hidden states: no [N, V] logits, no [N, V] gradient.

    z_ij  = h_i . W_j / temperature                        logits                          [N, V]
    logp_i = z_i,y(i) - log sum_j exp z_ij                 y(i) the token that was chosen  [N]

With p_ij = exp(z_ij - logsumexp_i) and g_i = dL/dlogp_i, the gradients are

    dL/dz_ij = -g_i q_ij,   q = p - onehot(y)              softmax minus one-hot           [n, V]
    dL/dh_i  = -g_i / temperature  (q W)_i                 one matmul
    dL/dW    = -q^T (g h) / temperature                    one matmul
    entropy_i = -logp_i - h_i . (q W)_i / temperature      read off the second matmul for N D work

g only ever multiplies [n, D] tensors, so a chunk of logits is touched three times: the matmul writes
it, a softmax works in place, one entry a row is lowered by 1. `gradients` is that loop; it serves
every loss that is a sum of functions of logp_i alone (linear_ppo.py, linear_cross_entropy.py).

Cost in matmuls of 2 N D V: fused without gradient 1; with gradient 4, since dL/dlogp arrives only in
backward and the logits are made again there. Memory beside the results: one chunk of logits
(`chunk_rows`) against the reference's N V logits and as many gradients, 4 bytes each.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LN2 = 0.6931471805599453          # logits are held in bits, z / ln 2: 2^x is 3 times faster than e^x on a CPU
COLUMNS = 1024                    # CPU: vocabulary columns a matmul writes at once
PART = 2**18                      # CPU: logits exponentiated at once, 1 MiB of float32


class LogProb(NamedTuple):
    logp: Tensor                  # [N] log-probability of the target, nats; float32 at least
    logsumexp: Tensor             # [N] log-normaliser of the logits; not differentiable
    entropy: Tensor | None        # [N] entropy of the distribution, nats; not differentiable


def reference(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0,
              entropy: bool = False) -> LogProb:
    """What `fused` computes, written plainly."""
    logits = upcast(hidden @ head.T) / temperature                                      # [N, V]
    logps = logits.log_softmax(-1)
    return LogProb(logps.gather(-1, targets[:, None])[:, 0], logits.detach().logsumexp(-1),
                   -(logps.exp() * logps).sum(-1).detach() if entropy else None)


def fused(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0,
          entropy: bool = False) -> LogProb:
    """Log-probability of each target under softmax(hidden head^T / temperature).

    hidden [N, D] and head [V, D] of one floating dtype, targets [N] int64 in [0, V), temperature > 0.
    Gradients flow from logp to hidden and head; logsumexp and entropy carry none. Raises ValueError
    on shapes that do not fit. Non-finite numbers pass through: the caller decides what they mean.
    """
    check(hidden, head, targets, temperature)
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


@torch.no_grad()
def score(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float,
          entropy: bool) -> LogProb:
    """The forward pass: one matmul, one chunk of logits."""
    logp, lse = (hidden.new_empty(len(hidden), dtype=wide(hidden)) for _ in range(2))
    spread = torch.empty_like(logp) if entropy else None
    for rows, bits in chunks(hidden, head, temperature):
        chosen, top, total, mean = exponentiate_(bits, targets[rows], entropy)
        torch.mul(top + total.log2(), LN2, out=lse[rows])
        torch.sub(chosen * LN2, lse[rows], out=logp[rows])
        if entropy:
            torch.mul(total.log2() - mean / total, LN2, out=spread[rows])
    return LogProb(logp, lse, spread)


class Gradients(NamedTuple):
    logp: Tensor                  # [N]
    entropy: Tensor | None        # [N]; None where no gradient for hidden was asked for
    hidden: Tensor | None         # [N, D] dL/dhidden, dtype of hidden
    head: Tensor | None           # [V, D] dL/dhead, dtype of head


@torch.no_grad()
def gradients(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float,
              slope: Callable[[slice, Tensor], Tensor], needs: tuple[bool, bool]) -> Gradients:
    """Forward and backward of a loss whose slope(rows, logp[rows]) -> dL/dlogp [n] is known at once."""
    logp = hidden.new_empty(len(hidden), dtype=wide(hidden))
    entropy = torch.empty_like(logp) if needs[0] else None
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
    grad_head = torch.zeros_like(head, dtype=wide(head)) if needs[1] else None
    for rows, bits in chunks(hidden, head, temperature):
        y = targets[rows, None]
        chosen, top, total = exponentiate_(bits, y[:, 0])[:3]
        logp[rows] = (chosen - top - total.log2()) * LN2
        g = slope(rows, logp[rows]).div(-temperature)[:, None]                          # [n, 1]
        total = total[:, None]
        bits.scatter_add_(-1, y, -total)                                                # q total
        if bits.dtype == head.dtype:
            q, g = bits, g / total
        else:                                       # a half's range may not hold `total`: divide first
            q, total = (bits / total).to(head.dtype), 1.0
        if needs[0]:
            back = q @ head                                                             # [n, D]
            entropy[rows] = -logp[rows] - ((hidden[rows] * back).sum(-1, True) / total)[:, 0] / temperature
            torch.mul(back, g, out=grad_hidden[rows])
        if needs[1]:
            pulled = (hidden[rows] * g).to(head.dtype)                                  # [n, D]
            grad_head.addmm_(q.T, pulled) if q is bits else grad_head.add_(q.T @ pulled)
    return Gradients(logp, entropy, grad_hidden, None if grad_head is None else grad_head.to(head.dtype))


def hand_over(ctx, grad_loss: Tensor | None) -> list[Tensor | None]:
    """The gradients that forward left in ctx.made, times grad_loss, in place; a second call raises."""
    if ctx.made is None:
        raise RuntimeError("backward was called twice: this loss makes its gradients in forward and "
                           "hands them over once; compute the loss again")
    made, ctx.made = ctx.made, None
    if grad_loss is None:
        return [None for _ in made]
    if grad_loss.device.type == "cpu" and grad_loss == 1:        # a look at an accelerator would wait
        return made
    return [None if x is None else x.mul_(grad_loss) for x in made]


def chunks(hidden: Tensor, head: Tensor, temperature: float):
    """(rows, logits [n, V] in bits, float32 at least) for slices of tokens; one buffer serves them all."""
    size = chunk_rows(len(hidden), len(head), hidden.device)
    buffer = hidden.new_empty(min(size, len(hidden)), len(head))
    columns = COLUMNS if hidden.device.type == "cpu" else len(head)
    for start in range(0, len(hidden), size):
        rows = slice(start, min(start + size, len(hidden)))
        bits = buffer[:rows.stop - start]
        for part, words in zip(bits.split(columns, 1), head.split(columns)):
            torch.addmm(part, hidden[rows], words.T, beta=0, alpha=1 / (temperature * LN2), out=part)
        yield rows, upcast(bits)


def exponentiate_(bits: Tensor, targets: Tensor, entropy: bool = False) -> tuple[Tensor, ...]:
    """logits [n, V] in bits -> 2^(logits - top) in place, a few rows at a time to stay in the cache.

    Returns, [n] each: the target's logit, the row's largest `top`, the new row's sum `total`, and
    with `entropy` sum_j 2^x_j x_j of x = logits - top.
    """
    chosen = bits.gather(-1, targets[:, None])[:, 0]
    top, total = torch.empty_like(chosen), torch.empty_like(chosen)
    mean = torch.empty_like(chosen) if entropy else None
    size = max(1, (PART if bits.device.type == "cpu" else bits.numel()) // max(1, bits.shape[1]))
    for start in range(0, len(bits), size):
        rows = slice(start, start + size)
        x = bits[rows]
        torch.amax(x, -1, out=top[rows])
        x.sub_(top[rows, None])
        e = x.exp2() if entropy else x.exp2_()
        torch.sum(e, -1, out=total[rows])
        if entropy:
            torch.sum(e.mul_(x), -1, out=mean[rows])
    return chosen, top, total, mean


def chunk_rows(n: int, v: int, device: torch.device) -> int:
    """Tokens a chunk: 256, or more while a chunk of float32 logits stays within 4 MiB (CPU) or 1 GiB.

    A CPU wants a chunk near its caches, an accelerator few launches. The chunks come out equal, so
    that none is a remainder too small for the matrix unit; what is one chunk's work stays one chunk.
    """
    most = max(256, (2**20 if device.type == "cpu" else 2**28) // v)
    return max(1, -(-n // -(-n // most))) if n else 1


def wide(x: Tensor) -> torch.dtype:
    """float32 at least: the dtype of every reduction."""
    return torch.promote_types(x.dtype, torch.float32)


def upcast(x: Tensor) -> Tensor:
    return x.to(wide(x))


def check(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> None:
    """Raises ValueError naming what does not fit."""
    n, d = hidden.shape
    if head.ndim != 2 or head.shape[1] != d:
        raise ValueError(f"head: expected (V, D) = (V, {d}), got {tuple(head.shape)}")
    if targets.shape != (n,):
        raise ValueError(f"targets: expected (N,) = ({n},), got {tuple(targets.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected > 0, got {temperature}")
