"""Draws the charts of the report as inline SVG: learning curves and strips of intervals.

Shapes have classes only (`s0`..`s7` for a system, `seed`, `mean`, `grid`). chart.css gives them
colour, width and dashes, so the same chart works on a light screen, a dark screen and paper. Values
are in the unit that is shown (percent, not shares). figures.py makes files of some charts.
"""

import math
from typing import Callable, NamedTuple, Sequence

import numpy as np

from fgrlhf.reproduce.markup import Html, tag, typeset
from fgrlhf.reproduce.table import is_number

WIDTH, HEIGHT = 900, 300
NARROW = 340                                            # the width on a phone
LEFT, TOP, BOTTOM = 46, 16, 256                         # of the plot; names are to its right
STRIP_WIDTH, STRIP_HEIGHT = 150, 18
LINE, LETTER = 15, 7.2              # height of a line; width of a letter in the widest of the fonts

Scale = Callable[[float], float]                        # a value -> pixels


class Curve(NamedTuple):
    """The curve of one run. Curves with the same label are the seeds of one system."""

    label: str
    style: int                          # 0 the method, 1.. the others: classes s0, s1, ...
    x: Sequence[float]                  # [n]
    y: Sequence[float]                  # [n] a point that is not finite is left out


def ticks(values: Sequence[float], count: int = 5) -> list[float]:
    """Returns about `count` evenly spaced round numbers that enclose all finite values."""
    finite = [value for value in values if is_number(value)] or [0.0]
    low, high = min(finite), max(finite)
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size:                       # equal, or equal up to rounding
        high = low + max(1.0, 1e-6 * size)
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(s * power for s in (1, 2, 2.5, 5, 10, 20) if s * power * count >= high - low)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [k * step for k in range(first, last + 1)]


def spread(positions: Sequence[float], gap: float, high: float) -> list[float]:
    """Moves positions until any two are at least `gap` apart, in their order and below `high`."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed, floor, ceiling = list(positions), -math.inf, high
    for i in order:
        placed[i] = max(placed[i], floor)
        floor = placed[i] + gap
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def mean_curve(seeds: Sequence[Curve]) -> Curve:
    """Returns the mean over seeds of each point, up to the end of the shortest curve."""
    n = min(len(curve.x) for curve in seeds)
    return seeds[0]._replace(x=np.mean([curve.x[:n] for curve in seeds], axis=0).tolist(),
                             y=np.mean([curve.y[:n] for curve in seeds], axis=0).tolist())


def grouped(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Groups curves by their label, without empty curves.

    A point that is not finite in one seed is left out of all seeds of its system, so that a mean or
    a band compares the same points.
    """
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        if _finite(curve).x:
            groups.setdefault(curve.label, []).append(curve)
    for label, seeds in groups.items():
        missing = {i for curve in seeds for i, point in enumerate(zip(curve.x, curve.y))
                   if not all(map(is_number, point))}
        groups[label] = [_without(curve, missing) for curve in seeds]
    return {label: seeds for label, seeds in groups.items() if all(curve.x for curve in seeds)}


