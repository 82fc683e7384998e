"""Losses of log-probabilities from hidden states: forward and backward pass in three matmuls.

    z_ij   = h_i . W_j / temperature                       logits                          [N, V]
    logp_i = z_i,y(i) - log sum_j exp z_ij                 y(i) is the chosen token        [N]

For a loss L = sum_i f_i(logp_i), the gradient g_i = dL/dlogp_i is known as soon as logp_i is known.
PPO's clipped loss and cross-entropy are such losses. (Any other loss knows g in its backward pass.)
With p_ij = exp(z_ij - logsumexp_i) and q = p - onehot(y):

    dL/dz = -g q                                           [n, V]
    dL/dh = -g (q W) / temperature                         [n, D], the second matmul
    dL/dW = -q^T (g h) / temperature                       [V, D], the third matmul
    entropy_i = -logp_i - h_i . (q W)_i / temperature      from the second, for N D more operations

`gradients` walks over the tokens in chunks and computes all of this while the logits of the chunk
exist. g and the normaliser multiply only tensors [n, D]. A chunk [n, V] is written by its matmul,
turned into 2^(z - max z) in place, reduced by its sum at the target, and read by two matmuls.

Logits are held in bits, z / ln 2, because on a CPU 2^x costs a third of e^x; the matmul applies the
factor at no cost. Reductions are in float32 or wider; float64 stays float64.

Cost: 3 matmuls of 2 N D V operations (1 without gradient). Memory: the gradients and one chunk of
logits. In half precision also as many logits in float32 as are exponentiated at a time and, if
there are several chunks, grad_head in float32, because a sum must not be rounded after each chunk.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LN2 = 0.6931471805599453          # nats per bit
CHUNK = 256, 1024                 # the fewest tokens per chunk: in float32 and float64, in half
LOGITS = 11 * 2**17, 2**28        # logits per chunk: 5.5 MiB of float32 on a CPU, 1 GiB elsewhere
PAD = 16                          # unused logits after each row whose bytes are a multiple of 4096:
                                  # otherwise a column uses few sets of the cache (3 of 50 ms)
COLUMNS = 1024                    # on a CPU: columns of the vocabulary that one matmul writes
CACHED = 2**20                    # on a CPU: logits exponentiated at a time, 4 MiB of float32
ROWS = 64, 1024                   # rows of h . (q W) at a time: on a CPU, elsewhere

# (rows, logp [n]) -> f [n], df/dlogp [n]
Term = Callable[[slice, Tensor], tuple[Tensor, Tensor]]


def sum_of_terms(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float,
                 term: Term) -> tuple[Tensor, Tensor, Tensor | None]:
    """Computes L = sum_i f_i(logp_i).

    term(rows, logp [n]) returns (f [n], df/dlogp [n]) for a slice of the tokens. Returns (L, which
    has a gradient, logp [N], entropy [N]). The forward pass computes the gradients. The first
    backward call scales them by the number it gets and returns them without a copy; a second call
    (with retain_graph) computes them again.
    """
    if not torch.is_grad_enabled():
        hidden, head = hidden.detach(), head.detach()            # no gradients in forward
    return _SumOfTerms.apply(hidden, head, targets, temperature, term)


class _SumOfTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, term):
        ctx.save_for_backward(hidden, head, targets)
        ctx.others = temperature, term
        ctx.set_materialize_grads(False)
        losses = []

        def slope(rows, logp):
            values, slopes = term(rows, logp)
            losses.append(values.sum())
            return slopes

        made = gradients(hidden, head, targets, temperature, slope, ctx.needs_input_grad[:2])
        ctx.made = made.hidden, made.head
        ctx.mark_non_differentiable(*(x for x in made[:2] if x is not None))
        return torch.stack(losses).sum() if losses else made.logp.sum(), made.logp, made.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return None, None, None, None, None
        made, ctx.made = ctx.made, None
        if made is None:
            temperature, term = ctx.others
            made = gradients(*ctx.saved_tensors, temperature,
                             lambda rows, logp: term(rows, logp)[1], ctx.needs_input_grad[:2])[2:]
        if grad_loss.device.type != "cpu" or grad_loss != 1:    # reading from a GPU would wait
            made = [None if x is None else x.mul_(grad_loss) for x in made]
        return *made, None, None, None


class Gradients(NamedTuple):
    logp: Tensor                  # [N] nats
    entropy: Tensor | None        # [N] nats; None when hidden needs no gradient
    hidden: Tensor | None         # [N, D] dL/dhidden, in the dtype of hidden
    head: Tensor | None           # [V, D] dL/dhead, in the dtype of head


@torch.no_grad()
def gradients(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float,
              slope: Callable[[slice, Tensor], Tensor], needs: tuple[bool, bool]) -> Gradients:
    """Computes log-probabilities, entropies and gradients chunk by chunk (see the top of the file).

    slope(rows, logp[rows]) returns g = dL/dlogp [n]. needs: whether hidden and head need gradients.
    """
    n = len(hidden)
    logp = hidden.new_empty(n, dtype=wide(hidden))
    entropy = torch.empty_like(logp) if needs[0] else None
    grad_hidden = hidden.new_empty(hidden.shape) if needs[0] else None
    one_chunk = n <= most_tokens(len(head), head.dtype, head.device.type)
    summed = head.dtype if one_chunk else wide(head)
    grad_head = head.new_empty(head.shape, dtype=summed) if needs[1] else None
    if needs[1] and n == 0:
        grad_head.zero_()
    for rows, bits in chunks(hidden, head, temperature):
        h = hidden[rows]
        chosen, top, total = exponentiate_(bits, targets[rows, None])                   # [n, 1]
        torch.mul(chosen - top - total.log2(), LN2, out=logp[rows, None])
        g = slope(rows, logp[rows])[:, None] / -temperature                             # [n, 1]
        if bits.dtype != logp.dtype:                                                    # bits is q
            total = torch.ones_like(total)
        g = g / total
        if needs[1]:                                # grad hidden overwrites g h afterwards
            scaled = torch.mul(h, g, out=grad_hidden[rows]) if needs[0] else (h * g).to(head.dtype)
            add_(grad_head, bits.T, scaled, first=rows.start == 0)
        if needs[0]:
            back = torch.mm(bits, head, out=grad_hidden[rows])                          # [n, D]
            few = ROWS[h.device.type != "cpu"]                                  # no [n, D] at once
            inner = torch.cat([(x * q).sum(-1, keepdim=True, dtype=logp.dtype)
                               for x, q in zip(h.split(few), back.split(few))]) / total
            torch.sub(inner[:, 0] / -temperature, logp[rows], out=entropy[rows])
            back *= g
    return Gradients(logp, entropy, grad_hidden, grad_head.to(head.dtype) if needs[1] else None)


def add_(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or total = a @ b if `first`. `total` may have a wider dtype than a and b."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    else:
        total.copy_(a @ b) if first else total.add_(a @ b)


def chunks(hidden: Tensor, head: Tensor, temperature: float):
    """Yields (rows, logits [n, V] in bits) for slices of the tokens, all in the same buffer."""
    n, v = len(hidden), len(head)
    most = most_tokens(v, hidden.dtype, hidden.device.type)
    size = -(-n // max(1, -(-n // most)))
    buffer = hidden.new_empty(size, v + PAD * (v % 1024 == 0))[:, :v]
    columns = COLUMNS if hidden.device.type == "cpu" else v
    for start in range(0, n, max(1, size)):
        rows = slice(start, min(start + size, n))
        bits = buffer[:rows.stop - start]
        for part, words in zip(bits.split(columns, 1), head.split(columns)):
            logits_(part, hidden[rows], words, temperature)
        yield rows, bits


def most_tokens(v: int, dtype: torch.dtype, device: str) -> int:
    """The most tokens of a chunk, for v words and a type of device such as "cpu"."""
    return max(CHUNK[dtype.itemsize < 4], LOGITS[device != "cpu"] // v)


def logits_(out: Tensor, hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    """out [n, v] = hidden head^T / (temperature ln 2): the logits in bits, in place."""
    return torch.addmm(out, hidden, head.T, beta=0, alpha=1 / (temperature * LN2), out=out)


def exponentiate_(bits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turns bits [n, V] in place into `total` times q, and those in half precision into q.

    Returns the logit of each target, the largest logit of each row, `top`, and the sum of
    2^(bits - top), `total`: [n, 1] each, in float32 or wider. Works on as many rows at a time as
    fit the cache. `total` times q needs no division, but may exceed the range of float16.
    """
    dtype = wide(bits)
    columns = chosen, top, total = [bits.new_empty(len(bits), 1, dtype=dtype) for _ in range(3)]
    size = max(1, CACHED // bits.shape[1]) if bits.device.type == "cpu" else max(1, len(bits))
    half = bits.dtype != dtype
    buffer = bits.new_empty(min(size, len(bits)), bits.shape[1], dtype=dtype) if half else None
    for out, y, *parts in zip(*(x.split(size) for x in (bits, targets, *columns))):
        x = buffer[:len(out)].copy_(out) if half else out
        x_chosen, x_top, x_total = parts
        torch.gather(x, -1, y, out=x_chosen)
        torch.amax(x, -1, keepdim=True, out=x_top)
        torch.sum(x.sub_(x_top).exp2_(), -1, keepdim=True, out=x_total)
        x.scatter_add_(-1, y, -x_total)
        if half:
            out.copy_(x.div_(x_total))
    return chosen, top, total


def wide(x: Tensor) -> torch.dtype:
    """The dtype of every reduction of `x`: float32, or the dtype of `x` if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def check(hidden: Tensor, head: Tensor, temperature: float, **per_token: Tensor | None) -> None:
    """Raises ValueError when shapes, dtypes or the temperature do not fit.

    per_token: tensors by name that must be [N].
    """
    if hidden.ndim != 2 or head.ndim != 2 or head.shape[1] != hidden.shape[1] or not len(head):
        raise ValueError(f"hidden, head: expected (N, D) and (V, D) with V > 0, got "
                         f"{tuple(hidden.shape)} and {tuple(head.shape)}; pass one hidden state "
                         "per token")
    if hidden.dtype != head.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden, head: expected one floating dtype, got {hidden.dtype}, "
                         f"{head.dtype}; convert one of them")
    for name, x in per_token.items():
        if x is not None and x.shape != hidden.shape[:1]:
            raise ValueError(f"{name}: expected (N,) = ({len(hidden)},), got {tuple(x.shape)}; "
                             "pass one value per hidden state")
    if not temperature > 0:
        raise ValueError(f"temperature: expected > 0, got {temperature}; pass the temperature of "
                         "sampling")
