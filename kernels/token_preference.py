"""Equation (4): the preference between a response and its minimal edit, put on the edited tokens.

    s_b  = sum_U1+ r_t - sum_U1- r_t                        margin of pair b, changed tokens only
    L_bt = 1/P sum_b -log sigmoid(s_b)                      P pairs with at least one changed token
    L_u0 = lambda/M sum_U0 (r_i+ - r_j-)^2                  "difference", the paper's; M pairings
           lambda/2M sum_U0 (r_i+)^2 + (r_j-)^2             "anchor": unchanged tokens are worth 0
           lambda/2M sum_U0 -log sigmoid(r_i+) - log sigmoid(r_j-)    "kept": the editor let them
                                                            stand; they earn as edited-in ones do
    L_tok = w/K ( sum_U1+ -log sigmoid(r_t) + sum_U1- -log sigmoid(-r_t) )   K tokens of U1; the
                                                            per-token variant, off at w = 0
    loss = L_bt + L_u0 + L_tok

U1+ / U1- are the changed tokens of the chosen / rejected response, U0 the unchanged ones in pairs.
Gradients, each on the tokens of its own set and 0 elsewhere:

    dL_bt/dr+ = -sigmoid(-s_b) / P        dL_bt/dr- = sigmoid(-s_b) / P      (/ |U1| for "mean")
    dL_u0/dr+ = 2 lambda d / M            dL_u0/dr- = -2 lambda d / M        d = r_i+ - r_j-
                lambda r_i+ / M                       lambda r_j- / M        for "anchor"
                -lambda sigmoid(-r_i+) / 2M           -lambda sigmoid(-r_j-) / 2M    for "kept"
    dL_tok/dr+ = -w sigmoid(-r) / K       dL_tok/dr- = w sigmoid(r) / K

An empty side (a pure insertion or deletion) counts 0 in s_b; a pair with no changed token has no
margin and is left out of L_bt; an empty set makes its term 0. Averages run over the pairs, tokens
and pairings of the batch (`Totals`), so no pair counts more for being long in L_bt, and none less.

Cost: no matmul; the rewards are read once, their gradients (as large as they) are kept for
backward.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


class Unchanged(NamedTuple):
    """U0 of a batch, [M] int64 each: the m-th pairing is token chosen[m] of the chosen response of
    pair[m] with token rejected[m] of its rejected one."""
    pair: Tensor
    chosen: Tensor
    rejected: Tensor


U0_TERMS = ("difference", "anchor", "kept")


class Options(NamedTuple):
    reduce: str = "sum"           # "sum" (the paper) or "mean" over the U1 tokens of a side
    u0: str = "difference"        # "difference" (the paper), "anchor" or "kept"
    u0_weight: float = 1.0        # lambda >= 0
    token_weight: float = 0.0     # w >= 0; 0 is equation (4)


class Totals(NamedTuple):
    """The divisors; pass those of the whole minibatch and the losses of its microbatches add up."""
    pairs: float                  # P: pairs with a changed token
    changed: float                # K: tokens of U1+ and U1-
    unchanged: float              # M: pairings of U0


class Preference(NamedTuple):
    loss: Tensor                  # () bt + u0 + token; the only member with a gradient
    bt: Tensor                    # ()
    u0: Tensor                    # () lambda included
    token: Tensor                 # () w included
    margin: Tensor                # [B] s_b; 0 where nothing changed


def totals(plus_mask: Tensor, minus_mask: Tensor, unchanged: Unchanged) -> Totals:
    """The divisors of this batch, at least 1 each."""
    pairs = (plus_mask.any(-1) | minus_mask.any(-1)).sum()
    return Totals(max(int(pairs), 1), max(int(plus_mask.sum() + minus_mask.sum()), 1),
                  max(len(unchanged.pair), 1))


def reference(rewards_chosen: Tensor, rewards_rejected: Tensor, plus_mask: Tensor,
              minus_mask: Tensor, unchanged: Unchanged, options: Options = Options(),
              divisors: Totals | None = None) -> Preference:
    """What `fused` computes, written plainly."""
    by = totals(plus_mask, minus_mask, unchanged) if divisors is None else divisors
    chosen, rejected = upcast(rewards_chosen), upcast(rewards_rejected)
    plus, minus = (torch.where(mask, r, 0.0).sum(-1) for mask, r in
                   ((plus_mask, chosen), (minus_mask, rejected)))                       # [B]
    if options.reduce == "mean":
        plus = plus / plus_mask.sum(-1).clamp(min=1)
        minus = minus / minus_mask.sum(-1).clamp(min=1)
    changed = plus_mask.any(-1) | minus_mask.any(-1)
    bt = softplus(minus - plus)[changed].sum() / by.pairs
    kept = chosen[unchanged.pair, unchanged.chosen]                                     # [M]
    other = rejected[unchanged.pair, unchanged.rejected]
    u0 = {"difference": (kept - other) ** 2, "anchor": (kept ** 2 + other ** 2) / 2,
          "kept": (softplus(-kept) + softplus(-other)) / 2}[options.u0]
    u0 = options.u0_weight * u0.sum() / by.unchanged
    token = softplus(-chosen[plus_mask]).sum() + softplus(rejected[minus_mask]).sum()
    token = options.token_weight * token / by.changed
    return Preference(bt + u0 + token, *(x.detach() for x in (bt, u0, token, plus - minus)))


def fused(rewards_chosen: Tensor, rewards_rejected: Tensor, plus_mask: Tensor, minus_mask: Tensor,
          unchanged: Unchanged, options: Options = Options(),
          divisors: Totals | None = None) -> Preference:
    """Loss (4) of B pairs and its parts; the gradient flows to both rewards.

    rewards_chosen [B, T1], rewards_rejected [B, T2]: reward of each token at its own position, any
    floating dtype; plus_mask [B, T1], minus_mask [B, T2]: True = token of U1+ / U1-; positions in
    no set (padding) may hold anything; divisors: None = those of this batch. Two backward calls
    (with retain_graph) work. Raises ValueError on shapes that differ and on unknown options.
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
    """float32 at least: the dtype of every reduction."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check(rewards_chosen: Tensor, rewards_rejected: Tensor, plus_mask: Tensor, minus_mask: Tensor,
          unchanged: Unchanged, options: Options) -> None:
    """Raises ValueError naming what does not fit."""
    if len(rewards_chosen) != len(rewards_rejected):
        raise ValueError(f"rewards_rejected: expected B = {len(rewards_chosen)} pairs as "
                         f"rewards_chosen, got {len(rewards_rejected)}")
    for name, mask, r in (("plus_mask", plus_mask, rewards_chosen),
                          ("minus_mask", minus_mask, rewards_rejected)):
        if mask.shape != r.shape or mask.dtype != torch.bool:
            raise ValueError(f"{name}: expected bool {tuple(r.shape)} as its rewards, "
                             f"got {mask.dtype} {tuple(mask.shape)}")
    if len({x.shape for x in unchanged}) != 1 or unchanged.pair.ndim != 1:
        raise ValueError(f"unchanged: expected three index lists of one length [M], "
                         f"got {[tuple(x.shape) for x in unchanged]}")
    if options.reduce not in ("sum", "mean") or options.u0 not in U0_TERMS:
        raise ValueError(f"options: expected reduce sum|mean and u0 {'|'.join(U0_TERMS)}, "
                         f"got {options}")