def line_chart(curves: Sequence[Curve], name: str, x_label: str, reference: float | None = None,
               reference_label: str = "", bands: bool = False,
               x_names: dict[float, str] | None = None, alone: float | None = None) -> Html:
    """Draws a line chart as two SVGs: one for wide screens and one for narrow screens.

    The style sheet shows the drawing that fits. The wide one has the name of each system at the end
    of its curve. The narrow one, for a phone, has a legend below. Several curves with the same
    label are the seeds of one system: they are thin lines, and a thick line is their mean.

    name             begins the text that a screen reader reads
    reference        a level to compare with, drawn as a dotted line
    bands            shades the range from the lowest to the highest seed, in place of thin lines
    x_names          names of the ticks of the x axis, in place of round numbers
    alone            returns only the SVG of the wide drawing, in this width
    """
    groups = grouped(curves)
    shown = [curve for seeds in groups.values() for curve in seeds]
    x_ticks = sorted(x_names) if x_names else ticks([x for c in shown for x in c.x] + [0])
    y_ticks = ticks([y for curve in shown for y in curve.y] + [reference])
    down = _scale(y_ticks, BOTTOM, TOP)
    means = [mean_curve(seeds) for seeds in groups.values()]
    ends = [max(curve.x[-1] for curve in seeds) for seeds in groups.values()]
    thin = [curve for seeds in groups.values() if len(seeds) > 1 for curve in seeds]
    spoken = "; ".join(f"{mean.label} ends at {mean.y[-1]:.4g}" for mean in means)

    def drawn(width: float, right: float, kind: str) -> Html:
        across = _scale(x_ticks, LEFT, right)
        names = [(x_names or {}).get(x, _tick_label(x)) for x in x_ticks]
        return tag("svg", _axes(x_ticks, y_ticks, across, down, x_label, names),
                   _reference(reference, reference_label * (kind == "wide"), right, down),
                   [_band(seeds, across, down) for seeds in groups.values()] if bands else
                   [_polyline(curve, "seed", across, down) for curve in thin],
                   [_polyline(curve, "mean", across, down) for curve in means],
                   _names(means, ends, across, down) if kind == "wide" else None,
                   viewBox=f"0 0 {width} {HEIGHT}", class_=f"chart {kind}",
                   role="img", aria_label=f"{name}, over {x_label}: {spoken}.")
    room = LETTER * max(map(len, groups), default=0)
    if alone:
        return drawn(alone, alone - 28 - room, "wide")
    samples = [(_polyline(mean._replace(x=[0, 40], y=[9, 9]), "mean", float, float), mean.label)
               for mean in means]
    if reference is not None and reference_label:
        samples.append((_segment(0, 9, 40, 9, "reference"), reference_label))
    legend = [tag("li", tag("svg", line, viewBox="0 0 40 18", class_="sample", aria_hidden="true"),
                  label) for line, label in samples]
    return tag("div", drawn(WIDTH, WIDTH - 20 - room, "wide"),
               drawn(NARROW, NARROW - 16, "narrow"), tag("ul", legend, class_="legend narrow"))


def scatter(groups: Sequence[Curve], name: str, x_label: str, reference: float | None = None,
            alone: float | None = None) -> Html:
    """Draws a scatter plot: each point is a disc, and each group has a colour and a legend entry.

    `alone`: returns only the SVG, in this width, without a legend.
    """
    groups = [group for group in map(_finite, groups) if group.x]
    x_ticks = ticks([x for group in groups for x in group.x])
    y_ticks = ticks([*(y for group in groups for y in group.y), reference])
    width = alone or WIDTH
    across, down = _scale(x_ticks, LEFT, width - 20), _scale(y_ticks, BOTTOM, TOP)
    disc = lambda x, y, style: tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=4, class_=f"s{style}")
    drawn = tag("svg", _axes(x_ticks, y_ticks, across, down, x_label, map(_tick_label, x_ticks)),
                _reference(reference, "", width - 20, down),
                [disc(across(x), down(y), g.style) for g in groups for x, y in zip(g.x, g.y)],
                viewBox=f"0 0 {width} {HEIGHT}", class_="chart", role="img",
                aria_label=f"{name}, over {x_label}; the table has the figures.")
    if alone:
        return drawn
    legend = [tag("li", tag("svg", disc(9, 9, g.style), viewBox="0 0 40 18", class_="sample",
                            aria_hidden="true"), g.label) for g in groups]
    return tag("div", drawn, tag("ul", legend, class_="legend"))


def legend_row(groups: Sequence[Curve], y: float) -> list[Html]:
    """Draws a disc and the name of each group in one row, for a chart without HTML around it."""
    marks, x = [], float(LEFT)
    for group in groups:
        marks += [tag("circle", cx=f"{x + 4:.1f}", cy=f"{y - 4:.1f}", r=4,
                      class_=f"s{group.style}"), _text(x + 14, y, group.label, "start")]
        x += 36 + LETTER * len(group.label)
    return marks


def strip(mean: float | None, interval: Sequence[float], per_seed: Sequence[float],
          scale: Sequence[float], reference: float) -> Html:
    """Draws an interval as a line, its mean as a disc and its seeds as ticks.

    scale: the ticks of the scale that all rows share. interval: [low, high] or []. The strip is
    hidden from screen readers, because the next cell has the same figures as text.
    """
    at, middle = _scale(scale, 4, STRIP_WIDTH - 4), STRIP_HEIGHT / 2
    marks = [_segment(at(reference), 0, at(reference), STRIP_HEIGHT, "reference")]
    if interval:
        marks.append(_segment(at(interval[0]), middle, at(interval[1]), middle, "whisker"))
    if len(per_seed) > 1:
        marks += [_segment(at(v), middle - 5, at(v), middle + 5, "tick") for v in per_seed]
    if is_number(mean):
        marks.append(tag("circle", cx=f"{at(mean):.1f}", cy=middle, r=3.5))
    return _strip(marks)


