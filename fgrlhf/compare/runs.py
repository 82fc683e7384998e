"""Reads the output folders of training runs, finished or not, and puts them into groups.

The files are those of engine/run.py. Nothing is written, so a run that is still training may be
read. A group is what the tables and charts have one column or one curve for: a single run, or the
runs of several seeds.
"""

import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fgrlhf.data.fields import UserError, check, take
from fgrlhf.data.files import read_bytes, read_object
from fgrlhf.data.values import read_values

SCRIPTS = {"ppo": "train_ppo.py", "rm": "train_rm.py", "sft": "fgrlhf.sft", "dpo": "fgrlhf.dpo"}
LONGEST_NAME = 40                   # characters; charts and tables have room for this


class LoggedRun(NamedTuple):
    """The settings, the metrics and the final figures of one run, as far as they are written."""

    folder: str
    config: dict
    metrics: dict[str, dict[int, float]]    # name -> {step: value}; "seconds" is one of the names
    done: dict | None                       # the content of done.json, None in an unfinished run

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return max(step for values in self.metrics.values() for step in values)

    @property
    def script(self) -> str:
        """The script that made the run: its metrics begin with the name in SCRIPTS."""
        prefixes = {name.split("/")[0] for name in self.metrics}
        return next((script for prefix, script in SCRIPTS.items() if prefix in prefixes), "unknown")


class Group(NamedTuple):
    """A single run, or the runs of several seeds, sorted by seed."""

    name: str
    runs: list[LoggedRun]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]


def shared_metrics(groups: Sequence[Group]) -> list[str]:
    """Returns the metrics that all runs have, in the order of the first run, evaluations first."""
    runs = [run for group in groups for run in group.runs]
    names = [name for name in runs[0].metrics if all(name in run.metrics for run in runs)]
    return sorted(names, key=lambda name: (name == "seconds", not name.startswith("eval/")))


def read_groups(words: Sequence[str]) -> list[Group]:
    """Reads the runs of the command line, each given as "[NAME=]DIR".

    Runs with the same NAME are one group. A run without a NAME is a group of its own, which is
    named by the end of its path. Raises UserError for what is not a run, for a folder that is given
    twice, and for two runs of one group that have the same seed.
    """
    split = [_split(word) for word in words]
    places: dict[str, str] = {}
    for _, folder in split:
        place = os.path.realpath(folder)
        if place in places:
            raise UserError(f"{folder}: expected each run once, got the same folder as "
                            f"{places[place]}; leave one of the two out")
        places[place] = folder
    names = iter(names_of([folder for name, folder in split if name is None],
                          {name for name, _ in split if name is not None}))
    groups: dict[str, list[LoggedRun]] = {}
    for name, folder in split:
        groups.setdefault(next(names) if name is None else name, []).append(read_run(folder))
    return [Group(name, _by_seed(name, runs)) for name, runs in groups.items()]


def read_run(folder: str) -> LoggedRun:
    """Reads one output folder. Raises UserError when it is not one, or a line is damaged.

    In an unfinished run a last line without its end is left out, as --resume would do.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        there = "a folder without config.json" if path.is_dir() else (
            "a file" if path.exists() else "nothing")
        raise UserError(f"{folder}: expected the --out folder of a training run, got {there}; "
                        "check the path")
    if not (path / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: expected a run with metrics, got no metrics.jsonl; wait for "
                        "its first step, or leave it out")
    done = read_object(path / "done.json") if (path / "done.json").is_file() else None
    config = read_object(path / "config.json")
    take(config, "seed", int, str(path / "config.json"))
    metrics: dict[str, dict[int, float]] = {}
    for name in ("metrics.jsonl", "timing.jsonl"):
        for step, values in _lines(path / name, done is not None):
            for metric, value in values.items():
                if value is not None:
                    metrics.setdefault(metric, {})[step] = value
        if not metrics:
            raise UserError(f"{path / name}: expected a line of metrics for each step, got none; "
                            "wait for the first step, or leave the run out")
    return LoggedRun(folder, config, metrics, done)


def _lines(path: Path, finished: bool) -> Iterator[tuple[int, dict[str, float | None]]]:
    """Yields (step, the numbers of the line) of metrics.jsonl or timing.jsonl, steps rising."""
    data = read_bytes(path) if path.exists() else b""
    if not finished:
        data = data[:data.rfind(b"\n") + 1]
    last = 0
    for place, value in read_values(io.BytesIO(data), path):
        if isinstance(value, UserError):
            raise value
        step = take(value, "step", int, place)
        if step <= last:
            raise UserError(f"{place}: step: expected more than {last}, the step of the line "
                            f"before, got {step}; restore the file")
        last = step
        yield step, {name: check(float | None, number, place, name)
                     for name, number in value.items() if name != "step"}


# ----- names and groups ---------------------------------------------------------------------------

def _split(word: str) -> tuple[str | None, str]:
    """Returns (NAME or None, DIR). A word that is itself a folder has no NAME."""
    name, sign, folder = word.partition("=")
    if not sign or os.path.isdir(word):
        return None, word
    if not name.strip() or not folder or len(name) > LONGEST_NAME or not name.isprintable():
        raise UserError(f"{word!r}: expected NAME=DIR with a NAME of at most {LONGEST_NAME} "
                        "characters; give a shorter NAME, or the folder only")
    return name, folder


def names_of(folders: list[str], taken: set[str]) -> list[str]:
    """Names folders, or files, by the shortest ends of their paths that are all different.

    Where these are too long, "..." replaces the folders that all of them share, and then also the
    middle of long names.
    """
    parts = [Path(os.path.abspath(folder)).parts[1:] for folder in folders]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        ends = [part[-depth:] for part in parts]
        for names in (["/".join(end) for end in ends], _abridged(ends, depth, LONGEST_NAME),
                      _abridged(ends, depth, LONGEST_NAME // 3)):
            if (all(len(name) <= LONGEST_NAME and name.isprintable() for name in names)
                    and len(taken | set(names)) == len(taken) + len(names)):
                return names
    return [f"run {n}" for n in range(1, len(folders) + 1)]


def _abridged(ends: list[tuple[str, ...]], depth: int, most: int) -> list[str]:
    """Joins the last `depth` parts of each path, with "..." for parts that are the same in all.

    The last part, the name of the folder itself, is kept. most: characters of a part, from 9.
    """
    cut = lambda part: part if len(part) <= most else f"{part[:most - 8]}...{part[-5:]}"
    rows = [("",) * (depth - len(end)) + end for end in ends]
    kept = [len(set(column)) > 1 for column in zip(*rows)][:-1] + [True]
    names = ["/".join(cut(part) if keep else "..." for part, keep in zip(row, kept) if part)
             for row in rows]
    return [re.sub(r"\.\.\.(/\.\.\.)+", "...", name) for name in names]


def _by_seed(name: str, runs: list[LoggedRun]) -> list[LoggedRun]:
    runs, seen = sorted(runs, key=lambda run: run.seed), {}
    for run in runs:
        if (other := seen.setdefault(run.seed, run)) is not run:
            raise UserError(f"{name}: expected runs of different seeds, got seed {run.seed} in "
                            f"{other.folder} and in {run.folder}; give one of them another NAME")
    return runs
