"""Shows results as text: the form of each figure, and the table that `make reproduce` prints.

A cell is {"mean", "interval": [low, high] or None, "per_seed": [...]}. Rates are shares in [0, 1]
and are shown in percent. A value that is missing or not finite is shown as "-".
"""

import math
import textwrap
from numbers import Real
from typing import NamedTuple, Sequence


class Column(NamedTuple):
    """The form of a metric: multiplied by `scale`, with `digits` decimals, perhaps an interval."""

    metric: str
    header: str
    scale: float
    digits: int
    with_interval: bool = True
    sign: str = ""                      # "+" for differences


WIN_RATES = (Column("win_rate", "win rate %", 100, 1),
             Column("win_rate_greedy", "greedy %", 100, 1))
ERRORS = (Column("perfect", "perfect %", 100, 1, False), Column("errors", "errors", 1, 2, False))
GREEDY_ERRORS = (Column("errors_greedy", "errors, greedy", 1, 2, False),)
BEST = (Column("best_iteration", "best it.", 1, 0, False),)
TRAINING = (Column("best_dev_win_rate", "best dev win rate %", 100, 1, False), *BEST,
            Column("episodes", "episodes", 1, 0, False), Column("seconds", "seconds", 1, 0, False))
DECODING = (Column("win_rate", "1", 100, 1, False), Column("win_rate_0.7", "0.7", 100, 1, False),
            Column("win_rate_0.5", "0.5", 100, 1, False),
            Column("win_rate_0.3", "0.3", 100, 1, False),
            Column("win_rate_greedy", "greedy", 100, 1, False),
            Column("win_rate_mean", "mean", 100, 1))
SUMMARIES = (Column("made_up", "made up", 1, 2),
             Column("made_up_rate", "per name %", 100, 0, False),
             Column("named", "names", 1, 2, False), Column("made_up_any", "any %", 100, 0, False),
             Column("words", "words", 1, 1, False), Column("copied", "copied %", 100, 0, False),
             Column("cut_off", "cut %", 100, 0, False),
             Column("empty", "empty %", 100, 0, False))
GREEDY_SUMMARIES = tuple(c._replace(metric=f"{c.metric}_greedy") for c in SUMMARIES)
REWARD_MODELS = (Column("edit_accuracy", "edit pairs %", 100, 1),
                 Column("pair_accuracy", "pairs %", 100, 1),
                 Column("equal_length", "equal length %", 100, 1),
                 Column("shorter", "shorter wins %", 100, 1, False),
                 Column("token_auc", "token AUC", 1, 3, False),
                 Column("token_auc_within", "AUC within", 1, 3, False))
PLACES = (Column("r_errors", "r errors", 1, 2, False), Column("r_behind", "behind", 1, 2, False),
          Column("r_elsewhere", "elsewhere", 1, 2, False),
          Column("u0_drift", "U0 drift", 1, 2, False))
ADVANTAGES = (Column("correlation", "correlation", 1, 2), Column("sign", "sign %", 100, 0, False),
              Column("correlation/error", "on errors", 1, 2, False),
              Column("correlation/behind", "behind", 1, 2, False),
              Column("correlation/elsewhere", "elsewhere", 1, 2, False))
WORDINGS = (Column("editors_wording", "editor's wording %", 100, 1),)
RATIO = Column("", "ratio", 1, 1)
DIFFERENCE = Column("", "points", 100, 1, sign="+")


def is_number(value) -> bool:
    """Returns True for a finite number, and False for None, NaN, an infinity or a text."""
    return isinstance(value, Real) and math.isfinite(value)


def number(value, scale: float = 1, digits: int | None = None, sign: str = "") -> str:
    """Returns the value as text, and "-" for None, NaN and infinities. A text stays as it is.

    digits None: no decimal for whole numbers and for numbers from 100 on, otherwise one decimal.
    """
    if isinstance(value, str):
        return value
    if not is_number(value):
        return "-"
    value *= scale
    if digits is None:
        digits = 0 if abs(value) >= 100 or value == int(value) else 1
    return f"{round(value, digits) + 0.0:{sign},.{digits}f}"          # + 0.0: never "-0.0"


def ratio(value) -> str:
    """Returns a factor, given as a number or as a cell, as text with its interval if any."""
    mean, interval = cell_texts(value if isinstance(value, dict) else {"mean": value}, RATIO)
    return f"{mean}x {interval}".rstrip() if mean[0].isdigit() else mean


def interval_of(cell: dict) -> list[float]:
    """Returns the interval of the cell, and [] if it has none (a single seed)."""
    interval = cell.get("interval") or []
    return list(interval) if all(map(is_number, interval)) else []


