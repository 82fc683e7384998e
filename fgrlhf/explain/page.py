"""Shows an explained record in the report: heat map, equations, tokens of (5) to (7)."""

from typing import Sequence

from fgrlhf.explain.equations import (
    Line, apart_text, loss_lines, preference_lines, show, update_lines)
from fgrlhf.explain.explained import Explained, Side
from fgrlhf.reproduce.excerpts import heat_token
from fgrlhf.reproduce.markup import Html, section, table, tag, typeset
from fgrlhf.reproduce.table import number

CHANGED = {"rejected": "out", "chosen": "in"}


def explained_page(records: Sequence[Explained]) -> Html:
    """Shows each record with the numbers that `python -m fgrlhf.explain` prints."""
    legend = tag(
        "p", "The original y\N{MINUS SIGN} and its edit y+. The number under each token is its "
        "reward: blue means above 0, orange below 0. ", tag("del", "Struck out", class_="out"),
        " is U1\N{MINUS SIGN}, ", tag("ins", "underlined", class_="in"), " is U1+. ",
        tag("u", "Dotted", class_="gap"), " is also in U1: the token is credited with text that is "
        "missing, or that was taken out, in front of it. The rest is U0, or in no set. The "
        "tables have the numbers of equations (1) to (7). ",
        tag("code", "python -m fgrlhf.explain"), " prints the same for any record.")
    return section("One edit in every equation", legend, [_record(one) for one in records])


def _record(explained: Explained) -> Html:
    rewards = explained.rejected.rewards + explained.chosen.rewards
    largest = max(map(abs, rewards)) or 1.0
    parts = [tag("figure", tag("figcaption", tag("blockquote", explained.prompt)),
                 _heat(explained.rejected, "rejected", largest),
                 _heat(explained.chosen, "chosen", largest)),
             _lines("Rewards, margin and preference: equations (1) to (3); "
                    "the loss of the reward model: equation (4)",
                    preference_lines(explained) + loss_lines(explained))]
    if explained.update is not None:
        parts += [_tokens(explained),
                  _lines("Equations (5) to (7) for the token that the update moves most, and the "
                         "whole loss", update_lines(explained))]
    return tag("div", parts, class_="explained")


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


def _cell(name: str, value: float, largest: float) -> Html:
    """Shows a number; an advantage also has a colour, which is strongest at the largest."""
    heat = name == "A_t"
    return tag("td", typeset(number(value, digits=3)), data_label=name,
               class_="number" + heat * (" good" if value > 0 else " bad"),
               style=f"--strength:{abs(value) / largest:.2f}" if heat else None)


def _tokens(explained: Explained) -> Html:
    update = explained.update
    columns, largest = update.columns, max(map(abs, update.advantages)) or 1.0
    rows = []
    for t, piece in enumerate(explained.rejected.pieces):
        cells = [_cell(name, values[t], largest) for name, values in columns.items()]
        clip = tag("td", "clip" if update.clipped[t] else "", class_="number")
        rows.append(tag("tr", tag("th", f"{t} {piece}", scope="row"), cells, clip,
                        _cell("term", update.objective[t], largest)))
    return table(
        "y\N{MINUS SIGN} as a response of the policy, token by token. r_t is calibrated with mean "
        f"{typeset(show(explained.mean))} and scale {show(explained.scale)}."
        f"{apart_text(update)} The columns logp, "
        "rho, clip and term are values after one update on this response only. A term is "
        "min(rho A, clip(rho) A). In a row with clip, the clipped value is the smaller one, and "
        "the token gets no gradient.", ["token", *columns, "clip", "term"], [rows])
