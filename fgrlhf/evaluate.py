"""The measurements behind every figure (paper, section 3.2): accuracy, AUC, win rate, intervals.

    win rate       mean over prompts of a preference: 1 (win), 1/2 (tie), 0 (loss) or between
    AUC            P(score of a positive > score of a negative) + 1/2 P(equal)
    interval       paired bootstrap over prompts within a run; Student's t over seeds

These are plain functions of numbers, without model, tokenizer or file.
"""

import math
from typing import NamedTuple, Sequence

import numpy as np

# 97.5% quantiles of Student's t by degrees of freedom, 1..10, and the normal's.
Z_QUANTILE = 1.95996
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Interval(NamedTuple):
    """A mean with its 95% interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def win_rate(preferences: Sequence[float]) -> float:
    """Mean of 1 (win), 0.5 (tie), 0 (loss), or of numbers between; in [0, 1]."""
    return float(np.mean(preferences))


def standard_error(values: Sequence[float]) -> float | None:
    """Returns s / sqrt(n), where s has n - 1 degrees of freedom; None for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def win_rates(preferences: Sequence[float | None], seed: int = 0) -> dict:
    """The figures of one comparison, defined as by AlpacaEval, but as shares and not in percent.

        win_rate            mean of p, the preference for the system: .45 counts .45
        discrete_win_rate   mean of 1 (p > 1/2), 1/2 (p = 1/2) and 0 (p < 1/2)
        standard_error, discrete_standard_error     of these two means over prompts
        interval_95         the bootstrap's interval of win_rate, drawn with `seed`
        wins, ties, losses  how many p are above, at and below 1/2
        left_out            how many are None: no judgement, and part of no other figure

    preferences: one p in [0, 1] or None per prompt, at least one of them a number.
    """
    judged = [p for p in preferences if p is not None]
    discrete = [(p > 0.5) + 0.5 * (p == 0.5) for p in judged]
    interval = bootstrap(judged, seed)
    return {"win_rate": interval.mean, "standard_error": standard_error(judged),
            "interval_95": [interval.low, interval.high],
            "discrete_win_rate": win_rate(discrete),
            "discrete_standard_error": standard_error(discrete),
            "wins": discrete.count(1.0), "ties": discrete.count(0.5),
            "losses": discrete.count(0.0), "left_out": len(preferences) - len(judged)}


def compare(errors: Sequence[int], reference_errors: Sequence[int]) -> list[float]:
    """For each prompt: 1 for fewer errors than the reference, 0.5 for as many, 0 for more."""
    if len(errors) != len(reference_errors):
        raise ValueError(f"errors: expected {len(reference_errors)} values, got {len(errors)}")
    return [(a < b) + 0.5 * (a == b) for a, b in zip(errors, reference_errors)]


def bootstrap(values: Sequence[float], seed: int = 0, draws: int = 2000) -> Interval:
    """The mean and its percentile interval over prompts (Efron 1979).

    values: one number per prompt, n >= 1. For a paired difference pass the differences.
    """
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    n = len(values)
    means = [values[rng.integers(0, n, n)].mean() for _ in range(draws)]
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(values.mean()), float(low), float(high))


def over_seeds(values: Sequence[float], more: int | None = None) -> Interval:
    """The mean over seeds with Student's t interval. The interval of a single seed is NaN.

    mean +- t s sqrt(1/n) covers the mean over all possible seeds. With `more` = m further seeds,
    mean +- t s sqrt(1/n + 1/m) covers the mean of those; m = 1 says what to expect of one more run.
    """
    values = np.asarray(values, dtype=float)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    spread = math.sqrt(1 / n + (1 / more if more else 0))
    half = t_quantile(n - 1) * float(values.std(ddof=1)) * spread
    return Interval(mean, mean - half, mean + half)


def t_quantile(degrees: int) -> float:
    """The 97.5% quantile of Student's t. Beyond the table, Fisher's expansion is right to 0.003."""
    if degrees <= len(T_QUANTILE):
        return T_QUANTILE[degrees - 1]
    z = Z_QUANTILE
    return (z + (z ** 3 + z) / (4 * degrees)
            + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * degrees ** 2))


def pair_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """The share of pairs whose chosen side has the higher reward. A tie counts 1/2."""
    return win_rate(compare(np.negative(chosen), np.negative(rejected)))


def auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """The area under the ROC curve, by ranks with ties averaged. NaN when a class is empty.

    scores: higher means more likely positive. labels: True means positive. Both have length n.
    """
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return math.nan
    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2                  # mean rank of each distinct value
    above = rank[inverse][labels].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def auc_within(groups: Sequence[tuple[Sequence[float], Sequence[bool]]]) -> float:
    """The mean of the AUC inside each response that has both classes; NaN without any."""
    values = [value for scores, labels in groups if not math.isnan(value := auc(scores, labels))]
    return float(np.mean(values)) if values else math.nan


