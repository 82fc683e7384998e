"""`python -m fgrlhf.reproduce` killed at random moments and called again: the same results.

The run is the sweep profile with one point of each grid and very small stages, of every kind except
the test answers of the other profiles.
"""

import json
import random
import signal
import time
from pathlib import Path

from tests import processes

LESS = {                                # these options make each stage short
    "world": ("--demonstrations", "60", "--train", "12", "--vocab-size", "400"),
    "fgrlhf.sft": ("--epochs", "1", "--batch", "8", "--save-every", "2"),
    "train_rm.py": ("--epochs", "1", "--batch", "4", "--save-every", "1"),
    "train_ppo.py": ("--iterations", "2", "--rollouts", "4", "--max-new-tokens", "8",
                     "--save-every", "1", "--eval-every", "1"),
    "annotate": ("--limit", "12"),
    "fgrlhf.dpo": ("--epochs", "1", "--batch", "4", "--save-every", "1"),
    "outputs": ("--max-new-tokens", "8")}


def make_small(command: list[str]) -> None:
    """Runs in place of `fgrlhf.reproduce`, with a small grid and small stages.

    The stages are forks of this process; otherwise each would import torch again.
    """
    from fgrlhf.engine.config import parse, run
    from fgrlhf.reproduce import __main__ as reproduce, pipeline, stages
    pipeline.subprocess.Popen = processes.Stage
    for grid in (*stages.GRIDS.values(), stages.IMITATION_GRID, stages.DPO_GRID,
                 stages.DPO_ALONE_GRID):
        grid[1:] = []
    init = pipeline.Stage.__init__

    def smaller(self, name, command, needs=()):
        command = tuple(part for part in command if part != "--skip-ties")
        for word, flags in LESS.items():
            if word in command:
                command += flags
        init(self, name, command, needs)
    pipeline.Stage.__init__ = smaller
    run(lambda: reproduce.main(parse(reproduce.Config, argv=command[1:])))
    raise SystemExit(0)


def reproduce(out: Path) -> tuple:
    return ("fgrlhf.reproduce", "--profile", "sweep", "--out", out, "--workers", 2)


def files(out: Path) -> dict[str, bytes]:
    """Reads every file of a seed except times, locks and temporary files."""
    skip = (".lock", "timing.jsonl", "done.json", ".tmp")
    return {str(path.relative_to(out)): path.read_bytes()
            for path in sorted((out / "seed0").rglob("*"))
            if path.is_file() and not path.name.endswith(skip)}


def timeless(value):
    """Returns results.json without the seconds."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "seconds" not in k}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def test_reproduce_killed_at_random_moments_gives_the_same_results(tmp_path):
    processes.run(tmp_path, "train_rm.py", "--help")                # starts the server
    started = time.perf_counter()
    out, whole = tmp_path / "out", tmp_path / "whole"       # both runs need the same paths
    process, stem = processes.start(tmp_path, *reproduce(out), instead=make_small)
    process.join(200)
    out.rename(whole)
    assert process.exitcode == 0, Path(f"{stem}.err").read_text()
    seconds, rng, kills = time.perf_counter() - started, random.Random(0), 0
    for _ in range(2):
        process, _ = processes.start(tmp_path, *reproduce(out), instead=make_small)
        process.join(seconds * rng.uniform(0.1, 0.4))
        process.kill()                                  # its running stages go on
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    process, stem = processes.start(tmp_path, *reproduce(out), instead=make_small)
    process.join(200)
    assert process.exitcode == 0 and kills, Path(f"{stem}.err").read_text()
    before, after = files(whole), files(out)
    assert before.keys() == after.keys() and len(before) > 30
    for name, content in before.items():
        assert after[name] == content, name
    results = [timeless(json.loads((folder / "results.json").read_text()))
               for folder in (whole, out)]
    assert results[0] == results[1]
