"""Writes the results as one HTML page that needs no other file.

`results` has the contents of results.json, and the texts to show:

    profile command seeds commit machine seconds   of the run
    reading notes commands                         lists of sentences and commands
    systems        {key: {label, role, metrics: {name: cell}}}      role: method, baseline, ...
    reward_models  {key: {label, metrics: {name: cell}}}
    comparisons    [{label, mean, interval, per_seed}]              differences of win rates
    speed          [{label, names, rows: [{label, baseline, method, ratio}]}]
                   names: of baseline and method; ratio: a cell or a number
    paper          [{label, value}]                                 the figures of the paper
    signs                                           sentences of checks/signs.py
    knobs labels                                                    see study_results.py
    tables         [{caption, header, rows}]                        rows of texts, name first
    curves         [{system, label, seed, metric, x_episodes, x_seconds, x_kl, x_confidence, y}]
    examples       {heat_maps: [{prompt, label, tokens, rewards, errors}],
                    underlined: what the errors of the heat maps are,
                    edits: [{prompt, original_tokens, original_changed,
                             edited_tokens, edited_changed}],
                    explained: [explained.Explained],
                    before_after: [{caption, labels: [before, after], rows: [
                        {prompt, before, before_errors, after, after_errors}]}]}
                   before_reward and after_reward may take the place of the errors

table.py describes a cell. If a part is missing, the page has no section for it. The page needs no
network, no script and no colour: signs, numbers, dashes and underlines carry the same information.
"""

import re
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Sequence

from fgrlhf.data.files import write_atomic
from fgrlhf.explain.page import explained_page
from fgrlhf.reproduce import excerpts
from fgrlhf.reproduce.chart import Curve, line_chart, strip, strip_axis, ticks
from fgrlhf.reproduce.markup import Html, document, number_cell, section, table, tag, typeset
from fgrlhf.reproduce.study_report import knob_sections, study_text
from fgrlhf.reproduce.table import (
    ADVANTAGES, DECODING, DIFFERENCE, ERRORS, GREEDY_ERRORS, GREEDY_SUMMARIES, PLACES,
    REWARD_MODELS, SUMMARIES, TRAINING, WIN_RATES, WORDINGS, Column, cell_texts, interval_of,
    is_number, measured, number, present, ratio, text_table)

CURVES = {"win_rate": ("Win rate on dev prompts, %", 100),
          "reward": ("Reward per response, each system on its own scale", 1),
          "kl_k1": ("KL from the SFT policy, nats per response", 1),
          "length": ("Tokens per response", 1),
          "made_up": ("Made-up names and numbers per sampled summary", 1),
          "made_up_rate": ("Made-up share of the names and numbers, %", 100),
          "judge": ("Reward by the judge, which trained no policy", 1),
          "reliability": ("How often one side of a pair is the human edit, %", 100)}
AXES = {"episodes": "episodes", "seconds": "seconds",
        "kl": "KL from the SFT policy, nats per response",
        "confidence": "the reward model's probability for that, %"}


def write_report(path: str | Path, results: dict) -> None:
    """Writes the page completely or not at all. Raises UserError if the file cannot be written."""
    write_atomic(path, page(results).encode("utf-8", "replace"))


def page(results: dict) -> str:
    """Returns the whole HTML document."""
    get, examples = results.get, results.get("examples") or {}
    systems = get("systems") or {}
    is_method = lambda curve: systems.get(curve["system"], {}).get("role") == "method"
    curves = sorted(get("curves") or [], key=is_method, reverse=True)  # the method gets style s0
    maps = examples.get("heat_maps")
    underlined = {"underlined": examples["underlined"]} if "underlined" in examples else {}
    parts = [(_systems, systems), (_summaries, systems), (_temperatures, systems),
             (_by_annotations, get("by_annotations")), (_comparisons, get("comparisons")),
             (_reward_models, get("reward_models")), (_tables, get("tables")),
             (_advantages, get("advantages")), (_wordings, get("wordings")),
             (_speed, get("speed")), (_paper, get("paper")), (_training, systems),
             (_signs, get("signs")), (_curves, curves),
             (partial(excerpts.heat_maps, **underlined), maps),
             (excerpts.edits, examples.get("edits")), (explained_page, examples.get("explained")),
             (excerpts.before_after, examples.get("before_after")), (_again, results)]
    sections = [shown for show, part in parts if part and (shown := show(part))]
    sections[:0] = knob_sections(results)
    title = f"Token-level RLHF from minimal edits, {get('profile') or 'a'} run"
    return document(title, [_header(results), _contents(sections), *sections])


