"""Writes equations (1) to (7) with the numbers of one record, for the terminal and the page.

Each line has a name, the formula, the numbers in it and the value. With the tables of tokens, a
reader can compute every line again by hand.
"""

from typing import NamedTuple

from fgrlhf.explain.explained import Explained, Loss, Side, minus_log_sigmoid, sigmoid

TERMS = 6                                           # a longer sum is not written out

# The loss of one pair of U0, by its name in kernels/token_preference.py: the divisor besides M, the
# formula, the value for (r_j+, r_i-).
U0 = {"difference": (1, "(r_j+ - r_i-)^2", lambda plus, minus: (plus - minus) ** 2),
      "anchor": (2, "((r_j+)^2 + (r_i-)^2)", lambda plus, minus: plus ** 2 + minus ** 2),
      "kept": (2, "(-log sigmoid(r_j+) - log sigmoid(r_i-))",
               lambda plus, minus: minus_log_sigmoid(plus) + minus_log_sigmoid(minus))}


class Line(NamedTuple):
    """`name` = `formula` = `numbers` = `value`; formula and numbers may be empty."""

    equation: str
    name: str
    formula: str
    numbers: str
    value: str


def show(x: float) -> str:
    """Returns four decimals, or four digits with an exponent for tiny and huge numbers."""
    if x and abs(x) < 1e-3 or abs(x) >= 1e5:
        return f"{x:.3e}"
    return f"{round(x, 4) + 0.0:.4f}"               # + 0.0: never "-0.0000"


def _sum(values: list[float]) -> str:
    """Writes out the sum: "0.5000 - 1.2000"."""
    if not values:
        return "no tokens"
    if len(values) > TERMS:
        return f"{len(values)} numbers of the table"
    first, *rest = values
    return show(first) + "".join(f" {'-' if x < 0 else '+'} {show(abs(x))}" for x in rest)


def preference_lines(explained: Explained) -> list[Line]:
    """Equations (1), (3) and (2): the probability that y+ is preferred, from the rewards."""
    plus, minus, how = explained.chosen, explained.rejected, explained.loss.options.reduce
    R = [side.total / (len(side.rewards) if explained.response == "mean" else 1)
         for side in (minus, plus)]
    lines = [Line("(1)", f"R({y})", f"{explained.response} of r_t over the {len(side.rewards)} "
                  f"tokens of {y}", "", show(value))
             for y, side, value in (("y-", minus, R[0]), ("y+", plus, R[1]))]
    total, margin = R[1] - R[0], explained.loss.margin
    lines.append(Line("(2)", "P(y+ > y-)", "sigmoid(R(y+) - R(y-))", f"sigmoid({show(total)})",
                      show(sigmoid(total))))
    if how == "response":                           # the margin has all tokens
        return lines
    sums = []
    for y, side in (("U1+", plus), ("U1-", minus)):
        values = side.changed()
        by = {"sum": 1, "mean": max(len(values), 1), "share": len(side.rewards)}[how]
        sums.append(sum(values) / by)
        written = f"({_sum(values)}) / {by}" if how != "sum" and values else _sum(values)
        lines.append(Line("(3)", f"{how} over {y}", "", written, show(sums[-1])))
    lines.append(Line("(3)", "s", f"{how} over U1+  -  {how} over U1-",
                      f"{show(sums[0])} - ({show(sums[1])})", show(margin)))
    kept = sum(plus.rewards[j] - minus.rewards[i] for i, j in explained.pairs)
    lines.append(Line("(3)", "over U0, r_j+ - r_i- (core assumption: 0)", "", "", show(kept)))
    if any(name == "" for side in (plus, minus) for name in side.sets):
        loose = plus.total - minus.total - kept - (sum(plus.changed()) - sum(minus.changed()))
        lines.append(Line("(3)", "tokens in no set (paired with a U1^ token)", "", "", show(loose)))
    lines.append(Line("(2)", "on U1 only", "sigmoid(s)", f"sigmoid({show(margin)})",
                      show(sigmoid(margin))))
    return lines


def loss_lines(explained: Explained) -> list[Line]:
    """Equation (4) as the model was trained, then in the paper's form if it differs."""
    lines = _loss_lines(explained, explained.loss, "(4)")
    if explained.loss.options != explained.paper.options:
        lines += _loss_lines(explained, explained.paper, "(4) paper")
    return lines


