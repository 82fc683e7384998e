"""Writes the charts of the profile study as SVG files, for Markdown and other pages.

    OUT/figures/KNOB-rates.svg      the win rate of each system
    OUT/figures/KNOB-lead.svg       the lead of each system over PPO-RLHF
    OUT/figures/held-out-facts.svg  the share of wrong facts
    OUT/figures/accuracy.svg        win rates against the accuracy of the reward model

Each file is a picture of its own: it holds title, axes, names of the systems, colours for a light
and a dark screen, and a text for screen readers. The same results give the same bytes.
"""

import textwrap
from pathlib import Path
from typing import Sequence

from fgrlhf.data.files import write_atomic
from fgrlhf.reproduce.chart import HEIGHT, grouped, legend_row, line_chart, mean_curve, scatter
from fgrlhf.reproduce.markup import Html, style, tag
from fgrlhf.reproduce.study_report import (
    ACCURACY_AXIS, ACCURACY_TITLE, RATE_TITLE, Chart, accuracies, accuracy_groups, axis_of,
    charts_of)

WIDTH, MARGIN = 720, 8
PLOT = 650                              # width of the chart, which is then enlarged to WIDTH
HEAD, LINE = 56, 17                     # height of title and y label, and of a line below the chart
LETTERS = 104                           # of a line below the chart
STYLE = """
.paper { fill: var(--paper); } svg .title { font-size: 17px; fill: var(--ink); }
svg .y { font-size: 13px; font-style: italic; } svg .note { font-size: 12.5px; }
svg circle { stroke: var(--paper); stroke-width: .8; }
"""


def write_figures(folder: str | Path, results: dict) -> None:
    """Writes the charts of all knobs of results.json. Other results have none."""
    knobs, seeds = results.get("knobs") or {}, results.get("seeds") or []
    for name, knob in knobs.items():
        for chart in charts_of(knob, results["labels"]):
            write(Path(folder, f"{name}-{chart.kind}.svg"), knob_figure(knob, chart, seeds))
    if knobs:
        write(Path(folder, "accuracy.svg"), accuracy_figure(results, seeds))


def write(path: Path, drawn: Html) -> None:
    write_atomic(path, f"{drawn}\n".encode())


def knob_figure(knob: dict, chart: Chart, seeds: Sequence[int]) -> Html:
    """Draws a line chart of a knob."""
    names, axis = axis_of(knob), knob["axis"]
    means = [mean_curve(curves) for curves in grouped(chart.curves).values()]
    points = lambda mean: ", ".join(f"{y:.1f} at {names[x]}" for x, y in zip(mean.x, mean.y))
    spoken = "; ".join(f"{mean.label} {points(mean)}" for mean in means)
    note = (f"Lines: means over {len(seeds)} seeds. Bands: from the lowest to the highest seed."
            if len(seeds) > 1 else "One seed.")
    if chart.level is not None:
        note += f" Dotted line: {chart.meaning}."
    return standalone(knob["title"], chart.title, f"{chart.title}, over the {axis}. {spoken}.",
                      line_chart(chart.curves, chart.title, axis, chart.level, bands=True,
                                 x_names=names, alone=PLOT), note)


def accuracy_figure(results: dict, seeds: Sequence[int]) -> Html:
    """Draws the win rates against the accuracy of the reward models."""
    groups = accuracy_groups(accuracies(results["knobs"]), results["labels"])
    note = ("A disc is one step of one knob, "
            + (f"as a mean over {len(seeds)} seeds." if len(seeds) > 1 else "with one seed.")
            + " Dotted line: the SFT sample.")
    return standalone(ACCURACY_TITLE, RATE_TITLE, f"{RATE_TITLE}, over the {ACCURACY_AXIS}. {note}",
                      scatter(groups, RATE_TITLE, ACCURACY_AXIS, 50, alone=PLOT), note,
                      legend_row(groups, 12))


def standalone(title: str, y_label: str, about: str, chart: Html, note: str,
               legend: Sequence[Html] = ()) -> Html:
    """Returns a whole SVG file: title and y label, the chart, its legend and a note below.

    about: what a screen reader reads. chart: PLOT units wide and HEIGHT high.
    """
    scale, notes = WIDTH / PLOT, textwrap.wrap(note, LETTERS)
    rows = bool(legend) * 24
    below = HEAD + rows + HEIGHT * scale
    height = round(below + LINE * len(notes) + MARGIN)
    text = lambda y, words, kind: tag("text", words, x=MARGIN, y=f"{y:.0f}", class_=kind)
    return tag(
        "svg", tag("title", title, id="title"), tag("desc", about, id="about"),
        tag("style", style("chart.css"), Html(STYLE)),
        tag("rect", width=WIDTH, height=height, class_="paper"), text(25, title, "title"),
        text(49, y_label, "y"),
        tag("g", legend, transform=f"translate(0 {HEAD}) scale({scale:.3f})") if legend else None,
        tag("svg", chart, y=HEAD + rows, width=WIDTH, height=round(HEIGHT * scale)),
        [text(below + LINE * (n + 0.6), line, "note") for n, line in enumerate(notes)],
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {height}", width=WIDTH,
        height=height, role="img", aria_labelledby="title about")