def cell_texts(cell: dict | None, column: Column) -> tuple[str, str]:
    """Returns (mean, interval) as text. The interval is "" if there is none to show."""
    cell = cell or {}
    mean, *interval = (number(value, column.scale, column.digits, column.sign) for value in
                       (cell.get("mean"), *(interval_of(cell) if column.with_interval else ())))
    return mean, f"[{', '.join(interval)}]" if interval else ""


def present(rows: dict[str, dict], columns: Sequence[Column]) -> list[Column]:
    """Returns the columns in which at least one row has a value."""
    return [c for c in columns
            if any(cell_texts(row["metrics"].get(c.metric), c)[0] != "-" for row in rows.values())]


def measured(rows: dict[str, dict], columns: Sequence[Column]) -> dict[str, dict]:
    """Returns the rows that have a value in at least one of the columns."""
    return {name: row for name, row in rows.items() if present({name: row}, columns)}


def text_table(results: dict, width: int = 108) -> str:
    """Writes systems, reward models, differences, speed and the paper's figures as aligned text.

    Below the systems are the sentences of results["reading"].

    results: see report.py. A missing part is left out. No line is longer than `width`.
    """
    systems, models = results.get("systems") or {}, results.get("reward_models") or {}
    columns = (*WIN_RATES, *ERRORS, *BEST) if present(systems, WIN_RATES) else TRAINING
    parts = [_metrics("system", systems, columns, width),
             "\n".join(line for sentence in results.get("reading") or []
                       for line in textwrap.wrap(sentence, width, break_on_hyphens=False)),
             _metrics("summaries, sampled", systems, SUMMARIES, width),
             _metrics("summaries, greedy", systems, GREEDY_SUMMARIES, width),
             _metrics("win rate % by temperature",
                      measured(systems, DECODING[-1:]), DECODING, width),
             _by_annotations(results.get("by_annotations") or [], width),
             _metrics("reward model", models, REWARD_MODELS, width),
             _metrics("token rewards", models, PLACES, width),
             _metrics("wording of answers", results.get("wordings") or {}, WORDINGS, width),
             _metrics("estimates of the advantage", results.get("advantages") or {}, ADVANTAGES,
                      width)]
    comparisons = results.get("comparisons") or []
    parts.append(aligned(["difference of win rates", *(c["label"] for c in comparisons)],
                         [_cells(DIFFERENCE, comparisons)], width))
    for speed in results.get("speed") or []:
        rows, names = speed["rows"], speed.get("names") or ("baseline", "method")
        parts.append(aligned(["speed", *(row["label"] for row in rows)],
                             [[names[0], *(number(row.get("baseline")) for row in rows)],
                              [names[1], *(number(row.get("method")) for row in rows)],
                              ["ratio", *(ratio(row.get("ratio")) for row in rows)]], width))
    parts.append("\n".join(line for sentence in results.get("signs") or []
                           for line in textwrap.wrap(f"Sign of trouble: {sentence}", width,
                                                     break_on_hyphens=False)))
    paper = results.get("paper") or []
    parts.append(aligned(["the paper", *(row["label"] for row in paper)],
                         [["value", *(row["value"] for row in paper)]], width))
    return "\n\n".join(part for part in parts if part)


def _metrics(title: str, rows: dict[str, dict], columns: Sequence[Column], width: int) -> str:
    rows = measured(rows, columns)
    cells = [_cells(c, [row["metrics"].get(c.metric) for row in rows.values()])
             for c in present(rows, columns)]
    if not cells:
        return ""
    return aligned([title, *(row["label"] for row in rows.values())], cells, width)


def _by_annotations(rows: list[dict], width: int) -> str:
    names = list(rows[0]["systems"]) if rows else []
    columns = [[name, *("{} {}".format(*cell_texts(row["systems"][name], WIN_RATES[0])).rstrip()
                        for row in rows)] for name in names]
    return aligned(["annotations", *(number(row["annotations"]) for row in rows)], columns, width)


def _cells(column: Column, cells: Sequence[dict | None]) -> list[str]:
    """Returns the header, then "mean [low, high]" with the means aligned."""
    texts = [cell_texts(cell, column) for cell in cells]
    left, right = (max((len(text[side]) for text in texts), default=0) for side in (0, 1))
    return [column.header, *(f"{mean:>{left}} {interval:<{right}}" if right else mean
                             for mean, interval in texts)]


def aligned(labels: list[str], columns: list[list[str]], width: int) -> str:
    """Sets labels on the left, cut to the free width, and columns on the right, two blanks apart.

    The first entry of each is its header, with a line below. Returns "" if there are only headers.
    """
    if len(labels) < 2:
        return ""
    widths = [max(map(len, column)) for column in columns]
    room = max(8, width - sum(w + 2 for w in widths))
    first = min(room, max(map(len, labels)))
    labels = [label if len(label) <= first else label[:first - 3] + "..." for label in labels]
    lines = [label.ljust(first) + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths))
             for label, *cells in zip(labels, *columns, strict=True)]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])
