"""Shows texts in the report: token rewards of answers, minimal edits, answers before and after PPO.

A token has its blank in front: " of", or "\\u2581of" from sentencepiece.
"""

from itertools import groupby
from typing import Sequence

from fgrlhf.reproduce.markup import Html, section, table, tag, typeset
from fgrlhf.reproduce.table import is_number, number

# The marks of a token: the HTML element, and the words for a screen reader.
MARKS = {"error": ("u", "error"), "out": ("del", "taken out"), "in": ("ins", "put in"),
         "gap": ("u", "credited with a gap")}


def heat_maps(maps: Sequence[dict],
              underlined: str | None = "an error that the oracle found") -> Html:
    """Shows each token on the colour of its reward, with the number below and errors underlined.

    Maps with the same prompt, which are neighbours, are the answers of several systems.
    All maps share one scale: the largest absolute reward has full colour. underlined: what the
    errors are, None when there are none. Raises ValueError when tokens, rewards and errors differ
    in number.
    """
    mark = [tag("u", "A wavy underline", class_="error"), f" marks {underlined}."]
    largest = max((abs(r) for one in maps for r in one["rewards"] if is_number(r)), default=0) or 1
    figures = [tag("figure", tag("figcaption", tag("blockquote", prompt)),
                   [_heat_map(one, largest) for one in group])
               for prompt, group in groupby(maps, key=lambda one: one["prompt"])]
    return section(
        "Token rewards",
        tag("p", "The answers to the first prompts. The number under each token is its reward. "
            "Blue means above 0, orange below 0. "
            f"The colour is strongest at {typeset(number(largest, digits=1))}, the largest "
            "absolute reward here. ", mark if underlined else None),
        figures)


def _heat_map(one: dict, largest: float) -> Html:
    errors = one.get("errors") or [False] * len(one["tokens"])
    tokens = [heat_token(token, reward, "error" if wrong else "", largest)
              for token, reward, wrong in zip(one["tokens"], one["rewards"], errors, strict=True)]
    label = tag("span", one["label"], class_="role") if one.get("label") else None
    return tag("div", label, tokens, class_="heat")


def edits(examples: Sequence[dict]) -> Html:
    """Shows the original with changes struck out, and the edited answer with changes underlined."""
    figures = [tag("figure", _request(one), _diff(one, "original", "del"),
                   _diff(one, "edited", "ins")) for one in examples]
    legend = tag("p", "The first annotations. The alignment marks the changed tokens: ",
                 tag("del", "struck out"), " in the original, ", tag("ins", "underlined"),
                 " in the edit.")
    return section("Minimal edits", legend, figures)


def before_after(groups: Sequence[dict]) -> Html:
    """Shows two answers to each request next to each other, with their errors or rewards.

    The caption of each group says by which rule its requests were chosen.
    """
    tables = []
    for group in groups:
        labels = group["labels"]
        rows = [tag("tr", tag("th", one["prompt"], scope="row"), _answer(one, "before", labels[0]),
                    _answer(one, "after", labels[1])) for one in group["rows"]]
        tables.append(table(group["caption"], ["request", "before", "after"], [rows], text=True))
    return section("Before and after", tables)


def _request(one: dict) -> Html:
    return tag("figcaption", tag("blockquote", one["prompt"]))


def _blank(token: str) -> str:
    return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")


def heat_token(token: str, reward: float | None, mark: str, largest: float,
               digits: int = 1) -> Html:
    """Shows a token on the colour of its reward, with the number below.

    mark: a key of MARKS, or "". largest: the absolute reward that has full colour.
    """
    token = _blank(token)
    text = token.removeprefix(" ").replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
    text = text if text.strip() else "\N{OPEN BOX}"         # makes a blank visible
    strength = reward / largest if is_number(reward) else 0
    classes = ["token", *["begins"] * token.startswith(" "), "good" if strength > 0 else "bad"]
    name, meaning = MARKS.get(mark, ("span", ""))
    return tag("span", tag("span", tag(name, text, class_=mark) if mark else text),
               tag("small", typeset(number(reward, digits=digits, sign="+"))),
               tag("span", f" ({meaning}) " if mark else " ", class_="hidden"),
               class_=" ".join(classes), style=f"--strength:{abs(strength):.2f}")


def _diff(one: dict, side: str, mark: str) -> Html:
    """Writes the text of one side, with each run of changed tokens inside <del> or <ins>."""
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
    errors, reward = number(one.get(f"{side}_errors")), one.get(f"{side}_reward")
    said = (f"error{'s' * (errors != '1')}" if reward is None else "is R, equation (1)")
    shown = errors if reward is None else number(reward, digits=3, sign="+")
    return tag("td", one[side], tag("span", f"{label}: {typeset(shown)} {said}", class_="role"),
               class_="text")