def strip_axis(scale: Sequence[float], reference: float) -> Html:
    """Labels the reference of the strips below, and the ends of their scale if there is room."""
    at = _scale(scale, 4, STRIP_WIDTH - 4)
    shown = [reference, *(end for end in (scale[0], scale[-1])
                          if abs(at(end) - at(reference)) > 30)]
    return _strip([_text(at(value), 12, _tick_label(value), "middle") for value in shown])


def _strip(marks: Sequence[Html]) -> Html:
    return tag("svg", marks, viewBox=f"0 0 {STRIP_WIDTH} {STRIP_HEIGHT}", class_="strip",
               aria_hidden="true")


def _finite(curve: Curve) -> Curve:
    return _without(curve, {i for i, point in enumerate(zip(curve.x, curve.y, strict=True))
                            if not all(map(is_number, point))})


def _without(curve: Curve, missing: set[int]) -> Curve:
    """Returns the curve without the points at these places."""
    kept = [i for i in range(len(curve.x)) if i not in missing]
    return curve._replace(x=[curve.x[i] for i in kept], y=[curve.y[i] for i in kept])


def _scale(axis: Sequence[float], start: float, end: float) -> Scale:
    """Returns the map from the range of the ticks to the pixels start..end."""
    return lambda value: start + (end - start) * (value - axis[0]) / (axis[-1] - axis[0])


def _tick_label(value: float) -> str:
    return typeset(f"{value:,.6g}")


def _segment(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return tag("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=kind)


def _text(x: float, y: float, text: str, anchor: str, kind: str | None = None) -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=kind)


def _polyline(curve: Curve, kind: str, across: Scale, down: Scale) -> Html:
    points = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in zip(curve.x, curve.y))
    return tag("polyline", points=points, class_=f"{kind} s{curve.style}")


def _band(seeds: Sequence[Curve], across: Scale, down: Scale) -> Html | None:
    """Shades the range of several curves over the same x, up to the end of the shortest."""
    n = min(len(curve.x) for curve in seeds)
    if len(seeds) < 2 or n < 2:
        return None
    values = np.array([curve.y[:n] for curve in seeds])
    edge = [*zip(seeds[0].x, values.max(0)), *reversed([*zip(seeds[0].x, values.min(0))])]
    points = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in edge)
    return tag("polygon", points=points, class_=f"band s{seeds[0].style}")


def _axes(x_ticks: Sequence[float], y_ticks: Sequence[float], across: Scale, down: Scale,
          x_label: str, names: Sequence[str]) -> list[Html]:
    right = across(x_ticks[-1])
    marks = [_segment(LEFT, down(y), right, down(y), "grid") for y in y_ticks]
    marks += [_text(LEFT - 8, down(y) + 4, _tick_label(y), "end") for y in y_ticks]
    marks += [_segment(across(x), BOTTOM, across(x), BOTTOM + 4, "axis") for x in x_ticks]
    marks += [_text(across(x), BOTTOM + 18, name, "middle") for x, name in zip(x_ticks, names)]
    return [*marks, _segment(LEFT, BOTTOM, right, BOTTOM, "axis"),
            _text(right, BOTTOM + 36, x_label, "end", "unit")]


def _reference(level: float | None, label: str, right: float, down: Scale) -> list[Html]:
    if level is None:
        return []
    return [_segment(LEFT, down(level), right, down(level), "reference"),
            _text(right + 6, down(level) + 4, label, "start", "unit")]


def _names(means: Sequence[Curve], ends: Sequence[float], across: Scale, down: Scale) -> list[Html]:
    """Draws a disc at the end of each mean and the name to the right, without overlaps."""
    heights = spread([down(mean.y[-1]) for mean in means], LINE, BOTTOM)
    marks = []
    for mean, end, height in zip(means, ends, heights):
        x, y, right = across(mean.x[-1]), down(mean.y[-1]), across(end)
        style = f"s{mean.style}"
        marks += [tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.2, class_=style),
                  _segment(right + 4, y, right + 14, height, f"leader {style}"),
                  _text(right + 17, height + 4, mean.label, "start", f"name {style}")]
    return marks
