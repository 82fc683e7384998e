"""HTML that is escaped by construction: `tag` escapes every text that no `tag` has made."""

import html
from typing import Sequence


class Html(str):
    """Text that is markup already."""


def tag(name: str, *children, **attributes) -> Html:
    """<name attributes>children</name>; None is left out, lists are joined, other text is escaped.

    An attribute's trailing underscore falls away (`class_`), one inside becomes a hyphen.
    """
    shown = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
                    for key, value in attributes.items() if value is not None)
    return Html(f"<{name}{shown}>{join(children)}</{name}>")


def join(children: Sequence) -> Html:
    """The children one after the other, lists flattened, escaped unless they are Html."""
    parts = []
    for child in children:
        if isinstance(child, (list, tuple)):
            parts.append(join(child))
        elif child is not None:
            parts.append(child if isinstance(child, Html) else html.escape(str(child)))
    return Html("".join(parts))


def section(title: str, *children) -> Html:
    return tag("section", tag("h2", title), *children)


def table(caption: str | None, header: Sequence, groups: Sequence[Sequence[Html]],
          text: bool = False) -> Html:
    """header: the first stands above the row names. groups: of rows, with a fine rule between.

    text: the columns hold prose, not numbers.
    """
    head = [cell if isinstance(cell, Html) else
            tag("th", cell, scope="col", class_="number" if n and not text else None)
            for n, cell in enumerate(header)]
    body = [tag("tbody", *rows) for rows in groups]
    return tag("div", tag("table", tag("caption", caption), tag("thead", tag("tr", *head)), body),
               class_="scroll")


def typeset(number: str) -> str:
    """A number of the terminal with a real minus; "-" alone, no value, becomes a dash."""
    return "\N{EN DASH}" if number == "-" else number.replace("-", "\N{MINUS SIGN}")
