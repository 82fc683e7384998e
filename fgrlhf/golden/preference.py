"""Reward-model losses (paper, section 2.2): (2) on whole responses, (4) on the edited tokens."""

import torch
from torch import Tensor

from fgrlhf.golden.case import GARBAGE, Case, Draw, gradients, leaves, number

# One row per pair: the lengths of the two sides, U1+, U1-, U0 as (chosen, rejected). The rows are a
# substitution; a pure deletion, where the chosen side's next token is credited; a pure insertion
# that credits no token of the rejected side, so U1- is empty; a pair in which nothing changed.
PAIRS = (((4, 5), (1,), (1, 2), ((0, 0), (2, 3), (3, 4))),
         ((3, 5), (1,), (1, 2), ((0, 0), (2, 4))),
         ((5, 3), (1, 2), (), ((0, 0), (3, 1), (4, 2))),
         ((2, 2), (), (), ((0, 0), (1, 1))))


def softplus(x: Tensor) -> Tensor:
    """-log sigmoid(-x)."""
    return torch.log(1 + torch.exp(x))


def batch(name: str) -> dict[str, Tensor]:
    """Random rewards of PAIRS with their masks; positions behind a side's length hold garbage."""
    draw, B, T = Draw(name), len(PAIRS), 5
    rewards = [draw.numbers(B, T, scale=2.0) for _ in range(2)]
    masks = [torch.zeros(B, T, dtype=torch.bool) for _ in range(2)]
    for b, (lengths, plus, minus, _) in enumerate(PAIRS):
        for side, changed in enumerate((plus, minus)):
            rewards[side][b, lengths[side]:] = GARBAGE
            masks[side][b, list(changed)] = True
    unchanged = [(b, i, j) for b, pair in enumerate(PAIRS) for i, j in pair[3]]
    return {"rewards_chosen": rewards[0], "rewards_rejected": rewards[1], "plus_mask": masks[0],
            "minus_mask": masks[1], "unchanged": torch.tensor(unchanged),
            "lengths": torch.tensor([pair[0] for pair in PAIRS])}


def token_loss(name: str, equation: str, computes: str, options: dict) -> Case:
    given = batch(name)
    r, s = leaves(given["rewards_chosen"], given["rewards_rejected"])
    bt, token, u0, margins = [], [], [], []
    reduce = options["reduce"]
    for b, (lengths, plus, minus, unchanged) in enumerate(PAIRS):
        sides = []
        for rewards, changed, T in ((r, plus, lengths[0]), (s, minus, lengths[1])):
            counted = range(T) if reduce == "response" else changed
            by = {"sum": 1, "mean": max(len(changed), 1), "share": T, "response": T}[reduce]
            sides.append(sum((rewards[b, t] for t in counted), number(0.0)) / by)
        margins.append(sides[0] - sides[1])
        if plus or minus:
            bt.append(softplus(-margins[-1]))
        token += [softplus(-r[b, t]) for t in plus] + [softplus(s[b, t]) for t in minus]
        u0 += [{"difference": (r[b, i] - s[b, j]) ** 2, "anchor": (r[b, i] ** 2 + s[b, j] ** 2) / 2,
                "kept": (softplus(-r[b, i]) + softplus(-s[b, j])) / 2}[options["u0"]]
               for i, j in unchanged]
    parts = {"bt": sum(bt) / len(bt), "u0": options["u0_weight"] * sum(u0) / len(u0),
             "token": options["token_weight"] * sum(token) / len(token)}
    loss = sum(parts.values())
    return Case(name, "2.2", equation, computes, options, given,
                {"loss": loss, "margin": torch.stack(margins)} | parts
                | gradients(loss, rewards_chosen=r, rewards_rejected=s))


def sequence_loss() -> Case:
    draw = Draw("sequence-loss")
    chosen, rejected = draw.numbers(4, scale=4.0), draw.numbers(4, scale=4.0)
    r, s = leaves(chosen, rejected)
    loss = sum(-torch.log(1 / (1 + torch.exp(-(r[b] - s[b])))) for b in range(4)) / 4
    return Case("sequence-loss", "2.2", "(2)",
                "Bradley-Terry: loss = -mean_b log sigmoid(margin_b), margin [B] = chosen - "
                "rejected, with gradients to both.", {}, {"chosen": chosen, "rejected": rejected},
                {"loss": loss, "margin": chosen - rejected} | gradients(loss, chosen=r, rejected=s))


def cases() -> list[Case]:
    common = ("Inputs: rewards [B, T]; plus_mask, minus_mask: True on U1+, U1-; unchanged [M, 3]: "
              "U0 as (pair, chosen, rejected); lengths [B, 2]: tokens of the chosen and of the "
              "rejected side, in front of the padding. plus_mask and r_j+ belong to "
              "rewards_chosen, minus_mask and r_i- to rewards_rejected. margin [B] = "
              "sum_U1+ r - sum_U1- r{}; an empty side counts 0. margin has every pair; bt = mean "
              "of -log sigmoid(margin) over the pairs with a True in one of their masks. Means "
              "are over the whole batch. ")
    paper = " u0 = token = 0. loss = bt, with gradients to both rewards."
    anchor = "u0 = u0_weight / 2 mean_U0 (r_j+^2 + r_i-^2). "
    token = ("token = token_weight times the mean over all tokens of U1 of -log sigmoid(r_t) on "
             "U1+ and -log sigmoid(-r_t) on U1-. loss = bt + u0 + token, with gradients to both "
             "rewards.")
    return [
        token_loss("token-loss-paper", "(1), (2)", common.format(
                   ", with the mean over all tokens of a side, changed or not, in place of each "
                   "sum") + paper,
                   {"reduce": "response", "u0": "difference", "u0_weight": 0.0,
                    "token_weight": 0.0}),
        token_loss("token-loss-share", "(2), on U1", common.format(
                   ", each sum divided by the length of its side") + paper,
                   {"reduce": "share", "u0": "difference", "u0_weight": 0.0, "token_weight": 0.0}),
        token_loss("token-loss-ours", "(4)", common.format("") + anchor + token,
                   {"reduce": "sum", "u0": "anchor", "u0_weight": 0.02, "token_weight": 1.0}),
        token_loss("token-loss", "(4), variant", common.format("") + "u0 = u0_weight mean_U0 "
                   "(r_j+ - r_i-)^2. token = 0. loss = bt + u0, with gradients to both rewards.",
                   {"reduce": "sum", "u0": "difference", "u0_weight": 0.5, "token_weight": 0.0}),
        token_loss("token-loss-per-token", "(4), variant", common.format(
                   " with means in place of both sums") + anchor + token,
                   {"reduce": "mean", "u0": "anchor", "u0_weight": 0.25, "token_weight": 1.5}),
        token_loss("token-loss-kept", "(4), variant", common.format("") + "u0 = u0_weight / 2 "
                   "mean_U0 (-log sigmoid(r_j+) - log sigmoid(r_i-)): unchanged tokens are "
                   "rewarded like those that the editor wrote. " + token,
                   {"reduce": "sum", "u0": "kept", "u0_weight": 0.75, "token_weight": 0.5}),
        sequence_loss()]
