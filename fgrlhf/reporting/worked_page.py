"""One record worked through the method, for the report: heat map, equations, tokens of (5)-(7)."""

from typing import Sequence

from fgrlhf.reporting.equations import Line, loss_lines, preference_lines, show, update_lines
from fgrlhf.reporting.excerpts import heat_token
from fgrlhf.reporting.markup import Html, section, table, tag, typeset
from fgrlhf.reporting.table import number
from fgrlhf.worked import Side, Worked

CHANGED = {"rejected": "out", "chosen": "in"}
COLUMNS = ("r_t", "logp_old", "logp_ref", "KL", "r~_t", "A_t", "logp", "rho", "clip", "term")


def worked_page(records: Sequence[Worked]) -> Html:
    """Each record as `python -m fgrlhf.explain` prints it."""
    legend = tag(
        "p", "y\N{MINUS SIGN} and its edit y+, each token with its reward below: blue above 0, "
        "orange below, fullest at the largest. ", tag("del", "Struck out", class_="out"),
        " is U1\N{MINUS SIGN}, ", tag("ins", "underlined", class_="in"), " is U1+, ",
        tag("u", "dotted", class_="gap"), " is in U1 for what is missing before it or was taken "
        "out before it, the rest is U0. Below, the numbers of equations (1) to (7); ",
        tag("code", "python -m fgrlhf.explain"), " prints the same for any record.")
    return section("One edit through the whole method", legend, [_record(one) for one in records])


def _record(worked: Worked) -> Html:
    rewards = worked.rejected.rewards + worked.chosen.rewards
    largest = max(map(abs, rewards)) or 1.0
    parts = [tag("figure", tag("figcaption", tag("blockquote", worked.prompt)),
                 _heat(worked.rejected, "rejected", largest),
                 _heat(worked.chosen, "chosen", largest)),
             _lines("Rewards, margin and preference: equations (1) to (3); "
                    "the loss of the reward model: equation (4)",
                    preference_lines(worked) + loss_lines(worked))]
    if worked.update is not None:
        parts += [_tokens(worked), _lines("Equations (5) to (7) by hand for the token that the "
                                          "update moves most, and the whole loss",
                                          update_lines(worked))]
    return tag("div", parts, class_="worked")


def _heat(side: Side, kind: str, largest: float) -> Html:
    marks = [{"U1": CHANGED[kind], "gap": "gap"}.get(name, "") for name in side.sets]
    texts = [text or piece for text, piece in zip(side.texts, side.pieces)]
    return tag("div", tag("b", "y\N{MINUS SIGN} " if kind == "rejected" else "y+ "),
               [heat_token(text, reward, mark, largest, 2)
                for text, reward, mark in zip(texts, side.rewards, marks)], class_="heat")


def _lines(caption: str, lines: Sequence[Line]) -> Html:
    rows, before = [], None
    for line in lines:
        steps = [tag("div", tag("code", "= ", step))
                 for step in (line.formula, line.numbers) if step]
        rows.append(tag("tr", tag("th", line.equation if line.equation != before else "",
                                  scope="row"),
                        tag("td", line.name), tag("td", steps),
                        tag("td", typeset(line.value), class_="number")))
        before = line.equation
    head = ["equation", "", "", tag("th", "value", scope="col", class_="number")]
    return table(caption, head, [rows], text=True)


def _cell(name: str, value: float | bool, largest: float) -> Html:
    """A number; an advantage on a ground of its colour, fullest at the largest."""
    if name == "clip":
        return tag("td", "clip" if value else "", class_="number")
    heat = name == "A_t"
    return tag("td", typeset(number(value, digits=3)),
               class_="number" + heat * (" good" if value > 0 else " bad"),
               style=f"--strength:{abs(value) / largest:.2f}" if heat else None)


def _tokens(worked: Worked) -> Html:
    update = worked.update
    values = zip(update.calibrated, update.logp_old, update.logp_ref, update.kl, update.penalised,
                 update.advantages, update.logp, update.ratio, update.clipped, update.objective)
    largest = max(map(abs, update.advantages)) or 1.0
    rows = [tag("tr", tag("th", f"{t} {piece}", scope="row"),
                [_cell(name, cell, largest) for name, cell in zip(COLUMNS, row)])
            for t, (piece, row) in enumerate(zip(worked.rejected.pieces, values))]
    return table(
        "y\N{MINUS SIGN} as a response of the policy, token by token. r_t is calibrated with mean "
        f"{typeset(show(worked.mean))} and scale {show(worked.scale)}; logp, rho, clip and term "
        "are those after one update on this response alone. A term is min(rho A, clip(rho) A); "
        "clip: the clipped one is the smaller, the token gets no gradient.",
        ["token", *COLUMNS], [rows])
