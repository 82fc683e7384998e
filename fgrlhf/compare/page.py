"""The comparison as one HTML page: the tables of the terminal, and one chart per metric.

The page is built from the parts of the report of `make reproduce`, and like it needs no network,
no script and no colour.
"""

import math
from collections.abc import Sequence

import numpy as np

from fgrlhf.compare.runs import Group, shared_metrics
from fgrlhf.compare.tables import Table
from fgrlhf.reproduce.chart import Curve, line_chart
from fgrlhf.reproduce.markup import Html, document, section, table, tag, typeset

EPISODES = "rollout/episodes"
MOST_POINTS = 300                               # of a curve; a chart is 900 pixels wide


def page(groups: Sequence[Group], tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Returns the whole HTML document."""
    names = " \N{MIDDLE DOT} ".join(group.name for group in groups)
    header = tag("header", tag("h1", "Comparison of runs"), tag("p", names, class_="muted"),
                 [tag("p", note) for note in notes])
    return document(f"Comparison of runs: {names}",
                    [header, *map(table_section, tables), *_curves(groups)])


def table_section(one: Table) -> Html:
    """Shows a table of the terminal as a section."""
    header = ["", *one.header]
    rows = [tag("tr", tag("th", name, scope="row"),
                [tag("td", _shown(text),
                     tag("span", " ", _shown(more), class_="interval") if more else None,
                     class_="number", data_label=label)
                 for label, (text, more) in zip(one.header, cells)])
            for name, cells in one.rows.items()]
    return section(one.title, table(one.caption, header, [rows]))


def _shown(text: str) -> str:
    """Gives numbers a real minus sign. Hyphens in names stay."""
    return text if any(map(str.isalpha, text)) else typeset(text)


# ----- curves -------------------------------------------------------------------------------------

def _curves(groups: Sequence[Group]) -> list[Html]:
    """Draws one chart for each metric that all runs have, over episodes if all runs have them."""
    shared = shared_metrics(groups)
    unit = "episodes" if EPISODES in shared else "steps"
    figures = [tag("figure", tag("figcaption", tag("b", name), f", over {unit}"),
                   line_chart(curves_of(groups, name, unit), name, unit))
               for name in shared if name not in (EPISODES, "seconds")]
    about = []
    if any(len(group.runs) > 1 for group in groups):
        about.append("Each thin line is a seed, and the thick line is the mean of the seeds up to "
                     "the end of the shortest. ")
    if any(_block(groups, name) > 1 for name in shared):
        about.append(f"A curve with more than {MOST_POINTS} points is shown by the means of "
                     "neighbouring steps.")
    note = tag("p", about, class_="muted") if about else None
    return [section("Curves", note, figures)] if figures else []


def _block(groups: Sequence[Group], name: str) -> int:
    """Returns how many steps become one point, the same number for all curves of a chart."""
    longest = max(len(run.metrics[name]) for group in groups for run in group.runs)
    return math.ceil(longest / MOST_POINTS)


def curves_of(groups: Sequence[Group], name: str, unit: str) -> list[Curve]:
    """Returns the curve of one metric of each run. unit: "episodes" or "steps".

    The runs of a group keep the steps that all of them have, and what comes after the end of the
    shortest, because the mean of a group is taken point by point.
    """
    block, curves = _block(groups, name), []
    for style, group in enumerate(groups):
        each = [run.metrics[name] for run in group.runs]
        shared, end = set.intersection(*map(set, each)), min(map(max, each))
        for run, values in zip(group.runs, each):
            steps = [step for step in values if step in shared or step > end]
            x = run.metrics[EPISODES] if unit == "episodes" else dict(zip(steps, steps))
            steps = [step for step in steps if step in x]
            curves.append(Curve(group.name, style % 8, _means([x[s] for s in steps], block),
                                _means([values[s] for s in steps], block)))
    return curves


def _means(values: Sequence[float], block: int) -> list[float]:
    """Returns the mean of each `block` neighbouring values; the last block may be shorter."""
    return [float(np.mean(values[at:at + block])) for at in range(0, len(values), block)]