def _header(results: dict) -> Html:
    seeds, seconds = results.get("seeds") or [], results.get("seconds")
    facts = [f"{results['profile']} profile" if results.get("profile") else None,
             f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else None,
             f"commit {results['commit'][:7]}" if results.get("commit") else None,
             results.get("machine"), _duration(seconds) if is_number(seconds) else None]
    parts = [tag("h1", "Token-level RLHF from minimal edits"),
             tag("p", " \N{MIDDLE DOT} ".join(filter(None, facts)), class_="muted")]
    if command := results.get("command"):
        parts.append(tag("p", tag("code", command)))
    for first in (results.get("comparisons") or [])[:1]:
        mean, interval = map(typeset, cell_texts(first, DIFFERENCE))
        parts.append(tag("p", tag("b", mean, " points"), " ", interval, " ", first["label"],
                         class_="headline"))
    parts += [tag("p", re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", sentence))
              for sentence in results.get("reading") or []]
    if notes := results.get("notes"):
        parts.append(tag("ul", [tag("li", note) for note in notes], class_="notes"))
    return tag("header", parts)


def _contents(sections: Sequence[Html]) -> Html:
    titles = [re.match(r'<section id="(.+?)"><h2>(.+?)</h2>', one).groups() for one in sections]
    links = [tag("li", tag("a", Html(title), href=f"#{name}")) for name, title in titles]
    return tag("nav", tag("ul", links), aria_label="contents")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# ----- tables -----------------------------------------------------------------------------------

def _systems(systems: dict[str, dict]) -> Html | None:
    columns = present(systems, (*WIN_RATES, *ERRORS, *GREEDY_ERRORS))
    if not columns:
        return None
    systems = measured(systems, columns)
    head, strips = _strips([s["metrics"].get("win_rate") or {} for s in systems.values()], 50)
    rows = [tag("tr", _name(s), drawn, _numbers(s, columns), class_=s.get("role"))
            for s, drawn in zip(systems.values(), strips)]
    about = ("The reference is one fixed sample of the SFT policy, and the oracle counts errors. "
             "PPO runs are tested with the checkpoint that is best on dev prompts; SFT and "
             "imitation with the last one."
             if present(systems, ERRORS) else
             "The reference is SFT with the same decoding, and the judge is a reward model that "
             "was trained on other edits. All policies are those of the last step.")
    return section("Systems", table(
        "Win rates on test prompts against the SFT policy (50: no better), with sampled and with "
        f"greedy answers. {about} Brackets and lines are 95% intervals, discs are means, ticks are "
        "seeds.",
        ["system", head, *(c.header for c in columns)], _by_role(systems, rows)))


def _summaries(systems: dict[str, dict]) -> Html | None:
    tables = []
    for decoding, columns in (("Sampled", SUMMARIES), ("Greedy", GREEDY_SUMMARIES)):
        if shown := present(systems, columns):
            some = measured(systems, columns)
            rows = [tag("tr", _name(s), _numbers(s, shown), class_=s.get("role"))
                    for s in some.values()]
            tables.append(table(
                f"{decoding} summaries: names and numbers that the article does not have, per "
                "summary and per name or number; names and numbers in all; summaries with any "
                "that is made up; words; pairs of neighbouring words that the article has too; "
                "summaries as long as the limit, most of which are cut off; empty summaries.",
                ["system", *(c.header for c in shown)], _by_role(some, rows)))
    return section("Made-up facts", tables) if tables else None


def _temperatures(systems: dict[str, dict]) -> Html | None:
    some = measured(systems, DECODING[-1:])
    if not some:
        return None
    rows = [tag("tr", _name(s), _numbers(s, DECODING), class_=s.get("role"))
            for s in some.values()]
    return section("Decoding temperatures", table(
        "Win rates in % of answers sampled at other temperatures, and their mean with its 95% "
        "interval. A sharper policy gains less from a low temperature.",
        ["system", *(c.header for c in DECODING)], _by_role(some, rows)))


def _by_annotations(rows: Sequence[dict]) -> Html:
    labels = list(rows[0]["systems"])
    curves = [Curve(label, style, [row["annotations"] for row in rows],
                    [100 * row["systems"][label]["mean"] for row in rows])
              for style, label in enumerate(labels)]
    return section("Number of annotations", tag("figure", line_chart(
        curves, "Win rate, %", "annotations", 50, "the SFT sample itself")), table(
        "Win rates in %, sampled, of systems that were trained on the first N annotations, with "
        "95% intervals. A pair and an edit each count as one annotation.",
        ["annotations", *labels], [[
            tag("tr", tag("th", number(row["annotations"]), scope="row"),
                [number_cell(cell, WIN_RATES[0]) for cell in row["systems"].values()])
            for row in rows]]))


def _training(systems: dict[str, dict]) -> Html | None:
    columns = present(systems, TRAINING)
    if not columns:
        return None
    rows = [tag("tr", _name(s), _numbers(s, columns), class_=s.get("role"))
            for s in systems.values()]
    return section("Training", table(
        "The cost of each system, as means over seeds. Episodes are sampled responses. Seconds "
        "count training only, without evaluation.",
        ["system", *(c.header for c in columns)], _by_role(systems, rows)))


def _comparisons(comparisons: Sequence[dict]) -> Html:
    head, strips = _strips(comparisons, 0)
    rows = [tag("tr", tag("th", c["label"], scope="row"), drawn, number_cell(c, DIFFERENCE))
            for c, drawn in zip(comparisons, strips)]
    return section("Differences", table(
        "Differences of win rates in percentage points, with 95% intervals.",
        ["difference", head, DIFFERENCE.header], [rows]))


def _reward_models(models: dict[str, dict]) -> Html:
    columns = present(models, (*REWARD_MODELS, *PLACES))
    rows = [tag("tr", _name(model), _numbers(model, columns)) for model in models.values()]
    about = ("AUC: how well low token rewards find the oracle's error spans, over all tokens and "
             "within a response (chance: .5). The last columns are mean token rewards on errors, "
             "behind the first error and elsewhere, and the root mean square of r+ - r- over "
             "unchanged tokens, all in standard deviations of the rewards."
             if present(models, PLACES) else
             "Equal length: edits that differ from their original by at most one token. Shorter "
             "wins: how often the edit is the shorter side. AUC: how well low token rewards find "
             "the tokens that the editor took out, over all tokens and within a response.")
    return section("Reward models", table(
        "How often the better side of a held-out preference gets the higher reward, on edits and, "
        f"where there are any, on ordinary pairs (chance: 50). {about}",
        ["reward model", *(c.header for c in columns)], [rows]))


def _tables(tables: Sequence[dict]) -> Html:
    return section("Error analysis", [table(one["caption"], one["header"], [[
        tag("tr", tag("th", name, scope="row"),
            [tag("td", typeset(value), class_="number", data_label=header)
             for header, value in zip(one["header"][1:], values)])
        for name, *values in one["rows"]]]) for one in tables])


def _advantages(estimates: dict[str, dict]) -> Html:
    rows = [tag("tr", _name(one), _numbers(one, ADVANTAGES)) for one in estimates.values()]
    return section("Estimates of the advantage", table(
        "Token rewards, and GAE with a critic trained on the SFT policy, against the advantage "
        "of each token that the oracle measured from sampled completions: correlation over all "
        "tokens, agreement in sign where the advantage is at least half an error, and correlation "
        "by place.",
        ["estimate", *(c.header for c in ADVANTAGES)], [rows]))


def _wordings(rows: dict[str, dict]) -> Html:
    return section("Wording", table(
        "Every sentence has two wordings, and neither is an error. Share of sentences in sampled "
        "test answers that have the wording of the editor with a style.",
        ["system", *(c.header for c in WORDINGS)],
        [[tag("tr", _name(one), _numbers(one, WORDINGS)) for one in rows.values()]]))


def _speed(compared: Sequence[dict]) -> Html:
    tables = []
    for speed in compared:
        header = ["measure", *(speed.get("names") or ("baseline", "method")), "ratio"]
        rows = [tag("tr", tag("th", row["label"], scope="row"),
                    [tag("td", typeset(text), class_="number", data_label=name) for name, text in
                     zip(header[1:], (number(row.get("baseline")), number(row.get("method")),
                                      ratio(row.get("ratio"))))])
                for row in speed["rows"]]
        tables.append(table(speed.get("label"), header, [rows]))
    return section("Speed", tables)


def _paper(paper: Sequence[dict]) -> Html:
    rows = [tag("tr", tag("th", row["label"], scope="row"), tag("td", row["value"]))
            for row in paper]
    return section("What the paper reports", table(
        "Xu et al., ACL 2024. Their data and the size of their model differ, so these figures are "
        "context and not a target.",
        ["figure", "value"], [rows], text=True))


def _name(row: dict) -> Html:
    role = row.get("role")
    return tag("th", row["label"], tag("span", role, class_="role") if role else None, scope="row")


def _numbers(row: dict, columns: Sequence[Column]) -> list[Html]:
    return [number_cell(row["metrics"].get(column.metric), column) for column in columns]


def _by_role(systems: dict[str, dict], rows: Sequence[Html]) -> list[list[Html]]:
    """Groups the rows: neighbours with the same role are together."""
    pairs = groupby(zip(systems.values(), rows), key=lambda pair: pair[0].get("role"))
    return [[row for _, row in group] for _, group in pairs]


def _strips(cells: Sequence[dict], reference: float) -> tuple[Html, list[Html]]:
    """Draws a column of intervals on one scale, in percent. Returns its head and its cells."""
    percent = lambda values: [100 * value for value in values or () if is_number(value)]
    rows = [(percent([c.get("mean")]), percent(interval_of(c)), percent(c.get("per_seed")))
            for c in cells]
    scale = ticks([reference, *(value for row in rows for part in row for value in part)])
    head = tag("th", tag("span", "drawn", class_="hidden"), strip_axis(scale, reference),
               scope="col")
    return head, [tag("td", strip(mean[0] if mean else None, interval, seeds, scale, reference),
                      class_="drawn")
                  for mean, interval, seeds in rows]


# ----- the rest ---------------------------------------------------------------------------------

def _curves(curves: Sequence[dict]) -> Html:
    """Draws each metric over the axes that its curves have; over seconds only the win rate."""
    style = {key: n % 8 for n, key in enumerate(dict.fromkeys(c["system"] for c in curves))}
    figures = []
    for metric in dict.fromkeys(c["metric"] for c in curves):
        name, factor = CURVES.get(metric, (metric, 1))
        reference = (50, "the SFT sample itself") if metric == "win_rate" else ()
        for axis, unit in AXES.items():
            drawn = [Curve(c["label"], style[c["system"]], c[f"x_{axis}"],
                           [factor * y if is_number(y) else None for y in c["y"]])
                     for c in curves if c["metric"] == metric and c.get(f"x_{axis}")
                     and (axis != "seconds" or metric == "win_rate")]
            if drawn:
                figures.append(tag("figure", tag("figcaption", tag("b", name), f", over {unit}"),
                                   line_chart(drawn, name, unit, *reference)))
    return section("Learning curves", tag(
        "p", "Each system has one line. With several seeds, each thin line is a seed, and the "
        "thick line is their mean up to the end of the shortest.", class_="muted"), figures)


def _signs(sentences: Sequence[str]) -> Html:
    """Names the runs with signs of trouble (checks/signs.py). A healthy run has none."""
    return section("Signs of trouble", tag("ul", [tag("li", one) for one in sentences]))


def _again(results: dict) -> Html | None:
    """Shows the commands and the figures as plain text, to be copied."""
    commands, text = results.get("commands") or [], study_text(results) or text_table(results)
    parts = [(f"The {len(commands)} commands of this run", "\n".join(commands)),
             ("The figures as plain text", text)]
    folded = [tag("details", tag("summary", summary), tag("pre", body))
              for summary, body in parts if body]
    return section("Commands and figures to copy", folded) if folded else None
