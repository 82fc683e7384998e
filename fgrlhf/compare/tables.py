"""Compares groups of runs: their settings, their last figures, and paired differences over seeds.

`tables` makes the tables that the terminal and the page show, and `notes` the sentences that say
what limits the comparison.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from fgrlhf.compare.runs import Group, shared_metrics
from fgrlhf.evaluate import over_seeds
from fgrlhf.reproduce.table import Column, aligned, cell_texts, is_number

NOT_COMPARED = ("out", "resume")                # they differ in all runs and change no figure
# Keys of done.json that are metrics too, or say nothing about the model.
LEFT_OUT = ("steps", "records", "iterations", "prompts", "episodes", "folds", "best_iteration",
            "best_dev_win_rate", "seconds", "save_seconds", "check_seconds", "mean", "scale")
WIN_RATE = "eval/win_rate"
LONGEST_VALUE = 40                              # characters of a setting in a table

Figures = dict[str, list[list[float]]]          # row -> for each group the value of each run


class Table(NamedTuple):
    """A table of texts. A cell is (text, more), where more is an interval or ""."""

    title: str
    caption: str
    header: list[str]                           # of the columns behind the first
    rows: dict[str, list[tuple[str, str]]]      # name -> cells


def tables(groups: Sequence[Group]) -> list[Table]:
    """Returns the tables that have something to show."""
    figures = figures_of(groups)
    last = _figures("Last figures", "The last value of each metric that all runs have, and figures "
                    "of done.json that differ.", [group.name for group in groups], figures)
    found = [_runs(groups), _settings(groups), last, _differences(groups, figures)]
    return [table for table in found if table.rows and table.header]


def notes(groups: Sequence[Group]) -> list[str]:
    """Returns sentences about what limits the comparison."""
    runs = [run for group in groups for run in group.runs]
    found = []
    if any(len(group.runs) > 1 for group in groups):
        found.append("Figures of a group are means over seeds with their 95% interval by Student's "
                     "t, and differences are taken seed by seed. SEED is the seed of a run.")
    for group in groups:
        if names := [name for name in _setting_names([group]) if _over_seeds(group, name) is None]:
            found.append(f"The runs of {group.name} differ in more than their seed: "
                         f"{', '.join(names)}.")
    if unpaired := [group.name for group in groups[1:] if len(group.seeds) > 1
                    and group.seeds != groups[0].seeds]:
        found.append(f"No differences are shown for {', '.join(unpaired)}: expected the seeds of "
                     f"{groups[0].name} ({_numbers(groups[0].seeds)}).")
    if len({run.script for run in runs}) > 1:
        return [*found, "The runs are of different scripts, so they share few settings and "
                "metrics. Only settings and metrics that all runs have are listed."]
    if len(steps := sorted({run.steps for run in runs})) > 1:
        found.append(f"The last steps of the runs differ ({', '.join(map(str, steps))}), so their "
                     "last values are not of the same step.")
    shared = shared_metrics(groups)
    if "rollout/reward" in shared and len({_over_seeds(group, "reward") for group in groups}) > 1:
        found.append("The runs have different rewards (--reward), so their rollout/reward and "
                     "ppo/loss cannot be compared.")
    if other := [name for name in dict.fromkeys(n for r in runs for n in r.metrics)
                 if name not in shared]:
        found.append(f"Metrics that only some runs have: {', '.join(other)}.")
    return found


def as_text(table: Table, width: int) -> str:
    """Writes the table as aligned text of at most `width` columns, in parts if it is wider."""
    first = max(len(table.title), *map(len, table.rows))
    columns, parts, used = [], [], math.inf
    for n, header in enumerate(table.header):
        cells = [cells[n] for cells in table.rows.values()]
        left, right = (max(len(cell[side]) for cell in cells) for side in (0, 1))
        columns.append([header, *(f"{text:>{left}} {more:<{right}}" if right else text
                                  for text, more in cells)])
        size = 2 + max(map(len, columns[-1]))
        if used + size > width:
            parts.append([])
            used = first
        parts[-1].append(columns[-1])
        used += size
    return "\n\n".join(aligned([table.title, *table.rows], part, width) for part in parts)


# ----- runs and settings --------------------------------------------------------------------------

def _runs(groups: Sequence[Group]) -> Table:
    rows = {}
    for group in groups:
        folders = [run.folder for run in group.runs]
        cells = (", ".join(sorted({run.script for run in group.runs})), _numbers(group.seeds),
                 _numbers(sorted({run.steps for run in group.runs})),
                 f"{sum(run.done is not None for run in group.runs)} of {len(group.runs)}",
                 _merged(folders, group.seeds) or f"{folders[0]}, ...")
        rows[group.name] = [(_shortened(text), "") for text in cells]
    return Table("Runs", "The folders that are compared.",
                 ["script", "seed", "last step", "finished", "folder"], rows)


def _settings(groups: Sequence[Group]) -> Table:
    """Lists the settings that differ between groups, or in more than the seed inside a group."""
    rows = {}
    for name in _setting_names(groups):
        values = [_over_seeds(group, name) for group in groups]
        if None in values or len(set(values)) > 1:
            values = [value if value is not None else " | ".join(dict.fromkeys(
                _shown(run.config, name) for run in group.runs))
                for group, value in zip(groups, values)]
            rows[name] = [(_shortened(value), "") for value in _without_common_beginning(values)]
    return Table("Settings that differ",
                 "Settings of config.json that are equal are left out, and paths are shown without "
                 "their common beginning. A - means that the run does not have the setting.",
                 [group.name for group in groups], rows)


def _setting_names(groups: Sequence[Group]) -> list[str]:
    """Returns the settings of all runs; of runs of different scripts, those that all have."""
    runs = [run for group in groups for run in group.runs]
    names = dict.fromkeys(name for run in runs for name in run.config)
    one_script = len({run.script for run in runs}) == 1
    return [name for name in names if name not in NOT_COMPARED
            and (one_script or all(name in run.config for run in runs))]


def _over_seeds(group: Group, name: str) -> str | None:
    """Returns the value of a setting as text, and None when it differs in more than the seed.

    Only a path or --world has the seed in it. Any other number that equals the seed is chance.
    """
    if name == "seed":
        return _numbers(group.seeds)
    values = [_shown(run.config, name) for run in group.runs]
    if name == "world" or all(isinstance(run.config.get(name), str) for run in group.runs):
        return _merged(values, group.seeds)
    return values[0] if len(set(values)) == 1 else None


def _merged(values: Sequence[str], seeds: Sequence[int]) -> str | None:
    """Returns the one text that `values` have in common, or None if they differ.

    The texts are compared folder by folder ("a/b/c"). Where folders differ, the seed of each run,
    as a number of its own, is first replaced by SEED: runs/seed400/rm and runs/seed401/rm become
    runs/seedSEED/rm.
    """
    split = [value.split("/") for value in values]
    if len(set(map(len, split))) > 1:
        return None
    merged = []
    for parts in zip(*split):
        if len(set(parts)) > 1:
            parts = [re.sub(rf"(?<!\d){seed}(?!\d)", "SEED", part)
                     for part, seed in zip(parts, seeds)]
        if len(set(parts)) > 1:
            return None
        merged.append(parts[0])
    return "/".join(merged)


def _shown(config: dict, name: str) -> str:
    value = config.get(name, "-")
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def _without_common_beginning(values: list[str]) -> list[str]:
    """Takes the folders that all paths begin with away. Other texts stay as they are."""
    if len(set(values)) < 2 or not all("/" in value for value in values):
        return values
    split = [value.split("/") for value in values]
    common = min(len(os.path.commonprefix(split)), min(map(len, split)) - 1)
    return ["/".join(parts[common:]) for parts in split]


def _shortened(text: str) -> str:
    """Cuts a long text on the left, because the end of a path says more than its beginning."""
    return text if len(text) <= LONGEST_VALUE else "..." + text[3 - LONGEST_VALUE:]


def _numbers(values: Sequence[int]) -> str:
    """Writes whole numbers, sorted, as "3", "0 to 7" or "0, 2, 5"."""
    values = list(values)
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values))


# ----- figures ------------------------------------------------------------------------------------

def figures_of(groups: Sequence[Group]) -> Figures:
    """Returns the last value of each metric that all runs have, in every run.

    After the metrics come the figures of done.json that all runs have and that differ. The best
    dev win rate has a row of its own.
    """
    each = lambda of: [[of(run) for run in group.runs] for group in groups]
    runs = [run for group in groups for run in group.runs]
    rows: Figures = {}
    for name in shared_metrics(groups):
        rows[name] = each(lambda run: run.metrics[name][max(run.metrics[name])])
        if name == WIN_RATE:
            rows["best " + name] = each(lambda run: max(run.metrics[name].values()))
    for name in runs[0].done or ():
        values = [(run.done or {}).get(name) for run in runs]
        if name not in LEFT_OUT and all(map(is_number, values)) and len(set(values)) > 1:
            rows[name] = each(lambda run: run.done[name])
    return rows


def _figures(title: str, caption: str, names: list[str], figures: Figures, sign: str = "") -> Table:
    rows = {name: [cell_texts(cell(values), Column("", "", 1, _digits(groups), sign=sign))
                   for values in groups] for name, groups in figures.items()}
    return Table(title, caption, names, rows)


def _differences(groups: Sequence[Group], figures: Figures) -> Table:
    """Returns the paired differences of each group with the first group's seeds."""
    first = groups[0]
    paired = [n for n, group in enumerate(groups)
              if n and len(group.seeds) > 1 and group.seeds == first.seeds]
    minus = {name: [[b - a for a, b in zip(values[0], values[n])] for n in paired]
             for name, values in figures.items()}
    return _figures(f"Difference from {first.name}", "Each run minus the run of the same seed.",
                    [groups[n].name for n in paired], minus, "+")


def cell(values: Sequence[float]) -> dict:
    """Makes a cell of fgrlhf/reproduce/table.py: the mean, and its 95% interval over seeds.

    Without a second value there is no interval, and none is shown of values that are all equal.
    """
    mean, low, high = over_seeds(values)
    return {"mean": mean, "interval": [low, high] if low < high else None,
            "per_seed": list(values)}


def _digits(groups: Sequence[Sequence[float]]) -> int:
    """Returns the decimals of a row: four digits of its largest value, none if cells are whole."""
    largest = max(abs(value) for group in groups for value in group)
    if all(len(set(group)) == 1 and group[0] == int(group[0]) for group in groups):
        return 0
    return min(8, max(0, 3 - math.floor(math.log10(largest))))
