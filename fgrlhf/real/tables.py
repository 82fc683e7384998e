"""The tables and curves of the report that say what the reward models of the profile real see.

They are from the files of analysis.py and probes.py, for the first seed of the profile.
"""

import math
from pathlib import Path

from fgrlhf.data.files import read_object
from fgrlhf.real.stages import TOKEN_LEVEL
from fgrlhf.reproduce.results import cell
from fgrlhf.reproduce.table import number

REWARDS = {"rm-paper": "Token-level, paper's loss", "rm-ours": "Token-level, our loss",
           "rm-sequence": "Sequence-level on edits", "rm-judge": "The judge, on other edits"}
# The names of probes.py, what they are, and the factor and digits to show.
PROBES = {"pairs_mean": ("pairs %, by the mean of r", 100, 1),
          "pairs_sum": ("pairs %, by the sum", 100, 1),
          "equal_mean": ("equal length %, by the mean", 100, 1),
          "equal_sum": ("equal length %, by the sum", 100, 1),
          "without_ends": ("pairs %, without full stops and EOS", 100, 1),
          "equal_without_ends": ("the same, equal length %", 100, 1),
          "auc_within": ("AUC within a summary", 1, 3), "auc": ("AUC pooled", 1, 3),
          "detects_lowest": ("AUC of a summary with an error, by its lowest r", 1, 3),
          "detects_mean": ("the same, by its mean r", 1, 3),
          "calibration_error": ("calibration error, points", 100, 1)}


def _label(loss: str) -> str:
    return REWARDS[f"rm-{loss}"]


def _over_seeds(values: list[float | None], scale: float, digits: int) -> str:
    """Writes the mean over seeds, and Student's interval of it."""
    found = cell([math.nan if value is None else scale * value for value in values])
    low_high = ", ".join(number(x, digits=digits) for x in found["interval"] or ())
    return number(found["mean"], digits=digits) + f" [{low_high}]" * bool(low_high)


def probe_tables(folder: Path) -> list[dict]:
    """Returns the figures of the probes of several seeds, and how far their P can be trusted."""
    found = read_object(folder / "probes.json")
    seeds = len(next(iter(found.values()))["auc_within"])
    rows = [[name, *(_over_seeds(one[key], scale, digits) for one in found.values())]
            for key, (name, scale, digits) in PROBES.items()]
    bins = [[_label(loss), str(row["pairs"]), number(100 * row["P"], digits=1),
             number(100 * row["right"], digits=1)]
            for loss, one in found.items() for row in one["reliability"]]
    return [
        {"header": ["held-out edits of val", *map(_label, found)], "rows": rows,
         "caption": f"Probes of {seeds} seeds: the mean, and Student's interval over seeds. It "
                    "does not hold what other articles would change."},
        {"header": ["reward", "pairs", "P %", "right %"], "rows": bins,
         "caption": "Calibration: P is the model's probability for the side that it prefers, the "
                    "sigmoid of the difference of R. Right: how often that side is the edit. Each "
                    "pair counts once per seed."}]


def reliability_curves(folder: Path) -> list[dict]:
    """Returns the curve of each loss, and that of a calibrated model.

    Each pair counts in both orders, so that the probability goes from 0 to 1.
    """
    found = read_object(folder / "probes.json")
    curve = lambda system, label, points: {
        "system": system, "label": label, "seed": 0, "metric": "reliability",
        "x_confidence": [100 * x for x, _ in points], "y": [y for _, y in points]}
    both = lambda rows: [(1 - x, 1 - y) for x, y in rows[::-1]] + rows
    return [curve("calibrated", "Calibrated", [(0, 0), (1, 1)])] + [
        curve(f"rm-{loss}", _label(loss), both([(row["P"], row["right"])
                                                for row in one["reliability"]]))
        for loss, one in found.items()]


def analysis_tables(folder: Path) -> list[dict]:
    """Returns the tables of analysis.py, of the first seed."""
    found = read_object(folder / "analysis.json")
    shown = lambda value, digits=2: number(value, digits=digits)
    models = {name: next(v for k, v in found.items() if k.endswith(f"{name}/reward"))
              for name in TOKEN_LEVEL}
    detects = [[f"{REWARDS[name]}, {how}", shown(value)] for name, one in models.items()
               for how, value in one["detects"].items()]
    detects += [[how, shown(value)] for how, value in found["detects"].items()]
    kinds = [[f"{REWARDS[name]}, {kind} errors", str(group["summaries"]),
              shown(group["auc_within"])] for name, one in models.items()
             for kind, group in one["errors"].items()]
    eos = [[f"{REWARDS[name]}, behind {side}", *map(shown, values)]
           for name, one in models.items() for side, values in one["eos"].items()]
    worst = [[f"{side}: {token[0]}", shown(token[3], 1)]
             for side, some in models[TOKEN_LEVEL[-1]]["worst"].items() for token in some]
    types = [[kind, str(row["tokens"]), str(row["removed"]), shown(row["r_removed"]),
              shown(row["r_kept"]), shown(row["auc"])]
             for kind, row in models[TOKEN_LEVEL[-1]]["words"].items()]
    return [
        {"header": ["score", "AUC"], "rows": detects,
         "caption": "All candidates of val: how well a score tells those where the annotator found "
                    "an error from the others (chance: .5)."},
        {"header": ["reward", "summaries", "AUC within"], "rows": kinds,
         "caption": "Tokens that the annotator took out, in summaries with errors of one kind only."
                    " Intrinsic: the article says it otherwise. Extrinsic: it does not say it."},
        {"header": ["token | summary", "r"], "rows": worst,
         "caption": f"{REWARDS[TOKEN_LEVEL[-1]]}: the tokens with the highest reward that the "
                    "annotator took out, and those with the lowest that the annotator kept."},
        {"header": ["reward", "mean", "deviation"], "rows": eos,
         "caption": "The reward of EOS, in standard deviations of the rewards of all tokens. What "
                    "is equal behind edits and originals says nothing about them, but pays a "
                    "policy for every response that it ends."},
        {"header": ["word", "tokens", "taken out", "r taken out", "r kept", "AUC"],
         "rows": types,
         "caption": f"{REWARDS[TOKEN_LEVEL[-1]]}, calibrated rewards. Seen: the prompt has the "
                    "word. AUC: tokens taken out against tokens kept."}]
