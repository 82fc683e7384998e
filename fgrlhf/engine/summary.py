"""Writes the figures of a trainer's progress bar, and the three lines that it ends with.

    trained: policy by SFT, 1500 steps; last batch: loss 0.1234
    results: runs/sft: policy/, metrics.jsonl, done.json
    next:    python train_rm.py --kind token --data EDITS --model runs/sft/policy --out OUT
"""

import json
import shlex
from pathlib import Path
from typing import NamedTuple

from fgrlhf.engine.encoding import is_text

# Metrics of the last step, with their short names. The KL is in nats per token.
FIGURES = {"rollout/reward": "reward", "rollout/kl_k1": "KL", "rollout/length": "length",
           "sft/loss": "loss", "rm/loss": "loss", "rm/accuracy": "accuracy", "dpo/loss": "loss",
           "dpo/accuracy": "accuracy"}
# Figures of done.json, which are shown behind them.
RESULTS = {"best_dev_win_rate": "best dev win rate", "best_iteration": "in iteration",
           "pair_accuracy": "accuracy on held-out records",
           "edits/pair_accuracy": "accuracy on held-out edits",
           "pairs/pair_accuracy": "accuracy on held-out pairs"}
FILES = ("policy", "best", "reward", "critic", "metrics.jsonl", "samples.jsonl", "done.json")


class Ending(NamedTuple):
    """The words in a trainer's last three lines that depend on the trainer."""

    trained: str                        # such as "policy by SFT"
    after: str                          # the command that comes next; a word in capitals is a gap


def command(words: str, template: str, **folders: str | Path) -> str:
    """Returns `words` with the folders in their places, and with --template if it is needed.

    words: such as "eval.py outputs --policy {policy}". The first folder is the trained model. When
    the template is the text of a file, --template gets this folder, which holds the text too.
    """
    places = {name: shlex.quote(str(folder)) for name, folder in folders.items()}
    flag = next(iter(places.values())) if is_text(template) else template
    return f"python {words.format(**places)}" + f" --template {flag}" * (template != "plain")


def figures(metrics: dict, names: dict[str, str] = FIGURES) -> str:
    """Writes the metrics that are among `names`, such as "loss 0.693, accuracy 0.5"."""
    return ", ".join(f"{label} {metrics[name]:.4g}" for name, label in names.items()
                     if isinstance(metrics.get(name), int | float))


def last_lines(folder: Path, ending: Ending, summary: dict) -> str:
    """Returns the three lines. summary: the contents of done.json."""
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    counted = [name for name in ("steps", "iterations", "folds", "records") if name in summary][:1]
    counts = [f"{n} {name}".removesuffix("s" * (n == 1)) for name in (*counted, "prompts")
              if (n := summary.get(name)) is not None]
    last = figures(json.loads(lines[-1])) if lines else ""
    if last and "iterations" not in summary:        # PPO's are of all responses of an iteration
        last = f"last batch: {last}"
    shown = [last, figures(summary, RESULTS)]
    there = [name + "/" * (folder / name).is_dir() for name in FILES if (folder / name).exists()]
    trained = "; ".join(filter(None, [", ".join([ending.trained, *counts]), *shown]))
    return "\n".join([f"trained: {trained}",
                      f"results: {folder}: {', '.join(there)}", f"next:    {ending.after}"])
