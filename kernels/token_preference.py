"""The losses of the token-level reward model on minimal edits, (4): the paper's, and ours.

(3) s_b  = sum_U1+ r_t - sum_U1- r_t                        "sum": margin of pair b, changed tokens
           mean_U1+ r_t - mean_U1- r_t                      "mean"
           1/T+ sum_U1+ r_t - 1/T- sum_U1- r_t              "share": T the tokens of a side
           1/T+ sum_t r_t+ - 1/T- sum_t r_t-                "response": R(x, y+) - R(x, y-), all
                                                            tokens, equation (1)
    L_bt = p/P sum_b -log sigmoid(s_b)                      P pairs with at least one changed token
    L_u0 = lambda/M sum_U0 (r_j+ - r_i-)^2                  "difference"; M pairings
           lambda/(2M) sum_U0 ((r_j+)^2 + (r_i-)^2)         "anchor" pulls their rewards to 0
           lambda/(2M) sum_U0 (-log sigmoid(r_j+) - log sigmoid(r_i-))   "kept" rewards them like
                                                            the tokens that the editor wrote
    L_token = w/K ( sum_U1+ -log sigmoid(r_t) + sum_U1- -log sigmoid(-r_t) )   K tokens of U1; each
                                                            changed token by itself, off at w = 0
(4) loss = L_bt + L_u0 + L_token

U1+ / U1- are the changed tokens of the chosen / rejected response, and those that align.gap_credit
adds; U0 are the unchanged ones in pairs (i of y-, j of y+). The paper's loss is L_bt with
"response", -log of equation (2), and nothing else (p = 1, lambda = w = 0); "share" is its form on
U1, which leaves out U0. Gradients, each on the tokens of its own set and 0 elsewhere:

    dL_bt/dr+ = -p sigmoid(-s_b) / P      dL_bt/dr- = p sigmoid(-s_b) / P    (/ |U1| for "mean",
                                                            / T for "share" and "response")
    dL_u0/dr+ = 2 lambda d / M            dL_u0/dr- = -2 lambda d / M        d = r_j+ - r_i-
                lambda r_j+ / M                       lambda r_i- / M        for "anchor"
                -lambda sigmoid(-r_j+) / (2M)         -lambda sigmoid(-r_i-) / (2M)  for "kept"
    dL_token/dr+ = -w sigmoid(-r) / K       dL_token/dr- = w sigmoid(r) / K

An empty side (a pure insertion or deletion) counts 0 in s_b. A pair without a changed token is left
out of L_bt. An empty set makes its term 0. The means are over the pairs, tokens and pairings of the
whole minibatch (`Totals`). In L_bt every pair has the same weight, long or short.

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


MARGINS = ("sum", "mean", "share", "response")
U0_TERMS = ("difference", "anchor", "kept")


class Options(NamedTuple):
    """The form of the loss. The defaults are the paper's."""
    reduce: str = "response"      # of MARGINS: what the margin sums, and divides by
    u0: str = "difference"        # of U0_TERMS
    u0_weight: float = 0.0        # lambda >= 0
    token_weight: float = 0.0     # w >= 0
    pair_weight: float = 1.0      # p >= 0


class Lengths(NamedTuple):
    """T of each response of a batch, [B] int64 each. EOS counts."""
    chosen: Tensor
    rejected: Tensor


class Totals(NamedTuple):
    """The numbers that the terms are divided by.

    With the totals of the whole minibatch, the losses of its microbatches add up.
    """
    pairs: float                  # P: pairs with a changed token
    changed: float                # K: tokens of U1+ and U1-
    unchanged: float              # M: pairings of U0


class Preference(NamedTuple):
    loss: Tensor                  # () bt + u0 + token; the only member with a gradient
    bt: Tensor                    # () L_bt, with p
    u0: Tensor                    # () L_u0, with lambda
    token: Tensor                 # () L_token, with w
    margin: Tensor                # [B] s_b


def totals_of(plus_mask: Tensor, minus_mask: Tensor, unchanged: Unchanged) -> Totals:
    """The totals of this batch, at least 1 each."""
    pairs = (plus_mask.any(-1) | minus_mask.any(-1)).sum()
    return Totals(max(int(pairs), 1), max(int(plus_mask.sum() + minus_mask.sum()), 1),
                  max(len(unchanged.pair), 1))


def reference(rewards_chosen: Tensor, rewards_rejected: Tensor, plus_mask: Tensor,
              minus_mask: Tensor, unchanged: Unchanged, lengths: Lengths,
              options: Options = Options(), totals: Totals | None = None) -> Preference:
    """The loss (4) of B pairs, and its terms, in plain lines.

    rewards_chosen [B, T1], rewards_rejected [B, T2]: the reward of each token at its own position,
    in any floating dtype. plus_mask [B, T1], minus_mask [B, T2] bool: True on U1+ and U1-. lengths:
    the tokens of each response, at least 1. Padding may hold anything. totals: those of the whole
    minibatch, None for those of this batch.
    """
    totals = totals or totals_of(plus_mask, minus_mask, unchanged)
    chosen, rejected = upcast(rewards_chosen), upcast(rewards_rejected)

    def side(r: Tensor, mask: Tensor, T: Tensor) -> Tensor:                             # [B]
        if options.reduce == "response":
            mask = torch.arange(r.shape[1], device=r.device) < T[:, None]               # all tokens
        by = {"sum": 1, "mean": mask.sum(-1).clamp(min=1), "share": T, "response": T}
        return torch.where(mask, r, 0.0).sum(-1) / by[options.reduce]
    margin = (side(chosen, plus_mask, lengths.chosen)
              - side(rejected, minus_mask, lengths.rejected))                           # (3)
    changed = plus_mask.any(-1) | minus_mask.any(-1)
    bt = softplus(-margin)[changed].sum()                           # softplus(-s) = -log sigmoid(s)
    bt = options.pair_weight / totals.pairs * bt
    plus_u0 = chosen[unchanged.pair, unchanged.chosen]                                  # [M]
    minus_u0 = rejected[unchanged.pair, unchanged.rejected]
    u0 = {"difference": (plus_u0 - minus_u0) ** 2, "anchor": (plus_u0 ** 2 + minus_u0 ** 2) / 2,
          "kept": (softplus(-plus_u0) + softplus(-minus_u0)) / 2}[options.u0]
    u0 = options.u0_weight * u0.sum() / totals.unchanged
    token = softplus(-chosen[plus_mask]).sum() + softplus(rejected[minus_mask]).sum()
    token = options.token_weight * token / totals.changed
    return Preference(bt + u0 + token, *(x.detach() for x in (bt, u0, token, margin)))


