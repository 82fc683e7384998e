"""Repeats the paper's comparison: world, SFT, annotations, reward models, PPO, win rates.

    python -m fgrlhf.reproduce --profile quick --seeds 1 --out runs/quick   minutes on two CPU cores
    python -m fgrlhf.reproduce --profile full  --seeds 4 --out runs/full    intervals over seeds
    python -m fgrlhf.reproduce --profile real  --data DIR --out runs/real   people's edits
    python -m fgrlhf.reproduce --profile study --seeds 4 --only held-out --out runs/study

The profiles full and annotations add systems to those of quick. In one folder they share its runs.
The profile real has another world: news, summaries and people's edits of them (DeFacto, in --data),
and a pretrained model of 135 million parameters. The profile study changes the world or its
annotators step by step, one knob at a time; STUDY.md has its questions.

Every step is a command of this project that can be repeated by hand. pipeline.py runs the commands
and results.json lists them; stages.py has their settings.

In the other profiles the settings were chosen on dev prompts (--profile sweep), and the best
checkpoint of a PPO run is the one with the highest dev win rate. The test prompts are answered
once, at the end. The same command continues an interrupted call where it stopped.
"""

import json
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from fgrlhf.data.fields import UserError
from fgrlhf.data.files import read_object, write_atomic
from fgrlhf.engine.config import DTYPES, arg, parse, run
from fgrlhf.engine.distributed import pick_device
from fgrlhf.real import results as real_results
from fgrlhf.real import stages as real
from fgrlhf.real.files import check_data
from fgrlhf.real.prompts import EVIDENCE, prompt_arg
from fgrlhf.reproduce import study, study_results
from fgrlhf.reproduce.figures import write_figures
from fgrlhf.reproduce.pipeline import HOME, Stage, run_stages
from fgrlhf.reproduce.report import text_table, write_report
from fgrlhf.reproduce.results import collect
from fgrlhf.reproduce.stages import PROFILES, Seed, multiply_rates, rate_factor, start
from fgrlhf.reproduce.study_report import study_text


@dataclass(frozen=True)
class Config:
    out: str = arg(help="folder for all runs, results.json and report.html")
    profile: str = arg("quick", choices=(*PROFILES, "study", "real"),
                       help="quick: minutes per seed; full: rivals, controls and ablations too; "
                            "annotations: fewer annotations too; sweep: the settings that were "
                            "tried, on dev prompts only; study: one knob at a time; real: "
                            "people's edits")
    only: str | None = arg(None, help=f"study: one of its knobs: {', '.join(study.KNOBS)}")
    redraw: bool = arg(False, help="study: run nothing, and draw OUT/report.html and "
                       "OUT/figures again from OUT/results.json")
    data: str | None = arg(None, help="real: folder with DeFacto's train.jsonl and val.jsonl")
    prompt: str = prompt_arg("real: ")
    preset: str = arg(Seed.init, choices=tuple(study.PRESET.values()),
                      help="size of all models, but not of profile real; the learning rates are "
                           "multiplied by the width of tiny over that of the preset")
    seeds: int = arg(1, least=1, help="number of seeds; each seed has its own world")
    first_seed: int = arg(0, help="the first seed")
    device: str = arg("cpu", help="device of every stage; the published figures are from CPUs")
    dtype: str = arg("float32", choices=DTYPES, help="--dtype of every stage that has a model")
    lora_rank: int = arg(0, least=0, help="every model but SFT's trains adapters of this "
                         "rank, at other learning rates; 0 trains all weights")
    workers: int = arg(os.cpu_count() or 1, least=1, help="stages that run at a time, each on one "
                       "thread")


def collected(config: Config, seeds: list[Seed]) -> dict:
    """Collects the results. A file that was changed since its stage ran is refused in one line."""
    try:
        folders = [seed.folder for seed in seeds]
        return (real_results.collect(folders, config.prompt) if config.profile == "real" else
                study_results.collect(folders, config.only) if config.profile == "study" else
                collect(config.profile, folders))
    except (UserError, LookupError, TypeError, ValueError, AttributeError) as error:
        what = error if isinstance(error, UserError) else (
            f"{config.out}: the files of the finished stages do not give results "
            f"({type(error).__name__} {error}), because one has changed or the program has a fault")
        raise UserError(f"{what}; to make a file again, remove the folder of its run and its "
                        f"record in {Path(config.out) / 'stages'}, and repeat the command"
                        ) from None


