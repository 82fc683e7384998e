"""Shows the profile study: one section of the report per knob, and the same figures as text.

Every section is drawn from the part "knobs" of results.json only (study_results.py describes it),
so `--redraw` draws the report again without the runs.
"""

import math
from itertools import product
from typing import NamedTuple, Sequence

from fgrlhf.reproduce.chart import Curve, line_chart, scatter
from fgrlhf.reproduce.markup import Html, number_cell, section, table, tag, typeset
from fgrlhf.reproduce.study_conclusions import BASELINE, DECODINGS, METHOD, conclusions
from fgrlhf.reproduce.table import (
    DIFFERENCE, WIN_RATES, Column, aligned, cell_texts, is_number, number)

JUDGES = {"rm-sequence": "rlhf", "rm-paper": "fine-grained-paper", "rm-token": "fine-grained"}
RATE, SHARE = WIN_RATES[0], Column("", "wrong %", 100, 1)
HIGHEST, HIGHEST_STYLE = "the highest possible", 6
SHOWN_SIGNS = 20                        # in the printed text; results.json has all of them
RATE_TITLE = "Win rate on test prompts, %"
ACCURACY_TITLE = "Reward models and what PPO gains"
ACCURACY_AXIS = "accuracy of the reward model on held-out pairs, %"
SECONDS = Column("", "seconds", 1, 0, False)
MODELS = (("rm-sequence", "pair_accuracy", "PPO-RLHF, pairs %", 100, 1),
          ("rm-paper", "pair_accuracy", "paper's loss, pairs %", 100, 1),
          ("rm-token", "pair_accuracy", "our loss, pairs %", 100, 1),
          ("rm-paper", "token_auc_within", "paper's loss, AUC within", 1, 3),
          ("rm-token", "token_auc_within", "our loss, AUC within", 1, 3),
          ("rm-token", "auc_seen", "our loss, AUC of seen values", 1, 3),
          ("rm-token", "auc_unseen", "of unseen values", 1, 3))


def columns_of(knob: dict, labels: dict[str, str]) -> list[tuple[str, Column, list]]:
    """Returns the columns of the table of a knob: header, form, one cell per step or None."""
    steps, columns = knob["steps"], []
    if all("highest" in step for step in steps):
        columns.append((f"{HIGHEST} %", RATE, [step["highest"] for step in steps]))
    for metric, unit in (("win_rate", " %"), ("win_rate_greedy", ", greedy %")):
        columns += [(labels[system] + unit, RATE, [s["systems"][system][metric] for s in steps])
                    for system in steps[0]["systems"]]
    for decoding in DECODINGS:
        columns += [(f"lead of {labels[system]}, {decoding}", DIFFERENCE,
                     [s["lead"][system][decoding] for s in steps]) for system in steps[0]["lead"]]
    for system in steps[0].get("facts", ()):
        for place in ("seen", "unseen"):
            columns.append((f"{labels[system]}, wrong {place} %", SHARE,
                            [s["facts"][system][place] for s in steps]))
    for model, metric, header, scale, digits in MODELS:
        found = [s["reward_models"][model].get(metric) for s in steps]
        if any(found):
            columns.append((header, Column(metric, header, scale, digits, False), found))
    for system in (BASELINE, METHOD):
        columns.append((f"seconds of {labels[system]}", SECONDS,
                        [s["systems"][system]["seconds"] for s in steps]))
    return columns