def auc_matched(groups: Sequence[tuple[Sequence[float], Sequence[bool], Sequence[bool]]]) -> float:
    """The AUC of tokens a and b of one response at nearly the same position. NaN without any.

        1/2 P(score_a > score_b | b shortly before a) + 1/2 P(score_a > score_b | b shortly after a)

    a is a positive token and b a negative one, at most n/10 tokens from a (and neighbours in any
    case) in a response of n tokens. Ties count 1/2. Each P is a mean over the responses that have
    such tokens. A score that only rises or only falls with the position gets exactly 1/2, because
    it is right in all pairs of one order and wrong in all pairs of the other.

    groups: for each response the scores, the positive tokens and the negative tokens, all [n].
    """
    before, after = [], []
    for scores, positive, negative in groups:
        scores = np.asarray(scores, dtype=float)
        a, b = np.flatnonzero(positive)[:, None], np.flatnonzero(negative)
        wins = (scores[a] > scores[b]) + 0.5 * (scores[a] == scores[b])
        near = np.abs(a - b) <= max(1, len(scores) / 10)
        for side, pairs in ((before, near & (b < a)), (after, near & (b > a))):
            if pairs.any():
                side.append(wins[pairs].mean())
    return float(np.mean(before) + np.mean(after)) / 2 if before and after else math.nan


# ----- reward models ----------------------------------------------------------------------------

def constant(rewards: Sequence[float], lengths: Sequence[int] | None = None) -> str | None:
    """Returns a sentence when all `rewards` are the same up to rounding, otherwise None.

    With `lengths` the rewards are sums over so many tokens, and are compared per token.
    """
    values = np.divide(rewards, 1 if lengths is None else lengths)
    if np.ptp(values) > 1e-6 * np.abs(values).max():
        return None
    return (f"the reward model is constant: it gives every {'token' if lengths else 'response'} "
            f"the reward {values[0]:g} and cannot judge; train it first")


class Judged(NamedTuple):
    """The rewards of one held-out preference. A sequence-level model leaves the lists empty."""

    id: str
    chosen: float                       # R(x, y+)
    rejected: float                     # R(x, y-)
    change: float                       # token edit distance / length of the longer side
    rewards: list[float] = []           # r_t of the rejected response, EOS left out
    types: list[str] = []               # the type of the error span that holds the token, or ""
    lengths: tuple[int, int] | None = None      # tokens of y+ and y-
    drift: list[float] = []             # r_j+ - r_i- of each pair of U0
    response: str = "sum"               # R: "sum" or "mean" of r_t, or "last" (sequence-level)
    removed: list[bool] = []            # the editor took the token out (an edit only)


def reward_table(judged: Sequence[Judged], minimal: float = 0.4) -> dict[str, float]:
    """Pair accuracy, and the AUC of -r_t against human error spans and against the edit itself.

        pair_accuracy               R(y+) > R(y-)
        pair_accuracy_per_token     R / |y| instead of R, where R is a sum and grows with length
        pair_accuracy_sum           R |y| instead of R, where R is a mean
        pair_accuracy_shorter       the length-only baseline: the shorter side wins
        token_auc, position_auc     by -r_t, and by the position of the token only: tokens inside a
                                    span against the other tokens
        edit_auc, edit_position_auc the same for the tokens of y- that the editor took out
        ..._within                  the mean of the AUC inside each response
        token_auc/TYPE              spans of one type against the tokens outside any span
        token_auc_matched           tokens inside a span against near tokens of the same response
                                    outside any span, see `auc_matched`; the position gets 1/2
        ..._within/TYPE, token_auc_matched/TYPE     the same for spans of one type
        minimal/...                 the preferences whose share of changed tokens is below `minimal`
        equal_length/...            those whose sides differ by at most one token in length
        r_errors, r_behind, r_elsewhere     mean r_t on tokens inside a span, on tokens behind the
                                    first span, and on the others; 0 is the mean over the rejected
                                    responses with a span, 1 their standard deviation
        u0_drift                    root mean square of r_j+ - r_i- over U0 of the edits, divided by
                                    the standard deviation of their r_t: the core assumption says 0

    Entries that need lengths, spans or an edit are absent without them, and so is an AUC without
    tokens of both classes. Raises FloatingPointError for a reward that is not finite.
    """
    for j in judged:
        if not np.isfinite([j.chosen, j.rejected, *j.rewards]).all():
            raise FloatingPointError(f"record {j.id!r}: expected finite rewards, got {j.chosen} "
                                     f"and {j.rejected}; check the reward model's weights")
    table = _pair_figures(judged) | _token_figures(judged)
    strata = {"minimal/": [j for j in judged if j.change < minimal]}
    if any(j.lengths for j in judged):
        strata["equal_length/"] = [j for j in judged
                                   if j.lengths and abs(j.lengths[0] - j.lengths[1]) <= 1]
    for prefix, group in strata.items():
        found = _pair_figures(group) | _token_figures(group)
        table |= {prefix + name: value for name, value in found.items()}
    table |= _places(judged) | _by_type(judged)
    return {name: value for name, value in table.items() if not math.isnan(value)}