def command_of(config: Config) -> str:
    """The command of these results; results.json names the device under "machine"."""
    usual = {"data": None, "prompt": EVIDENCE, "only": None, "preset": Seed.init,
             "dtype": "float32", "lora_rank": 0}                    # which the command leaves out
    words = [word for name in ("profile", "data", "prompt", "only", "preset", "seeds", "first_seed",
                               "out", "dtype", "lora_rank")
             if name not in usual or getattr(config, name) != usual[name]
             for word in ("--" + name.replace("_", "-"), str(getattr(config, name)))]
    return shlex.join(["python", "-m", "fgrlhf.reproduce", *words])


def commit() -> str | None:
    """Returns the commit of the clone that runs, or None. The files may have changed since.

    git keeps the commit of a branch in a file of its own or, with those of others, in packed-refs.
    """
    folder = HOME / ".git"
    try:
        head = (folder / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        if (branch := folder / head[5:]).exists():
            return branch.read_text().strip()
        packed = map(str.split, (folder / "packed-refs").read_text().splitlines())
        return next((words[0] for words in packed if words[1:] == [head[5:]]), None)
    except OSError:
        return None


def check_flags(config: Config) -> None:
    """Refuses now what the first stage would refuse later."""
    pick_device(config.device)
    if config.preset != Seed.init and (config.profile == "real" or config.only == "size"):
        raise UserError("--preset: expected no --profile real and no --only size")
    if config.profile == "real":
        check_data(config.data)
        if config.lora_rank:
            raise UserError("--profile real: expected no --lora-rank")
    elif config.data or config.prompt != EVIDENCE:
        raise UserError("--data and --prompt: expected --profile real")
    if config.profile == "study":
        study.chosen(config.only)
    elif config.only or config.redraw:
        raise UserError("--only and --redraw: expected --profile study")


def planned(config: Config, knobs: Iterable[str] = ()) -> list[Seed]:
    """Returns the seeds with all stages of the profile. knobs: those of a study."""
    seeds = [Seed(number, Path(config.out) / f"seed{number}", config.device, config.dtype,
                  config.lora_rank)
             for number in range(config.first_seed, config.first_seed + config.seeds)]
    for seed in seeds:
        seed.init = config.preset
        if config.profile == "real":
            real.plan(seed, config.data, config.prompt)
        elif config.profile == "study":
            study.plan(seed, knobs)
        else:
            start(seed)
            PROFILES[config.profile](seed)
        factor = rate_factor(seed.init)
        seed.stages = [multiply_rates(stage, factor) for stage in seed.stages]
    return seeds


def stages_of(seeds: list[Seed]) -> list[Stage]:
    """Returns the stages of all seeds, in order."""
    return [stage for seed in seeds for stage in seed.stages]


def main(config: Config) -> None:
    check_flags(config)
    out = Path(config.out)
    if config.redraw:
        redraw(out)
        return
    seeds = planned(config, study.chosen(config.only) if config.profile == "study" else ())
    seconds = run_stages(stages_of(seeds), out, config.workers)
    results = collected(config, seeds)
    done = stages_of(planned(config, results.get("knobs", ())))     # also of earlier --only
    results |= {
        "command": command_of(config),
        "commit": commit(),
        "machine": f"{os.cpu_count()} CPU cores, torch {torch.__version__}, device {config.device}",
        "seconds": seconds,
        "commands": [stage.text for stage in done]}
    examples = results.pop("examples", {})
    text = json.dumps(results, indent=1, allow_nan=False)
    write_atomic(out / "results.json", (text + "\n").encode())
    show(out, results | {"examples": examples})


def redraw(out: Path) -> None:
    """Writes the report and the figures of a study again, from its results.json."""
    path = out / "results.json"
    results = read_object(path)
    if results.get("profile") != "study":
        raise UserError(f"{path}: expected the results of --profile study, whose report holds "
                        f"nothing else, got profile {results.get('profile')!r}; repeat the command "
                        "that made them, which trains nothing again")
    try:
        show(out, results)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); repeat the command "
                        "that made it, which trains nothing again") from None


def show(out: Path, results: dict) -> None:
    """Writes the report and the figures of a study, and prints the table."""
    write_report(out / "report.html", results)
    write_figures(out / "figures", results)
    print(study_text(results) or text_table(results))
    figures = f", {out}/figures" if results.get("knobs") else ""
    print(f"\n{out}/results.json, {out}/report.html{figures}")


if __name__ == "__main__":
    run(lambda: main(parse(Config, __doc__)))