def study_text(results: dict) -> str:
    """Writes each knob as aligned text: a line per figure, a column per step.

    Below it are the conclusions of the knob, and at the end the signs of trouble, without their
    remedies.
    """
    parts, labels = [], results.get("labels")
    for name, knob in (results.get("knobs") or {}).items():
        columns = columns_of(knob, labels)
        cells = [[step["value"], *(" ".join(cell_texts(found[n], form)).rstrip()
                                   for _, form, found in columns)]
                 for n, step in enumerate(knob["steps"])]
        parts.append(f"{knob['title']}: {knob['axis']}\n"
                     + aligned([name, *(header for header, _, _ in columns)], cells, 140)
                     + "".join(f"\n- {told}" for told in conclusions(knob, labels)))
    if parts and (signs := results.get("signs")):
        parts.append("\n".join([f"Signs of trouble: {len(signs)}", *(
            f"- {sign.partition(';')[0]}" for sign in signs[:SHOWN_SIGNS])]
            + [f"- and {len(signs) - SHOWN_SIGNS} more in results.json"]
            * (len(signs) > SHOWN_SIGNS)))
    return "\n\n".join(parts)


def positions(values: Sequence[str]) -> list[float]:
    """Returns the place of each step on the x axis.

    The axis is logarithmic when each step is the same multiple of the one before, within 5%.
    """
    x = [float(value) for value in values]
    factors = [b / a if a else math.inf for a, b in zip(x, x[1:])]
    return [math.log2(v) for v in x] if max(factors) < 1.05 * min(factors) else x


class Chart(NamedTuple):
    """One of the line charts of a knob."""

    kind: str                           # rates, greedy, lead or facts
    title: str                          # what the y axis shows, with its unit
    curves: list[Curve]                 # one per system and seed
    level: float | None                 # a level to compare with
    meaning: str = ""                   # of that level


def axis_of(knob: dict) -> dict[float, str]:
    """Returns {place on the x axis: name of the step}."""
    values = [step["value"] for step in knob["steps"]]
    return dict(zip(positions(values), values))


def charts_of(knob: dict, labels: dict[str, str]) -> list[Chart]:
    """Returns the charts of a knob: win rates, leads and, for held-out, wrong facts."""
    x = list(axis_of(knob))
    order = [METHOD, *(s for s in knob["steps"][0]["systems"] if s != METHOD)]

    def curves(found: dict[str, list[dict]], suffix: str = "", style: int = 0) -> list[Curve]:
        """One curve per seed. found: {system: a cell per step}."""
        return [Curve(labels.get(system, system) + suffix, style or order.index(system), x,
                      [_percent(cell["per_seed"], seed) for cell in cells])
                for system, cells in found.items()
                for seed in range(max(len(cell["per_seed"]) for cell in cells))]
    rates, greedy = ({system: [s["systems"][system][metric] for s in knob["steps"]]
                      for system in order} for metric in ("win_rate", "win_rate_greedy"))
    perfect = []                                        # older results do not have it
    if all("highest" in step for step in knob["steps"]):
        perfect = curves({HIGHEST: [step["highest"] for step in knob["steps"]]}, "", HIGHEST_STYLE)
    leads = {system: [s["lead"][system]["sampled"] for s in knob["steps"]]
             for system in order if system in knob["steps"][0]["lead"]}
    charts = [Chart("rates", RATE_TITLE, curves(rates) + perfect, 50, "the SFT sample"),
              Chart("greedy", "Win rate of greedy answers, %", curves(greedy) + perfect, 50,
                    "the SFT sample"),
              Chart("lead", f"Lead over {labels[BASELINE]}, points of win rate", curves(leads), 0,
                    labels[BASELINE])]
    if "facts" in knob["steps"][0]:
        shares = lambda system, place: {system: [s["facts"][system][place] for s in knob["steps"]]}
        wrong = [curves(shares(system, place), f", {place}", style) for style, (system, place) in
                 enumerate(product((METHOD, "imitation", "sft"), ("unseen", "seen")))]
        charts.append(Chart("facts", "Wrong facts, % of the requested ones", sum(wrong, []), None))
    return charts