def reward_intervals(judged: Sequence[Judged], draws: int, seed: int = 0) -> dict[str, list[float]]:
    """Returns the 95% bootstrap interval [low, high] of each entry of `reward_table`, as NAME_95.

    Records are drawn with replacement, `draws` times; 0 draws give no intervals. An entry that some
    draws lack, such as the AUC of a rare type of error, is taken over the others.
    """
    rng, n = np.random.default_rng(seed), len(judged)
    tables = [reward_table([judged[i] for i in rng.integers(0, n, n)]) for _ in range(draws)]
    return {f"{name}_95": np.percentile([t[name] for t in tables if name in t],
                                        (2.5, 97.5)).tolist()
            for name in dict.fromkeys(name for t in tables for name in t)
            if not name.endswith("pairs")}


def _pair_figures(group: Sequence[Judged]) -> dict[str, float]:
    """Returns the entries of `reward_table` that compare the two sides of preferences."""
    table = {"pairs": len(group)}
    if group:
        table["pair_accuracy"] = pair_accuracy([j.chosen for j in group],
                                               [j.rejected for j in group])
    sized = [j for j in group if j.lengths]
    for response, name, power in (("sum", "per_token", -1), ("mean", "sum", 1)):
        if some := [j for j in sized if j.response == response]:
            table[f"pair_accuracy_{name}"] = pair_accuracy(
                [j.chosen * float(j.lengths[0]) ** power for j in some],
                [j.rejected * float(j.lengths[1]) ** power for j in some])
    if sized:
        table["pair_accuracy_shorter"] = pair_accuracy([-j.lengths[0] for j in sized],
                                                       [-j.lengths[1] for j in sized])
    return table


def _token_figures(group: Sequence[Judged]) -> dict[str, float]:
    """Returns the AUCs of `reward_table`, for spans and for what the editor took out."""
    table = {}
    in_span, taken_out = lambda j: [bool(kind) for kind in j.types], lambda j: j.removed
    for prefix, place, labels_of in (("token_auc", "position_auc", in_span),
                                     ("edit_auc", "edit_position_auc", taken_out)):
        marked = [j for j in group if any(labels_of(j))]
        if not marked:
            continue
        labels = [labels_of(j) for j in marked]
        costs = [[-r for r in j.rewards] for j in marked]
        places = [[(t + 0.5) / len(j.rewards) for t in range(len(j.rewards))] for j in marked]
        for name, scores in ((prefix, costs), (place, places)):
            table[name] = auc(np.concatenate(scores), np.concatenate(labels))
            table[name + "_within"] = auc_within(list(zip(scores, labels)))
    return table


def _by_type(judged: Sequence[Judged]) -> dict[str, float]:
    """Returns the AUCs of `reward_table` for spans of one type, and those of near tokens.

    Like `token_auc`, they leave out responses without a span.
    """
    judged = [j for j in judged if any(j.types)]
    table, kinds = {}, sorted({k for j in judged for k in j.types} - {""})
    for kind in kinds:
        places = [[t for t, k in enumerate(j.types) if k in ("", kind)] for j in judged]
        costs = [[-j.rewards[t] for t in some] for j, some in zip(judged, places)]
        labels = [[j.types[t] == kind for t in some] for j, some in zip(judged, places)]
        table[f"token_auc/{kind}"] = auc(np.concatenate(costs), np.concatenate(labels))
        table[f"token_auc_within/{kind}"] = auc_within(list(zip(costs, labels)))
        table[f"position_auc_within/{kind}"] = auc_within(list(zip(places, labels)))
    for name, wrong in [("", bool), *((f"/{kind}", kind.__eq__) for kind in kinds)]:
        table["token_auc_matched" + name] = auc_matched(
            [([-r for r in j.rewards], [wrong(k) for k in j.types], [not k for k in j.types])
             for j in judged if any(map(wrong, j.types))])
    return table


def _places(judged: Sequence[Judged]) -> dict[str, float]:
    """Returns the entries r_errors to u0_drift of `reward_table`, in standard deviations."""
    edits, found = [j for j in judged if j.drift], {}
    if edits and (spread := np.std([r for j in edits for r in j.rewards])):
        drift = np.square([d for j in edits for d in j.drift])
        found["u0_drift"] = float(np.sqrt(np.mean(drift)) / spread)
    spanned = [j for j in judged if any(j.types)]
    rewards = np.array([r for j in spanned for r in j.rewards])
    if all(all(j.types) for j in spanned) or not (spread := np.std(rewards)):
        return found
    groups = {"r_errors": [], "r_behind": [], "r_elsewhere": []}
    for j in spanned:
        first = next(t for t, kind in enumerate(j.types) if kind)
        for t, (r, kind) in enumerate(zip(j.rewards, j.types)):
            groups["r_errors" if kind else "r_behind" if t > first else "r_elsewhere"].append(r)
    return {name: float((np.mean(some) - rewards.mean()) / spread)
            for name, some in groups.items() if some} | found
