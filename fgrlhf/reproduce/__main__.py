"""Repeats the paper's comparison: world, SFT, annotations, reward models, PPO, win rates.

    python -m fgrlhf.reproduce --profile quick --seeds 1 --out runs/quick   minutes on two CPU cores
    python -m fgrlhf.reproduce --profile full  --seeds 5 --out runs/full    intervals over seeds

Every step is a command of this project that can be repeated by hand. pipeline.py runs the commands
and results.json lists them. Each seed has its own world, SFT model, answers to annotate, reward
models and PPO runs. All systems start from the SFT model of their seed and use the same number of
annotations, one per prompt.

The settings were chosen on dev prompts (--profile sweep). The best checkpoint of a PPO run is the
one with the highest dev win rate. The test prompts are answered once, at the end. The same command
continues an interrupted call where it stopped.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fgrlhf.data.fields import UserError
from fgrlhf.data.files import write_atomic
from fgrlhf.engine.config import DTYPES, arg, parse, run
from fgrlhf.engine.distributed import pick_device
from fgrlhf.reproduce.pipeline import Stage, run_stages
from fgrlhf.reproduce.report import text_table, write_report
from fgrlhf.reproduce.results import collect


@dataclass(frozen=True)
class Config:
    out: str = arg(help="folder for all runs, results.json and report.html")
    profile: str = arg("quick", choices=("quick", "full", "sweep"),
                       help="quick: minutes per seed; full: longer runs and all ablations; "
                            "sweep: the settings that were tried, on dev prompts only")
    seeds: int = arg(1, least=1, help="number of seeds; each seed has its own world")
    first_seed: int = arg(0, help="the first seed")
    device: str = arg("cpu", help="device of every stage; the published figures are from CPUs")
    dtype: str = arg("float32", choices=DTYPES, help="--dtype of every stage that has a model")
    lora_rank: int = arg(0, least=0, help="reward models, PPO and imitation train adapters of "
                         "this rank, at other learning rates; 0 trains all weights")
    workers: int = arg(os.cpu_count() or 1, least=1, help="stages that run at a time, each on one "
                       "thread")


@dataclass(frozen=True)
class Scale:
    """The sizes of a profile. The settings of the methods are the same in all profiles."""

    annotations: int = 1000         # annotated prompts, with one pair and one edit each
    dev: int = 200                  # dev prompts
    test: int = 400                 # test prompts
    method_iterations: int = 40     # PPO iterations without a critic
    baseline_iterations: int = 40   # PPO iterations with critic and GAE
    ablations: bool = False


SCALES = {"quick": Scale(method_iterations=30, baseline_iterations=30),
          "sweep": Scale(),
          "full": Scale(test=600, method_iterations=60, baseline_iterations=100, ablations=True)}
# Chosen on the dev prompts of other worlds; README.md in this folder has the sweep.
RLHF = ("--method", "rlhf", "--gamma", "1", "--gae-lambda", "0.95", "--beta", "0.2", "--lr", "6e-4")
METHOD = ("--method", "fine-grained", "--gamma", "0", "--beta", "0.5", "--lr", "1.2e-3")
IMPERFECT = ("--miss", "0.3", "--needless", "0.1")
# The learning rates with --lora-rank; README.md says which were tried.
LORA = {"token": ("--lr", "1e-2"), "sequence": ("--lr", "3e-3"), "method": ("--lr", "5e-3"),
        "rlhf": ("--lr", "2.5e-3", "--value-lr", "2.5e-3"), "imitation": ("--lr", "8e-3")}
# The grid of the sweep, the same for baseline and method.
GRID = [(beta, lr) for beta in ("0.2", "0.5", "1.0") for lr in ("6e-4", "1.2e-3")]


class Seed:
    """Builds the stages of one seed. `at` turns a name into a path in the folder of the seed."""

    def __init__(self, seed: int, folder: Path, scale: Scale, device: str, dtype: str = "float32",
                 lora_rank: int = 0):
        self.seed, self.folder, self.scale = str(seed), folder, scale
        self.lora_rank, self.stages = lora_rank, []
        self.rlhf, self.method = RLHF + self.adapters("rlhf"), METHOD + self.adapters("method")
        self.common = ("--device", device) + (("--dtype", dtype) if dtype != "float32" else ())

    def at(self, name: str) -> str:
        return str(self.folder / name)

    def add(self, name: str, *command: str, needs: tuple[str, ...] = ()) -> None:
        prefix = self.folder.name
        if "fgrlhf.simulate" not in command:                    # the world needs no device
            command += self.common
        self.stages.append(Stage(f"{prefix}.{name}", command,
                                 tuple(f"{prefix}.{need}" for need in needs)))

    def adapters(self, kind: str) -> tuple[str, ...]:
        """The options that --lora-rank adds to a stage that trains from the SFT model."""
        return ("--lora-rank", str(self.lora_rank), *LORA[kind]) if self.lora_rank else ()

    def outputs(self, name: str, policy: str, prompts: str, *options: str, needs=()) -> None:
        """Adds the answers of a policy to the prompts of a file."""
        self.add(name, "eval.py", "outputs", "--policy", self.at(policy), "--prompts",
                 self.at(f"world/{prompts}.jsonl"), "--out", self.at(f"outputs/{name}.json"),
                 *options, needs=needs)

    def annotate(self, name: str, first: str, second: str, *options: str) -> None:
        """Adds the preferred one of two answers to each prompt, and an edit of the other."""
        self.add(name, "-m", "fgrlhf.simulate", "annotate", "--world", self.seed,
                 "--seed", self.seed, "--outputs", self.at(f"outputs/{first}.json"),
                 "--others", self.at(f"outputs/{second}.json"), "--out", self.at(name), *options,
                 needs=(first, second))

    def reward(self, name: str, data: str, *options: str) -> None:
        """Adds a reward model that starts from the SFT model, evaluated on held-out edits."""
        kind = "sequence" if "sequence" in options else "token"
        self.add(name, "train_rm.py", "--data", self.at(data), "--model", self.at("sft/policy"),
                 "--seed", self.seed, "--out", self.at(name),
                 "--eval-edits", self.at("held-out/edits.jsonl"),
                 "--eval-pairs", self.at("held-out/pairs.jsonl"), "--resume", *options,
                 *self.adapters(kind), needs=(data.split("/")[0], "held-out"))

    def ppo(self, name: str, reward: str, iterations: int, *options: str,
            test: bool = True) -> None:
        """Adds a PPO run from the SFT model, and its best policy's answers to the test prompts."""
        self.add(name, "train_ppo.py", "--policy", self.at("sft/policy"),
                 "--reward", self.at(f"{reward}/reward"), "--prompts", self.at("world/train.jsonl"),
                 "--dev-prompts", self.at("world/dev.jsonl"),
                 "--dev-reference", self.at("outputs/sft-dev.json"), "--world", self.seed,
                 "--seed", self.seed, "--iterations", str(iterations), "--out", self.at(name),
                 "--lr-decay", "--resume", *options, needs=(reward, "sft-dev"))
        if test:
            self.test(name, f"{name}/best", name)

    def imitation(self, name: str, data: str) -> None:
        """Adds SFT on the edited answers, and its last policy's answers to the test prompts."""
        self.add(name, "-m", "fgrlhf.sft", "--data", self.at(data),
                 "--model", self.at("sft/policy"), "--seed", self.seed, "--epochs", "3",
                 "--lr", "2e-3", "--muon-lr", "0", "--out", self.at(name), "--resume",
                 *self.adapters("imitation"), needs=(data.split("/")[0],))
        self.test(name, f"{name}/policy", name)

    def test(self, system: str, policy: str, need: str) -> None:
        """Adds the sampled and the greedy answers of a policy to the test prompts."""
        self.outputs(f"{system}-test", policy, "test", "--seed", "7", "--greedy-out",
                     self.at(f"outputs/{system}-test-greedy.json"), needs=(need,))