def knob_section(name: str, knob: dict, labels: dict[str, str]) -> Html:
    """Draws a knob: win rates, leads and wrong facts over its steps, and the table."""
    drawn = [tag("figure", tag("figcaption", tag("b", c.title), f", over the {knob['axis']}"),
                 line_chart(c.curves, c.title, knob["axis"], c.level, bands=True,
                            x_names=axis_of(knob)))
             for c in charts_of(knob, labels)]
    columns = columns_of(knob, labels)
    header = ["figure", *(step["value"] for step in knob["steps"])]
    rows = [tag("tr", tag("th", title, scope="row"), [
        number_cell(cell, form._replace(header=step["value"]))
        for cell, step in zip(found, knob["steps"])]) for title, form, found in columns]
    return section(knob["title"], drawn, table(
        f"All figures, over the {knob['axis']} (--only {name}). In the charts, lines are means "
        "over seeds and bands reach from the lowest to the highest seed; brackets are 95% "
        "intervals. "
        f"All knobs share the step {knob['default']}.", header, [rows]),
        tag("p", "Where each system is ahead, by the means over seeds. A step may be chance if its "
            "95% interval contains 0."),
        tag("ul", [tag("li", told) for told in conclusions(knob, labels)]))


def knob_sections(results: dict) -> Sequence[Html]:
    """Returns the sections of all knobs, and one on the reward models of all of them."""
    knobs = results.get("knobs") or {}
    found = [knob_section(name, knob, results["labels"]) for name, knob in knobs.items()]
    return found + ([accuracy_section(results)] if knobs else [])


def accuracies(knobs: dict) -> list[tuple]:
    """Returns rows (knob and step, accuracies, win rates): one of each per method, as means.

    The rows are sorted by the accuracy of our loss. The step that all knobs share comes once.
    """
    rows, shared = [], False
    for name, knob in knobs.items():
        for step in knob["steps"]:
            if step["value"] == knob["default"]:
                if shared:
                    continue
                shared = True
            mean = lambda table, key, metric: (table[key].get(metric) or {}).get("mean")
            rows.append((f"{name} {step['value']}", [
                mean(step["reward_models"], model, "pair_accuracy") for model in JUDGES], [
                mean(step["systems"], system, "win_rate") for system in JUDGES.values()]))
    return sorted(rows, key=lambda row: (row[1][-1] is None, row[1][-1]))


def accuracy_groups(rows: Sequence[tuple], labels: dict[str, str]) -> list[Curve]:
    """Returns the points of each method in percent. rows: those of `accuracies`."""
    hundred = lambda value: 100 * value if is_number(value) else None
    # 2, 3 and 0 are the styles of these systems in the other charts
    return [Curve(labels[system], (2, 3, 0)[n], [hundred(row[1][n]) for row in rows],
                  [hundred(row[2][n]) for row in rows])
            for n, system in enumerate(JUDGES.values())]


def accuracy_section(results: dict) -> Html:
    """Draws what PPO gains against the accuracy of its reward model, over all knobs and steps."""
    rows, labels = accuracies(results["knobs"]), results["labels"]
    groups = accuracy_groups(rows, labels)
    header = ["step", *(f"{labels[system]}: {what}" for what in ("pairs %", "win rate %")
                        for system in JUDGES.values())]
    cells = [tag("tr", tag("th", name, scope="row"), [
        tag("td", typeset(number(value, 100, 1)), class_="number", data_label=title)
        for value, title in zip([*accuracy, *rates], header[1:])])
        for name, accuracy, rates in rows]
    return section(ACCURACY_TITLE, tag(
        "figure", tag("figcaption", tag("b", RATE_TITLE), f", over the {ACCURACY_AXIS}"),
        scatter(groups, RATE_TITLE, ACCURACY_AXIS, 50)), table(
        "Every step of every knob, as means over seeds, sorted by the accuracy of our loss. The "
        "pairs are right preferences, whatever the annotators of the step do.", header, [cells]))


def _percent(values: Sequence[float | None], seed: int) -> float | None:
    value = values[seed] if seed < len(values) else None
    return 100 * value if is_number(value) else None
