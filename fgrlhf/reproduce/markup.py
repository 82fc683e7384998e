"""Builds HTML that is always escaped: `tag` escapes every text that is not from another `tag`."""

import html
from pathlib import Path
from typing import Sequence

from fgrlhf.reproduce.table import Column, cell_texts

HERE = Path(__file__).parent
# With this policy the browser refuses everything that is not on the page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class Html(str):
    """Text that is already markup."""


def tag(name: str, *children, **attributes) -> Html:
    """Returns <name attributes>children</name>, with every attribute and other text escaped.

    Children and attributes that are None are left out, and lists are joined. In the name of an
    attribute a trailing underscore is dropped (`class_`) and any other becomes a hyphen.
    """
    shown = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
                    for key, value in attributes.items() if value is not None)
    return Html(f"<{name}{shown}>{join(children)}</{name}>")


def join(children: Sequence) -> Html:
    """Joins the children, flattens lists, and escapes what is not Html."""
    parts = []
    for child in children:
        if isinstance(child, (list, tuple)):
            parts.append(join(child))
        elif child is not None:
            parts.append(child if isinstance(child, Html) else html.escape(str(child)))
    return Html("".join(parts))


def document(title: str, children: Sequence[Html]) -> str:
    """Returns a whole HTML document in the style of the report, which needs no other file."""
    return "\n".join([
        '<!doctype html>', '<html lang="en">', '<head>', '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">', tag("title", title),
        tag("style", style("chart.css"), style("style.css")), '</head>', '<body>', '<main>',
        *children, '</main>', '</body>', '</html>', ''])


def style(name: str) -> Html:
    """Reads one of the style sheets of this folder."""
    return Html((HERE / name).read_text(encoding="utf-8"))


def section(title: str, *children) -> Html:
    return tag("section", tag("h2", title), *children, id=title.lower().replace(" ", "-"))


def table(caption: str | None, header: Sequence, groups: Sequence[Sequence[Html]],
          text: bool = False) -> Html:
    """Returns a table. Its first column has the names of the rows.

    groups: lists of rows, with a fine line between them. text: the columns have prose, not numbers.
    """
    head = [cell if isinstance(cell, Html) else
            tag("th", cell, scope="col", class_="number" if n and not text else None)
            for n, cell in enumerate(header)]
    body = [tag("tbody", *rows) for rows in groups]
    return tag("div", tag("table", tag("caption", caption), tag("thead", tag("tr", *head)), body),
               class_="scroll")


def typeset(number: str) -> str:
    """Gives a number of the terminal a real minus sign. A single "-" (no value) becomes a dash."""
    return "\N{EN DASH}" if number == "-" else number.replace("-", "\N{MINUS SIGN}")


def number_cell(cell: dict | None, column: Column) -> Html:
    """Returns the cell of a table with a mean and, behind it, its interval if there is one."""
    mean, interval = map(typeset, cell_texts(cell, column))
    return tag("td", mean, tag("span", " ", interval, class_="interval") if interval else None,
               class_="number", data_label=column.header)