def start(seed: Seed) -> None:
    """Adds world, SFT model, answers to annotate, annotations and the dev reference."""
    scale = seed.scale
    seed.add("world", "-m", "fgrlhf.simulate", "world", "--world", seed.seed, "--seed", seed.seed,
             "--out", seed.at("world"), "--dev", str(scale.dev), "--test", str(scale.test))
    seed.add("sft", "-m", "fgrlhf.sft", "--data", seed.at("world/demonstrations.jsonl"),
             "--init", "tiny", "--tokenizer", seed.at("world/tokenizer.model"),
             "--seed", seed.seed, "--epochs", "2", "--batch", "16", "--muon-lr", "5e-3",
             "--out", seed.at("sft"), "--resume", needs=("world",))
    limit = ("--limit", str(scale.annotations))
    for name, prompts, *options in (("first", "train", "--seed", "1", *limit),
                                    ("second", "train", "--seed", "2", *limit),
                                    ("sft-dev", "dev", "--seed", "3"),
                                    ("sft-dev-second", "dev", "--seed", "4")):
        seed.outputs(name, "sft/policy", prompts, *options, needs=("sft",))
    seed.annotate("annotations", "first", "second")
    seed.annotate("held-out", "sft-dev", "sft-dev-second", "--spans", "--skip-ties")


