"""The loss of the token-level reward model on minimal edits: equation (4) (paper, section 2.2).

    s_b  = sum_U1+ r_t - sum_U1- r_t                        margin of pair b, changed tokens only
    L_bt = 1/P sum_b -log sigmoid(s_b)                      P pairs with at least one changed token
    L_u0 = lambda/M sum_U0 (r_i+ - r_j-)^2                  "difference", the paper's; M pairings
           lambda/2M sum_U0 (r_i+)^2 + (r_j-)^2             "anchor" pulls their rewards to 0
           lambda/2M sum_U0 -log sigmoid(r_i+) - log sigmoid(r_j-)    "kept" rewards them like the
                                                            tokens that the editor wrote
    L_token = w/K ( sum_U1+ -log sigmoid(r_t) + sum_U1- -log sigmoid(-r_t) )   K tokens of U1; each
                                                            changed token by itself, off at w = 0
    loss = L_bt + L_u0 + L_token

U1+ / U1- are the changed tokens of the chosen / rejected response, U0 the unchanged ones in pairs.
The paper's loss is L_bt + L_u0 with "difference". Gradients, each on the tokens of its own set and
0 elsewhere:

    dL_bt/dr+ = -sigmoid(-s_b) / P        dL_bt/dr- = sigmoid(-s_b) / P      (/ |U1| for "mean")
    dL_u0/dr+ = 2 lambda d / M            dL_u0/dr- = -2 lambda d / M        d = r_i+ - r_j-
                lambda r_i+ / M                       lambda r_j- / M        for "anchor"
                -lambda sigmoid(-r_i+) / 2M           -lambda sigmoid(-r_j-) / 2M    for "kept"
    dL_token/dr+ = -w sigmoid(-r) / K       dL_token/dr- = w sigmoid(r) / K

An empty side (a pure insertion or deletion) counts 0 in s_b. A pair without a changed token has no
margin and is left out of L_bt. An empty set makes its term 0. The means are over the pairs, tokens
and pairings of the whole minibatch (`Totals`). In L_bt every pair has the same weight, long
or short.

Cost: no matmul. The rewards are read once, and their gradients, of the same size, are kept for the
backward pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from kernels.three_matmuls import wide


class Unchanged(NamedTuple):
    """U0 of a batch: M pairings of a chosen token with a rejected token, [M] int64 each."""
    pair: Tensor                  # the row of the batch
    chosen: Tensor                # the token's position in the chosen response
    rejected: Tensor              # the token's position in the rejected response


U0_TERMS = ("difference", "anchor", "kept")


class Options(NamedTuple):
    reduce: str = "sum"           # "sum" (the paper's) or "mean" over the U1 tokens of a side
    u0: str = "difference"        # "difference" (the paper's), "anchor" or "kept"
    u0_weight: float = 1.0        # lambda >= 0
    token_weight: float = 0.0     # w >= 0; 0 is equation (4)


class Totals(NamedTuple):
    """The numbers that the terms are divided by.

    With the totals of the whole minibatch, the losses of its microbatches add up.
    """
    pairs: float                  # P: pairs with a changed token
    changed: float                # K: tokens of U1+ and U1-
    unchanged: float              # M: pairings of U0


class Preference(NamedTuple):
    loss: Tensor                  # () bt + u0 + token; the only member with a gradient
    bt: Tensor                    # () L_bt
    u0: Tensor                    # () L_u0, with lambda
    token: Tensor                 # () L_token, with w
    margin: Tensor                # [B] s_b; 0 for a pair in which nothing changed


def totals(plus_mask: Tensor, minus_mask: Tensor, unchanged: Unchanged) -> Totals:
    """The totals of this batch, at least 1 each."""
    pairs = (plus_mask.any(-1) | minus_mask.any(-1)).sum()
    return Totals(max(int(pairs), 1), max(int(plus_mask.sum() + minus_mask.sum()), 1),
                  max(len(unchanged.pair), 1))


def reference(rewards_chosen: Tensor, rewards_rejected: Tensor, plus_mask: Tensor,
              minus_mask: Tensor, unchanged: Unchanged, options: Options = Options(),
              divisors: Totals | None = None) -> Preference:
    """Computes the same as `fused`, in the plain form."""
    by = totals(plus_mask, minus_mask, unchanged) if divisors is None else divisors
    chosen, rejected = upcast(rewards_chosen), upcast(rewards_rejected)
    plus_sum = torch.where(plus_mask, chosen, 0.0).sum(-1)                              # [B]
    minus_sum = torch.where(minus_mask, rejected, 0.0).sum(-1)
    if options.reduce == "mean":
        plus_sum = plus_sum / plus_mask.sum(-1).clamp(min=1)
        minus_sum = minus_sum / minus_mask.sum(-1).clamp(min=1)
    margin = plus_sum - minus_sum                                                       # (3)
    changed = plus_mask.any(-1) | minus_mask.any(-1)
    bt = softplus(-margin)[changed].sum() / by.pairs            # softplus(-s) = -log sigmoid(s)
    plus_u0 = chosen[unchanged.pair, unchanged.chosen]                                  # [M]
    minus_u0 = rejected[unchanged.pair, unchanged.rejected]
    u0 = {"difference": (plus_u0 - minus_u0) ** 2, "anchor": (plus_u0 ** 2 + minus_u0 ** 2) / 2,
          "kept": (softplus(-plus_u0) + softplus(-minus_u0)) / 2}[options.u0]
    u0 = options.u0_weight * u0.sum() / by.unchanged
    token = softplus(-chosen[plus_mask]).sum() + softplus(rejected[minus_mask]).sum()
    token = options.token_weight * token / by.changed
    return Preference(bt + u0 + token, *(x.detach() for x in (bt, u0, token, margin)))


def fused(rewards_chosen: Tensor, rewards_rejected: Tensor, plus_mask: Tensor, minus_mask: Tensor,
          unchanged: Unchanged, options: Options = Options(),
          divisors: Totals | None = None) -> Preference:
    """The loss (4) of B pairs, and its terms. Both rewards get gradients.

    rewards_chosen [B, T1], rewards_rejected [B, T2]: the reward of each token at its own position,
    in any floating dtype. plus_mask [B, T1], minus_mask [B, T2] bool: True on U1+ and U1-.
    Positions in no set (padding) may hold anything. divisors: the totals of the whole minibatch,
    None for those of this batch. A second backward call (with retain_graph) works. Raises
    ValueError when shapes differ or an option is unknown.
    """
    check(rewards_chosen, rewards_rejected, plus_mask, minus_mask, unchanged, options)
    by = totals(plus_mask, minus_mask, unchanged) if divisors is None else divisors
    return Preference(*_TokenPreference.apply(rewards_chosen, rewards_rejected, plus_mask,
                                              minus_mask, unchanged, options, by))


class _TokenPreference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rewards_chosen, rewards_rejected, plus_mask, minus_mask, unchanged, options,
                by):
        margin, token, grads, margin_slopes = 0.0, 0.0, [], []
        for sign, rewards, mask in ((1, rewards_chosen, plus_mask),
                                    (-1, rewards_rejected, minus_mask)):
            r = torch.where(mask, sign * upcast(rewards), 0.0)                          # [B, T]
            slope = sign * mask.to(r.dtype)                                             # ds/dr
            if options.reduce == "mean":
                slope /= mask.sum(-1, keepdim=True).clamp(min=1)
            margin = margin + (r * slope.abs()).sum(-1)                                 # [B]
            margin_slopes.append(slope)
            token = token + (softplus(-r) * mask).sum()
            grads.append(torch.sigmoid(-r) * mask * (-sign * options.token_weight / by.changed))
        token = token * (options.token_weight / by.changed)
        changed = plus_mask.any(-1) | minus_mask.any(-1)
        bt = (softplus(-margin) * changed).sum() / by.pairs
        pull = torch.sigmoid(-margin)[:, None] / -by.pairs                              # dL_bt/ds
        grads = [g.addcmul_(pull, slope) for g, slope in zip(grads, margin_slopes)]

        at = ((unchanged.pair, unchanged.chosen), (unchanged.pair, unchanged.rejected))
        kept, other = upcast(rewards_chosen[at[0]]), upcast(rewards_rejected[at[1]])    # [M]
        scale = options.u0_weight / by.unchanged
        if options.u0 == "difference":
            d = kept - other
            u0, slopes = d.square().sum() * scale, (2 * scale * d, -2 * scale * d)
        elif options.u0 == "kept":
            u0 = (softplus(-kept) + softplus(-other)).sum() * (scale / 2)
            slopes = (torch.sigmoid(-kept) * (-scale / 2), torch.sigmoid(-other) * (-scale / 2))
        else:
            u0 = (kept.square() + other.square()).sum() * (scale / 2)
            slopes = (scale * kept, scale * other)
        for g, where, slope in zip(grads, at, slopes):
            g.index_put_(where, slope, accumulate=True)

        ctx.save_for_backward(*grads)
        ctx.dtypes = rewards_chosen.dtype, rewards_rejected.dtype
        ctx.set_materialize_grads(False)
        out = (bt + u0 + token, bt, u0, token, margin)
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * 7
        return *((g * grad_loss).to(t) for g, t in zip(ctx.saved_tensors, ctx.dtypes)), *[None] * 5


def upcast(x: Tensor) -> Tensor:
    """`x` in float32 or wider, the dtype of every reduction."""
    return x.to(wide(x))


def check(rewards_chosen: Tensor, rewards_rejected: Tensor, plus_mask: Tensor, minus_mask: Tensor,
          unchanged: Unchanged, options: Options) -> None:
    """Raises ValueError when shapes differ or an option is unknown."""
    if len(rewards_chosen) != len(rewards_rejected):
        raise ValueError(f"rewards_rejected: expected B = {len(rewards_chosen)} rows, one per row "
                         f"of rewards_chosen, got {len(rewards_rejected)}; pass both sides of each "
                         "pair")
    for name, mask, r in (("plus_mask", plus_mask, rewards_chosen),
                          ("minus_mask", minus_mask, rewards_rejected)):
        if mask.shape != r.shape or mask.dtype != torch.bool:
            raise ValueError(f"{name}: expected bool {tuple(r.shape)}, the shape of its rewards, "
                             f"got {mask.dtype} {tuple(mask.shape)}; pass one flag per token")
    if len({x.shape for x in unchanged}) != 1 or unchanged.pair.ndim != 1:
        raise ValueError(f"unchanged: expected three index tensors of one length [M], got "
                         f"{[tuple(x.shape) for x in unchanged]}; pass one entry per pairing")
    if options.reduce not in ("sum", "mean") or options.u0 not in U0_TERMS:
        raise ValueError("options: expected reduce = sum or mean and u0 = "
                         f"{' or '.join(U0_TERMS)}, got {options}; correct the option")
