"""Texts of the report: token rewards of rollouts, minimal edits, answers before and after.

Tokens carry their own leading blank: " of" or sentencepiece's "\\u2581of".
"""

from itertools import groupby
from typing import Sequence

from fgrlhf.reporting.markup import Html, section, table, tag, typeset
from fgrlhf.reporting.table import is_number, number

# What a token can be marked as: the element, and the word for those who see neither.
MARKS = {"error": ("u", "error"), "out": ("del", "taken out"), "in": ("ins", "put in"),
         "gap": ("u", "answers for a gap")}


def heat_maps(maps: Sequence[dict]) -> Html:
    """Each token on a ground of its reward's colour, the reward below it, errors underlined.

    One scale for all maps: full colour is the largest absolute reward among them.
    Raises ValueError where tokens, rewards and errors differ in number.
    """
    largest = max((abs(r) for one in maps for r in one["rewards"] if is_number(r)), default=0) or 1
    figures = []
    for one in maps:
        tokens, errors = one["tokens"], one.get("errors") or [False] * len(one["tokens"])
        figures.append(tag("figure", _request(one),
                           tag("div", [heat_token(*each, largest) for each in
                                       zip(tokens, one["rewards"],
                                           ["error" if wrong else "" for wrong in errors],
                                           strict=True)],
                               class_="heat")))
    return section(
        "Token rewards of real rollouts",
        tag("p", "The number under each token is its reward; blue where it is above 0, orange "
            f"below, fullest at {typeset(number(largest, digits=1))}, the largest here. ",
            tag("u", "A wavy underline", class_="error"), " marks what the oracle calls an error."),
        figures)


def edits(examples: Sequence[dict]) -> Html:
    """The original with what changed struck out, the edited answer with what changed underlined."""
    figures = [tag("figure", _request(one), _diff(one, "original", "del"),
                   _diff(one, "edited", "ins")) for one in examples]
    legend = tag("p", "What the alignment calls changed: ", tag("del", "struck out"),
                 " in the original, ", tag("ins", "underlined"), " in the edit.")
    return section("Minimal edits", legend, figures)


def before_after(examples: Sequence[dict]) -> Html:
    """Two answers to one request side by side, each with its number of errors."""
    rows = [tag("tr", tag("th", one["prompt"], scope="row"), _answer(one, "before", "SFT"),
                _answer(one, "after", one.get("label") or "after")) for one in examples]
    caption = "Answers to test prompts, errors counted by the oracle."
    return section("Before and after",
                   table(caption, ["request", "before", "after"], [rows], text=True))


def _request(one: dict) -> Html:
    return tag("figcaption", tag("blockquote", one["prompt"]))


def _blank(token: str) -> str:
    return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")


def heat_token(token: str, reward: float | None, mark: str, largest: float,
               digits: int = 1) -> Html:
    """A token on the ground of its reward, with the reward below; `mark` is one of MARKS or ""."""
    token = _blank(token)
    text = token.removeprefix(" ").replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
    text = text if text.strip() else "\N{OPEN BOX}"         # a blank can be seen
    strength = reward / largest if is_number(reward) else 0
    classes = ["token", *["begins"] * token.startswith(" "), "good" if strength > 0 else "bad"]
    name, meaning = MARKS.get(mark, ("span", ""))
    return tag("span", tag("span", tag(name, text, class_=mark) if mark else text),
               tag("small", typeset(number(reward, digits=digits, sign="+"))),
               tag("span", f" ({meaning}) " if mark else " ", class_="hidden"),
               class_=" ".join(classes), style=f"--strength:{abs(strength):.2f}")


def _diff(one: dict, side: str, mark: str) -> Html:
    """One side's text, each stretch of changed tokens inside <del> or <ins>."""
    parts: list[str] = []
    pairs = zip(one[f"{side}_tokens"], one[f"{side}_changed"], strict=True)
    for changed, group in groupby(pairs, key=lambda pair: bool(pair[1])):
        text = _blank("".join(token for token, _ in group))
        text = text if parts else text.lstrip(" ")
        if changed:
            parts += [" " * text.startswith(" "), tag(mark, text.removeprefix(" "))]
        else:
            parts.append(text)
    return tag("p", tag("b", side), parts, class_="diff")


def _answer(one: dict, side: str, label: str) -> Html:
    errors = number(one.get(f"{side}_errors"))
    count = f"{label}: {typeset(errors)} error{'s' * (errors != '1')}"
    return tag("td", one[side], tag("span", count, class_="role"), class_="text")