def compare_systems(seed: Seed) -> None:
    """Adds the systems of the comparison and the controls; the full profile adds ablations."""
    scale = seed.scale
    seed.reward("rm-token", "annotations/edits.jsonl")
    seed.reward("rm-sequence", "annotations/pairs.jsonl", "--kind", "sequence", "--epochs", "3")
    seed.ppo("rlhf", "rm-sequence", scale.baseline_iterations, *seed.rlhf)
    seed.ppo("fine-grained", "rm-token", scale.method_iterations, *seed.method)
    seed.reward("rm-sequence-edits", "annotations/edits.jsonl", "--kind", "sequence",
                "--epochs", "3")
    seed.ppo("sequence-edits", "rm-sequence-edits", scale.baseline_iterations, *seed.rlhf)
    seed.annotate("imperfect", "first", "second", *IMPERFECT)
    seed.reward("rm-token-imperfect", "imperfect/edits.jsonl")
    seed.ppo("fine-grained-imperfect", "rm-token-imperfect", scale.method_iterations, *seed.method)
    seed.reward("rm-likelihood", "annotations/edits.jsonl", "--likelihood")
    seed.ppo("likelihood", "rm-likelihood", scale.method_iterations, *seed.method)
    seed.imitation("imitation", "annotations/edits.jsonl")          # short stages last
    seed.imitation("imitation-imperfect", "imperfect/edits.jsonl")
    seed.test("sft", "sft/policy", "sft")
    seed.outputs("sft-reference", "sft/policy", "test", "--seed", "8", needs=("sft",))
    if not scale.ablations:
        return
    paper = ("--token-weight", "0", "--u0", "difference", "--u0-weight", "1")
    for name, options in (("paper-loss", paper), ("logp-feature", ("--logp-feature",))):
        seed.reward(f"rm-token-{name}", "annotations/edits.jsonl", *options)
        seed.ppo(f"fine-grained-{name}", f"rm-token-{name}", scale.method_iterations, *seed.method)


def sweep(seed: Seed) -> None:
    """Adds the grid of KL coefficients and learning rates for baseline and method."""
    seed.reward("rm-token", "annotations/edits.jsonl")
    seed.reward("rm-sequence", "annotations/pairs.jsonl", "--kind", "sequence", "--epochs", "3")
    for beta, lr in GRID:
        point = ("--beta", beta, "--lr", lr)
        seed.ppo(f"fine-grained-{beta}-{lr}", "rm-token", seed.scale.method_iterations,
                 *seed.method, *point, test=False)
        seed.ppo(f"rlhf-{beta}-{lr}", "rm-sequence", seed.scale.baseline_iterations,
                 *seed.rlhf, *point, test=False)


def wall_seconds(out: Path, this_call: float) -> float:
    """Adds the seconds of this call to those of earlier, interrupted calls in OUT/seconds.json."""
    path = out / "seconds.json"
    try:
        before = float(path.read_text()) if path.exists() else 0.0
    except ValueError:
        raise UserError(f"{path}: expected a number, got a damaged file; remove it") from None
    write_atomic(path, json.dumps(round(before + this_call, 1)).encode())
    return round(before + this_call, 1)


def collected(config: Config, seeds: list[Seed]) -> dict:
    """Collects the results. A file that was damaged since its stage ran is refused in one line."""
    try:
        return collect(config.profile, [seed.folder for seed in seeds])
    except (UserError, LookupError, TypeError, ValueError, AttributeError) as error:
        what = error if isinstance(error, UserError) else (
            f"{config.out}: a file of a finished stage is damaged ({type(error).__name__} {error})")
        raise UserError(f"{what}; to make it again, remove the folder of its run and its record in "
                        f"{Path(config.out) / 'stages'}, and repeat the command") from None


def command_of(config: Config) -> str:
    """The command of these results; results.json names the device under "machine"."""
    dtype = f" --dtype {config.dtype}" if config.dtype != "float32" else ""
    lora = f" --lora-rank {config.lora_rank}" if config.lora_rank else ""
    return (f"python -m fgrlhf.reproduce --profile {config.profile} --seeds {config.seeds} "
            f"--first-seed {config.first_seed} --out {config.out}{dtype}{lora}")


def main(config: Config) -> None:
    pick_device(config.device)                              # refused now, not by the first stage
    out, started = Path(config.out), time.perf_counter()
    scale = SCALES[config.profile]
    seeds = [Seed(number, out / f"seed{number}", scale, config.device, config.dtype,
                  config.lora_rank)
             for number in range(config.first_seed, config.first_seed + config.seeds)]
    for seed in seeds:
        start(seed)
        (sweep if config.profile == "sweep" else compare_systems)(seed)
    stages = [stage for seed in seeds for stage in seed.stages]
    run_stages(stages, out, config.workers)
    results = collected(config, seeds) | {
        "command": command_of(config),
        "machine": f"{os.cpu_count()} CPU cores, torch {torch.__version__}, device {config.device}",
        "seconds": wall_seconds(out, time.perf_counter() - started),
        "commands": [stage.text for stage in stages]}
    examples = results.pop("examples", {})
    text = json.dumps(results, indent=1, allow_nan=False)
    write_atomic(out / "results.json", (text + "\n").encode())
    write_report(out / "report.html", results | {"examples": examples})
    print(text_table(results))
    print(f"\n{out}/results.json, {out}/report.html")


if __name__ == "__main__":
    run(lambda: main(parse(Config, __doc__)))
