"""Compares training runs: settings that differ, last figures, curves over each other.

    python -m fgrlhf.compare runs/quick/seed0/rlhf runs/quick/seed0/fine-grained --html compare.html
    python -m fgrlhf.compare PPO=runs/full/seed{400..407}/rlhf \\
        ours=runs/full/seed{400..407}/fine-grained

A run is the --out folder of train_ppo.py, train_rm.py, fgrlhf.sft or fgrlhf.dpo, finished or not.
Runs with the same NAME form a group, such as the seeds of one experiment. (The shell turns the
second command into 16 words NAME=DIR.) A group is shown as its mean with a 95% interval over seeds.
When it has the same seeds as the first group, the differences from that group are shown too,
paired by seed.

--csv FILE has the columns run, seed, step, metric and value. `run` is the name of the group.
"""

import csv
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from fgrlhf.compare.page import page
from fgrlhf.compare.runs import Group, read_groups
from fgrlhf.compare.tables import as_text, notes, tables
from fgrlhf.data.files import write_atomic
from fgrlhf.engine.config import arg, parse, run
from fgrlhf.engine.places import HTML, begins_with, refuse_outputs

COLUMNS = "run,seed,step,metric,value"          # the first line of --csv
WIDTH = 104                                     # columns of the terminal


@dataclass(frozen=True)
class Config:
    runs: tuple[str, ...] = arg(help="[NAME=]DIR: the folder of a run, and the name of its group")
    html: str | None = arg(None, help="also write a page with the tables and one chart per metric")
    csv: str | None = arg(None, help="also write all metrics as a table in long form")


def long_form(groups: Sequence[Group]) -> str:
    """Returns every logged number as CSV, one in each row. A metric that is null has no row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS.split(","))
    for group in groups:
        for one in group.runs:
            writer.writerows([group.name, one.seed, step, metric, value]
                             for metric, values in one.metrics.items()
                             for step, value in values.items())
    return text.getvalue()


def main(config: Config) -> None:
    groups = read_groups(config.runs)
    table = begins_with("a table of this command", f"{COLUMNS}\n")
    refuse_outputs([("--html", config.html, HTML), ("--csv", config.csv, table)],
                   [("the run", one.folder) for group in groups for one in group.runs])
    found, sentences = tables(groups), notes(groups)
    if config.html:
        write_atomic(config.html, page(groups, found, sentences).encode("utf-8", "replace"))
    if config.csv:
        write_atomic(config.csv, long_form(groups).encode("utf-8", "replace"))
    print("\n\n".join([*(as_text(table, WIDTH) for table in found),
                       *("\n".join(textwrap.wrap(sentence, WIDTH, break_on_hyphens=False))
                         for sentence in sentences)]))
    if written := ", ".join(filter(None, (config.html, config.csv))):
        print(f"\n{written}")


if __name__ == "__main__":
    run(lambda: main(parse(Config, __doc__)))