def _loss_lines(explained: Explained, loss: Loss, equation: str) -> list[Line]:
    options, plus, minus = loss.options, explained.chosen, explained.rejected
    M, changed = max(len(explained.pairs), 1), plus.changed() + minus.changed()
    divisor, formula, term = U0[options.u0]
    unchanged = sum(term(plus.rewards[j], minus.rewards[i]) for i, j in explained.pairs)
    u0 = (f"lambda / {f'({divisor}M)' if divisor > 1 else 'M'} * sum over U0 of {formula}",
          f"{options.u0_weight:g} / {divisor * M} * {show(unchanged)}")
    bt = f"-log sigmoid({show(loss.margin)})" if changed else "no changed token"
    s = "R(y+) - R(y-), R the mean" if options.reduce == "response" else "s"
    times = "" if options.pair_weight == 1 else f"{options.pair_weight:g} * "
    lines = [Line(equation, "L_bt", f"{times and 'p * '}-log sigmoid({s})", times + bt,
                  show(loss.bt))]
    if options.u0_weight:
        lines.append(Line(equation, "L_u0", *u0, show(loss.u0)))
    if options.token_weight:
        terms = [*map(minus_log_sigmoid, plus.changed()),
                 *(minus_log_sigmoid(-r) for r in minus.changed())]
        lines.append(Line(
            equation, "L_token",
            "w / K * (sum over U1+ of -log sigmoid(r) + sum over U1- of -log sigmoid(-r))",
            f"{options.token_weight:g} / {max(len(changed), 1)} * ({_sum(terms)})",
            show(loss.token)))
    parts = ([loss.bt] + [loss.u0] * bool(options.u0_weight)
             + [loss.token] * bool(options.token_weight))
    lines.append(Line(equation, "L", " + ".join(line.name for line in lines),
                      " + ".join(map(show, parts)), show(loss.total)))
    return lines


def update_lines(explained: Explained) -> list[Line]:
    """Equations (5) to (7) for the token that the update moves most, then the whole loss."""
    update, T = explained.update, len(explained.rejected.rewards)
    moved = [abs(A * (new - old)) for A, new, old in
             zip(update.advantages, update.logp, update.logp_old)]
    t = moved.index(max(moved))
    s, eps = update.settings, update.settings.clip_eps
    ratio, A, old = update.ratio[t], update.advantages[t], update.logp_old[t]
    bound = min(max(ratio, 1 - eps), 1 + eps)
    lines = [
        Line("", f"calibrated r_{t}", *_calibrated(explained, t), show(update.calibrated[t])),
        Line("(5)", f"r~_{t}", "r_t - beta (logp_old - logp_ref)",
             f"{show(update.calibrated[t])} - {s.beta:g} * ({show(old)} - "
             f"({show(update.logp_ref[t])}))", show(update.penalised[t])),
        Line("(6)", f"A_{t}", *_standardised(update, t), show(A)),
        Line("(7)", f"rho_{t}", "exp(logp - logp_old)",
             f"exp({show(update.logp[t])} - ({show(old)}))", show(ratio)),
        Line("(7)", f"term {t}", f"min(rho A, clip(rho, {1 - eps:g}, {1 + eps:g}) A)",
             f"min({show(ratio)} * {show(A)}, {show(bound)} * {show(A)})",
             show(update.objective[t])),
        Line("(7)", "L before the update", "-mean of A_t, since every rho is 1", "",
             show(update.loss_before)),
        Line("(7)", "L after the update", f"-mean of the {T} terms", "", show(update.loss))]
    return lines


def _calibrated(explained: Explained, t: int) -> tuple[str, str]:
    """Returns (formula, numbers) of the reward of token t in PPO."""
    if how := explained.update.apart.get(t):
        return how, ""
    return f"(r_{t} - mean) / scale", (f"({show(explained.rejected.rewards[t])} - "
                                       f"({show(explained.mean)})) / {show(explained.scale)}")


def apart_text(update) -> str:
    """Says which rewards the run sets otherwise, as " r_21 is ..."; "" when there are none."""
    return "".join(f" r_{t} is {how}." for t, how in update.apart.items())


def _standardised(update, t: int) -> tuple[str, str]:
    """Returns (formula, numbers) of equation (6) for token t."""
    values, how = update.penalised, update.settings.standardise
    if update.settings.gamma:
        return f"{how} of the discounted sums of r~, gamma {update.settings.gamma:g}", ""
    mean = sum(values) / len(values)
    if how == "none":
        return "r~_t", ""
    if how == "rms":
        rms = (sum(x * x for x in values) / len(values)) ** 0.5
        return "r~_t / rms of r~", f"{show(values[t])} / {show(rms)}"
    std = (sum((x - mean) ** 2 for x in values) / len(values)) ** 0.5
    return ("(r~_t - mean) / standard deviation",
            f"({show(values[t])} - ({show(mean)})) / {show(std)}")


def stretches(side: Side) -> list[tuple[str, str]]:
    """Splits the text into parts of one set, [(text, "U0" | "U1" | "gap")].

    A blank in front of a changed part belongs to U0.
    """
    parts: list[tuple[str, str]] = []
    for text, name in zip(side.texts, side.sets):
        name = name or "U0"
        if name != "U0" and text.startswith(" ") and (not parts or parts[-1][1] != name):
            parts.append((" ", "U0"))
            text = text[1:]
        if parts and parts[-1][1] == name:
            parts[-1] = parts[-1][0] + text, name
        else:
            parts.append((text, name))
    return parts
