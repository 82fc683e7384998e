"""Equations (1) to (7) with the numbers of one record filled in, for terminal and page alike.

Each line says what is computed, by which formula, with which numbers, and what comes out; whoever
has the tables of tokens beside it can compute every line again by hand.
"""

from typing import NamedTuple

from fgrlhf.worked import Loss, Side, Worked, minus_log_sigmoid, sigmoid

TERMS = 6                                           # a longer sum is not written out

# The term of a pair of U0 by kernels/token_preference.py's names: what divides it beside M, its
# formula, its value for (r_i+, r_j-).
U0 = {"difference": (1, "(r_i+ - r_j-)^2", lambda plus, minus: (plus - minus) ** 2),
      "anchor": (2, "(r_i+)^2 + (r_j-)^2", lambda plus, minus: plus ** 2 + minus ** 2),
      "kept": (2, "-log sigmoid(r_i+) - log sigmoid(r_j-)",
               lambda plus, minus: minus_log_sigmoid(plus) + minus_log_sigmoid(minus))}


class Line(NamedTuple):
    """`name` = `formula` = `numbers` = `value`; formula and numbers may be empty."""

    equation: str
    name: str
    formula: str
    numbers: str
    value: str


def show(x: float, sign: str = "") -> str:
    """Four decimals; four digits where that would hide the number."""
    if x and abs(x) < 1e-3 or abs(x) >= 1e5:
        return f"{x:{sign}.3e}"
    return f"{round(x, 4) + 0.0:{sign}.4f}"         # + 0.0: never "-0.0000"


def _sum(values: list[float]) -> str:
    """The sum written out: "0.5000 - 1.2000"."""
    if not values:
        return "nothing"
    if len(values) > TERMS:
        return f"{len(values)} numbers of the table"
    first, *rest = values
    return show(first) + "".join(f" {'-' if x < 0 else '+'} {show(abs(x))}" for x in rest)


def preference_lines(worked: Worked) -> list[Line]:
    """Equations (1), (3), (2): from rewards to the probability that y+ is preferred."""
    plus, minus, loss = worked.chosen, worked.rejected, worked.loss
    total = plus.total - minus.total
    kept = sum(plus.rewards[j] - minus.rewards[i] for i, j in worked.pairs)
    lines = [Line("(1)", f"R({y})", f"sum of r_t over the {len(side.rewards)} tokens of {y}", "",
                  show(side.total)) for y, side in (("y-", minus), ("y+", plus))]
    how = "mean" if loss.options.reduce == "mean" else "sum"
    sums = []
    for y, side in (("U1+", plus), ("U1-", minus)):
        values = side.changed()
        value = sum(values) / (max(len(values), 1) if how == "mean" else 1)
        over = f" / {len(values)}" if how == "mean" and values else ""
        sums.append(value)
        written = _sum(values)
        lines.append(Line("(3)", f"{how} over {y}", "", f"({written}){over}" if over else written,
                          show(value)))
    lines.append(Line("(3)", "s", f"{how} over U1+  -  {how} over U1-",
                      f"{show(sums[0])} - ({show(sums[1])})", show(loss.margin)))
    lines.append(Line("(3)", "over U0, r_i+ - r_j- (core assumption: 0)", "", "",
                      show(kept)))
    loose = total - kept - (sum(plus.changed()) - sum(minus.changed()))
    if any(name == "" for side in (plus, minus) for name in side.sets):
        lines.append(Line("(3)", "tokens in no set (the partners of U1^)", "", "", show(loose)))
    lines.append(Line("(2)", "P(y+ > y-)", "sigmoid(R(y+) - R(y-))", f"sigmoid({show(total)})",
                      show(sigmoid(total))))
    lines.append(Line("(2)", "on U1 alone", "sigmoid(s)", f"sigmoid({show(loss.margin)})",
                      show(sigmoid(loss.margin))))
    return lines


def loss_lines(worked: Worked) -> list[Line]:
    """Equation (4) as the model was trained, then as the paper has it where that differs."""
    lines = _loss_lines(worked, worked.loss, "(4)")
    if worked.loss.options != worked.paper.options:
        lines += _loss_lines(worked, worked.paper, "(4) paper")
    return lines


def _loss_lines(worked: Worked, loss: Loss, equation: str) -> list[Line]:
    options, plus, minus = loss.options, worked.chosen, worked.rejected
    M, changed = max(len(worked.pairs), 1), plus.changed() + minus.changed()
    divisor, formula, term = U0[options.u0]
    unchanged = sum(term(plus.rewards[j], minus.rewards[i]) for i, j in worked.pairs)
    u0 = (f"lambda / {divisor if divisor > 1 else ''}M * sum over U0 of {formula}",
          f"{options.u0_weight:g} / {divisor * M} * {show(unchanged)}")
    bt = f"-log sigmoid({show(loss.margin)})" if changed else "no changed token"
    lines = [Line(equation, "L_bt", "-log sigmoid(s)", bt, show(loss.bt)),
             Line(equation, "L_u0", *u0, show(loss.u0))]
    if options.token_weight:
        terms = [*map(minus_log_sigmoid, plus.changed()),
                 *(minus_log_sigmoid(-r) for r in minus.changed())]
        lines.append(Line(
            equation, "L_token",
            "w / K * (sum over U1+ of -log sigmoid(r) + sum over U1- of -log sigmoid(-r))",
            f"{options.token_weight:g} / {max(len(changed), 1)} * ({_sum(terms)})",
            show(loss.token)))
    parts = [loss.bt, loss.u0] + [loss.token] * bool(options.token_weight)
    lines.append(Line(equation, "L", " + ".join(line.name for line in lines),
                      " + ".join(map(show, parts)), show(loss.total)))
    return lines


def update_lines(worked: Worked) -> list[Line]:
    """Equations (5)-(7) for the token that the update moves most, then the whole loss."""
    update, T = worked.update, len(worked.rejected.rewards)
    moved = [abs(A * (new - old)) for A, new, old in
             zip(update.advantages, update.logp, update.logp_old)]
    t = moved.index(max(moved))
    s, eps = update.settings, update.settings.clip_eps
    ratio, A, old = update.ratio[t], update.advantages[t], update.logp_old[t]
    bound = min(max(ratio, 1 - eps), 1 + eps)
    lines = [
        Line("", f"r_{t}", "(r_t - mean) / scale",
             f"({show(worked.rejected.rewards[t])} - ({show(worked.mean)})) / {show(worked.scale)}",
             show(update.calibrated[t])),
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
        Line("(7)", "L after it", f"-mean of the {T} terms", "", show(update.loss))]
    return lines


def _standardised(update, t: int) -> tuple[str, str]:
    """(formula, numbers) of equation (6) for token t."""
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
    """The text in stretches of one kind: [(text, "U0" | "U1" | "gap")], blanks outside of U1."""
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