def fused(rewards_chosen: Tensor, rewards_rejected: Tensor, plus_mask: Tensor, minus_mask: Tensor,
          unchanged: Unchanged, lengths: Lengths, options: Options = Options(),
          totals: Totals | None = None) -> Preference:
    """Computes the same as `reference`, with the gradients of both rewards in closed form.

    A second backward call (with retain_graph) works. Raises ValueError when shapes differ or an
    option is unknown.
    """
    check(rewards_chosen, rewards_rejected, plus_mask, minus_mask, unchanged, lengths, options)
    totals = totals or totals_of(plus_mask, minus_mask, unchanged)
    return Preference(*_TokenPreference.apply(rewards_chosen, rewards_rejected, plus_mask,
                                              minus_mask, unchanged, lengths, options, totals))


class _TokenPreference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rewards_chosen, rewards_rejected, plus_mask, minus_mask, unchanged, lengths,
                options, totals):
        margin, token, grads, margin_slopes = 0.0, 0.0, [], []
        for sign, rewards, mask, T in ((1, rewards_chosen, plus_mask, lengths.chosen),
                                       (-1, rewards_rejected, minus_mask, lengths.rejected)):
            wide_rewards = upcast(rewards)
            slope = sign * _weights(mask, T, options.reduce, wide_rewards.dtype)        # ds/dr
            margin = margin + (torch.where(slope != 0, wide_rewards, 0.0) * slope).sum(-1)  # [B]
            margin_slopes.append(slope)
            r = torch.where(mask, sign * wide_rewards, 0.0)                             # [B, T]
            token = token + (softplus(-r) * mask).sum()
            grads.append(torch.sigmoid(-r) * mask * (-sign * options.token_weight / totals.changed))
        token = token * (options.token_weight / totals.changed)
        changed = plus_mask.any(-1) | minus_mask.any(-1)
        bt_scale = options.pair_weight / totals.pairs
        bt = (softplus(-margin) * changed).sum() * bt_scale         # softplus(-s) = -log sigmoid(s)
        pull = (torch.sigmoid(-margin) * changed)[:, None] * -bt_scale                  # dL_bt/ds
        grads = [g.addcmul_(pull, slope) for g, slope in zip(grads, margin_slopes)]

        at = ((unchanged.pair, unchanged.chosen), (unchanged.pair, unchanged.rejected))
        plus_u0, minus_u0 = upcast(rewards_chosen[at[0]]), upcast(rewards_rejected[at[1]])  # [M]
        scale = options.u0_weight / totals.unchanged
        if options.u0 == "difference":
            d = plus_u0 - minus_u0
            u0, slopes = d.square().sum() * scale, (2 * scale * d, -2 * scale * d)
        elif options.u0 == "kept":
            u0 = (softplus(-plus_u0) + softplus(-minus_u0)).sum() * (scale / 2)
            slopes = tuple(torch.sigmoid(-r) * (-scale / 2) for r in (plus_u0, minus_u0))
        else:
            u0 = (plus_u0.square() + minus_u0.square()).sum() * (scale / 2)
            slopes = (scale * plus_u0, scale * minus_u0)
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
            return (None,) * 8
        return *((g * grad_loss).to(t) for g, t in zip(ctx.saved_tensors, ctx.dtypes)), *[None] * 6


def _weights(mask: Tensor, lengths: Tensor, reduce: str, dtype: torch.dtype) -> Tensor:
    """The weight of each token in the sum of its side, [B, T]: ds/dr without its sign."""
    if reduce == "response":
        mask = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    weights = mask.to(dtype)
    if reduce == "mean":
        weights /= mask.sum(-1, keepdim=True).clamp(min=1)
    elif reduce != "sum":
        weights /= lengths[:, None]
    return weights


def upcast(x: Tensor) -> Tensor:
    """`x` in float32 or wider, the dtype of every reduction."""
    return x.to(wide(x))


def check(rewards_chosen: Tensor, rewards_rejected: Tensor, plus_mask: Tensor, minus_mask: Tensor,
          unchanged: Unchanged, lengths: Lengths, options: Options) -> None:
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
    if any(T.shape != rewards_chosen.shape[:1] for T in lengths):
        raise ValueError(f"lengths: expected [{len(rewards_chosen)}], one number per response, got "
                         f"{[tuple(T.shape) for T in lengths]}; pass the response lengths")
    if options.reduce not in MARGINS or options.u0 not in U0_TERMS:
        raise ValueError(f"options: expected reduce = {' or '.join(MARGINS)} and u0 = "
                         f"{' or '.join(U0_TERMS)}, got {options}; correct the option")
