"""Shows the profile study: one section of the report per knob, and the same figures as text.

Every section is drawn from the part "knobs" of results.json only (study_results.py describes it),
so `--redraw` draws the report again without the runs.
"""

import math
from typing import Sequence

from fgrlhf.reproduce.chart import Curve, line_chart
from fgrlhf.reproduce.markup import Html, section, table, tag, typeset
from fgrlhf.reproduce.table import DIFFERENCE, WIN_RATES, Column, aligned, cell_texts, is_number

BASELINE, METHOD = "rlhf", "fine-grained"
RATE, SHARE = WIN_RATES[0], Column("", "wrong %", 100, 1)
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
    for system in steps[0]["systems"]:
        columns.append((f"{labels[system]} %", RATE, [s["systems"][system]["win_rate"]
                                                      for s in steps]))
    for system in steps[0]["lead"]:
        columns.append((f"lead of {labels[system]}", DIFFERENCE,
                        [s["lead"][system]["sampled"] for s in steps]))
    for system in steps[0].get("facts", ()):
        for place in ("seen", "unseen"):
            columns.append((f"{labels[system]}, wrong {place} %", SHARE,
                            [s["facts"][system][place] for s in steps]))
    for model, metric, header, scale, digits in MODELS:
        found = [s["reward_models"][model].get(metric) for s in steps]
        if any(found):
            columns.append((header, Column(metric, header, scale, digits, False), found))
    return columns


def study_text(results: dict) -> str:
    """Writes each knob as aligned text: a line per figure, a column per step."""
    parts, labels = [], results.get("labels")
    for name, knob in (results.get("knobs") or {}).items():
        columns = columns_of(knob, labels)
        cells = [[step["value"], *(" ".join(cell_texts(found[n], form)).rstrip()
                                   for _, form, found in columns)]
                 for n, step in enumerate(knob["steps"])]
        parts.append(f"{knob['title']}: {knob['axis']}\n"
                     + aligned([name, *(header for header, _, _ in columns)], cells, 140))
    return "\n\n".join(parts)


def positions(values: Sequence[str]) -> list[float]:
    """Where the steps are on the x axis: by their logarithm where each is a multiple of the last.

    The multiples may differ by 5%.
    """
    x = [float(value) for value in values]
    factors = [b / a if a else math.inf for a, b in zip(x, x[1:])]
    return [math.log2(v) for v in x] if max(factors) < 1.05 * min(factors) else x


def knob_section(name: str, knob: dict, labels: dict[str, str]) -> Html:
    """Draws a knob: win rates, leads and wrong facts over its steps, and the table."""
    x = positions([step["value"] for step in knob["steps"]])
    ticks = dict(zip(x, (step["value"] for step in knob["steps"])))
    order = [METHOD, *(s for s in knob["steps"][0]["systems"] if s != METHOD)]

    def curves(found: dict[str, list[dict]], suffix: str = "") -> list[Curve]:
        """One curve per seed. found: {system: a cell per step}."""
        return [Curve(labels[system] + suffix, order.index(system) + 6 * bool(suffix), x,
                      [_percent(cell["per_seed"], seed) for cell in cells])
                for system, cells in found.items()
                for seed in range(max(len(cell["per_seed"]) for cell in cells))]
    rates = {system: [s["systems"][system]["win_rate"] for s in knob["steps"]] for system in order}
    leads = {system: [s["lead"][system]["sampled"] for s in knob["steps"]]
             for system in order if system in knob["steps"][0]["lead"]}
    figures = [("Win rate on test prompts, %", curves(rates), 50, "the SFT sample itself"),
               ("Lead over PPO-RLHF, points", curves(leads), 0, labels[BASELINE])]
    if "facts" in knob["steps"][0]:
        shares = lambda place: {system: [s["facts"][system][place] for s in knob["steps"]]
                                for system in ("sft", METHOD, "imitation")}
        for place in ("seen", "unseen"):
            figures.append((f"Wrong facts, {place} by the annotators, %", curves(shares(place)),
                            None, ""))
    drawn = [tag("figure", tag("figcaption", tag("b", title), f", over the {knob['axis']}"),
                 line_chart(lines, title, knob["axis"], level, label, True, ticks))
             for title, lines, level, label in figures if any(map(_has_points, lines))]
    columns = columns_of(knob, labels)
    header = ["figure", *(step["value"] for step in knob["steps"])]
    rows = [tag("tr", tag("th", title, scope="row"), [_cell(cell, form, step["value"])
                for cell, step in zip(found, knob["steps"])]) for title, form, found in columns]
    return section(knob["title"], drawn, table(
        f"All figures, over the {knob['axis']} (--only {name}). Brackets are 95% intervals over "
        f"seeds. The step {knob['default']} is the one that all knobs share.", header, [rows]))


def knob_sections(results: dict) -> Sequence[Html]:
    """Returns the sections of all knobs."""
    return [knob_section(name, knob, results["labels"])
            for name, knob in (results.get("knobs") or {}).items()]


def _percent(values: Sequence[float | None], seed: int) -> float | None:
    value = values[seed] if seed < len(values) else None
    return 100 * value if is_number(value) else None


def _has_points(curve: Curve) -> bool:
    return any(map(is_number, curve.y))


def _cell(cell: dict | None, form: Column, header: str) -> Html:
    mean, interval = map(typeset, cell_texts(cell, form))
    return tag("td", mean, tag("span", " ", interval, class_="interval") if interval else None,
               class_="number", data_label=header)
