"""The paper's comparison from nothing: world, SFT, annotation, reward models, PPO and win rates.

    python -m fgrlhf.reproduce --profile quick --seeds 1 --out runs/quick   minutes on two CPU cores
    python -m fgrlhf.reproduce --profile full  --seeds 5 --out runs/full    intervals over seeds

Every step is a command of this project, run by fgrlhf/pipeline.py and listed in results.json, so
each can be repeated by hand. A seed varies everything: the world itself, SFT, the answers that are
annotated, the reward models and PPO. All systems start from the same SFT model and use the same
number of annotations, one a prompt. Settings were chosen on dev prompts (--profile sweep records
how), the best checkpoint of a run by its dev win rate, and the test prompts are answered once, at
the end. Interrupted, it continues where it stopped when called again.
"""

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fgrlhf.config import arg, parse, run
from fgrlhf.files import write_atomic
from fgrlhf.model import DTYPES
from fgrlhf.pipeline import Stage, run_stages
from fgrlhf.report import text_table, write_report
from fgrlhf.results import collect


@dataclass(frozen=True)
class Config:
    out: str = arg(help="folder for all runs, results.json and report.html")
    profile: str = arg("quick", choices=("quick", "full", "sweep"),
                       help="quick: one seed's worth of minutes; full: longer baselines and every "
                            "ablation; sweep: the settings tried, on dev prompts alone")
    seeds: int = arg(1, least=1, help="number of seeds, each with a world of its own")
    first_seed: int = arg(0, help="the first of them")
    device: str = arg("cpu", help="for every stage; the README's figures are the CPU's")
    dtype: str = arg("float32", choices=DTYPES, help="of every model, by the stages' own --dtype")
    lora_rank: int = arg(0, least=0, help="reward models, PPO and imitation train adapters of this "
                         "rank over the SFT model, at learning rates of their own")
    workers: int = arg(os.cpu_count() or 1, least=1, help="stages at a time, each on one thread")


@dataclass(frozen=True)
class Scale:
    """What the profiles differ in; the methods' settings are the same in all of them."""

    annotations: int = 1000         # prompts annotated: one pair and one edit each
    dev: int = 200                  # dev prompts
    test: int = 400                 # test prompts
    method_iterations: int = 40     # of every run without a critic
    baseline_iterations: int = 40   # of every run with critic and GAE
    ablations: bool = False
    sft_threads: int = 1            # with one seed nothing else can run beside SFT


SCALES = {"quick": Scale(method_iterations=30, baseline_iterations=30, sft_threads=2),
          "sweep": Scale(),
          "full": Scale(test=600, method_iterations=60, baseline_iterations=100, ablations=True)}
# Chosen on the dev prompts of other worlds; README.md has the sweep.
RLHF = ("--method", "rlhf", "--gamma", "1", "--gae-lambda", "0.95", "--beta", "0.2", "--lr", "6e-4")
METHOD = ("--method", "fine-grained", "--gamma", "0", "--beta", "0.5", "--lr", "1.2e-3")
IMPERFECT = ("--miss", "0.3", "--needless", "0.1")
# With --lora-rank in the place of the learning rates above; what was tried stands in README.md.
LORA = {"token": ("--lr", "1e-2"), "sequence": ("--lr", "3e-3"), "method": ("--lr", "5e-3"),
        "rlhf": ("--lr", "2.5e-3", "--value-lr", "2.5e-3"), "imitation": ("--lr", "8e-3")}
# Grids of the sweep: as many points for the baseline as for the method.
GRID = [(beta, lr) for beta in ("0.2", "0.5", "1.0") for lr in ("6e-4", "1.2e-3")]


class Seed:
    """Builds the stages of one seed; `at` turns a name into a path inside its folder."""

    def __init__(self, seed: int, folder: Path, scale: Scale, device: str, dtype: str = "float32",
                 lora_rank: int = 0):
        self.seed, self.folder, self.scale = str(seed), folder, scale
        self.lora_rank, self.stages = lora_rank, []
        self.rlhf, self.method = RLHF + self.adapters("rlhf"), METHOD + self.adapters("method")
        self.common = ("--device", device) + (("--dtype", dtype) if dtype != "float32" else ())

    def at(self, name: str) -> str:
        return str(self.folder / name)

    def add(self, name: str, *command: str, needs: tuple[str, ...] = (), threads: int = 1) -> None:
        prefix = self.folder.name
        if "fgrlhf.simulate" not in command:                    # the world itself needs no device
            command += self.common
        self.stages.append(Stage(f"{prefix}.{name}", command,
                                 tuple(f"{prefix}.{need}" for need in needs), threads))

    def adapters(self, kind: str) -> tuple[str, ...]:
        """With --lora-rank, what a stage that trains on top of the SFT model is told besides."""
        return ("--lora-rank", str(self.lora_rank), *LORA[kind]) if self.lora_rank else ()

    def outputs(self, name: str, policy: str, prompts: str, *options: str, needs=()) -> None:
        """Answers of a policy to a prompt file."""
        self.add(name, "eval.py", "outputs", "--policy", self.at(policy), "--prompts",
                 self.at(f"world/{prompts}.jsonl"), "--out", self.at(f"outputs/{name}.json"),
                 *options, needs=needs)

    def annotate(self, name: str, first: str, second: str, *options: str) -> None:
        self.add(name, "-m", "fgrlhf.simulate", "annotate", "--world", self.seed,
                 "--seed", self.seed, "--outputs", self.at(f"outputs/{first}.json"),
                 "--others", self.at(f"outputs/{second}.json"), "--out", self.at(name), *options,
                 needs=(first, second))

    def reward(self, name: str, data: str, *options: str) -> None:
        """A reward model from the SFT model, evaluated on held-out edits."""
        kind = "sequence" if "sequence" in options else "token"
        self.add(name, "train_rm.py", "--data", self.at(data), "--model", self.at("sft/policy"),
                 "--seed", self.seed, "--out", self.at(name),
                 "--eval-edits", self.at("held-out/edits.jsonl"),
                 "--eval-pairs", self.at("held-out/pairs.jsonl"), "--resume", *options,
                 *self.adapters(kind), needs=(data.split("/")[0], "held-out"))

    def ppo(self, name: str, reward: str, iterations: int, *options: str,
            test: bool = True) -> None:
        self.add(name, "train_ppo.py", "--policy", self.at("sft/policy"),
                 "--reward", self.at(f"{reward}/reward"), "--prompts", self.at("world/train.jsonl"),
                 "--dev-prompts", self.at("world/dev.jsonl"),
                 "--dev-reference", self.at("outputs/sft-dev.json"), "--world", self.seed,
                 "--seed", self.seed, "--iterations", str(iterations), "--out", self.at(name),
                 "--lr-decay", "--resume", *options, needs=(reward, "sft-dev"))
        if test:
            self.test(name, f"{name}/best", name)

    def imitation(self, name: str, data: str) -> None:
        self.add(name, "-m", "fgrlhf.sft", "--data", self.at(data),
                 "--model", self.at("sft/policy"), "--seed", self.seed, "--epochs", "3",
                 "--lr", "2e-3", "--muon-lr", "0", "--out", self.at(name), "--resume",
                 *self.adapters("imitation"), needs=(data.split("/")[0],))
        self.test(name, f"{name}/policy", name)

    def test(self, system: str, policy: str, need: str) -> None:
        """Sampled and greedy answers to the test prompts."""
        self.outputs(f"{system}-test", policy, "test", "--seed", "7", "--greedy-out",
                     self.at(f"outputs/{system}-test-greedy.json"), needs=(need,))


def start(seed: Seed) -> None:
    """World, SFT model, the answers to annotate, the annotations, the fixed references."""
    scale = seed.scale
    seed.add("world", "-m", "fgrlhf.simulate", "world", "--world", seed.seed, "--seed", seed.seed,
             "--out", seed.at("world"), "--dev", str(scale.dev), "--test", str(scale.test))
    seed.add("sft", "-m", "fgrlhf.sft", "--data", seed.at("world/demonstrations.jsonl"),
             "--init", "tiny", "--tokenizer", seed.at("world/tokenizer.model"),
             "--seed", seed.seed, "--epochs", "2", "--batch", "16", "--muon-lr", "5e-3",
             "--out", seed.at("sft"), "--resume", needs=("world",), threads=scale.sft_threads)
    limit = ("--limit", str(scale.annotations))
    for name, prompts, *options in (("first", "train", "--seed", "1", *limit),
                                    ("second", "train", "--seed", "2", *limit),
                                    ("sft-dev", "dev", "--seed", "3"),
                                    ("sft-dev-second", "dev", "--seed", "4")):
        seed.outputs(name, "sft/policy", prompts, *options, needs=("sft",))
    seed.annotate("annotations", "first", "second")
    seed.annotate("held-out", "sft-dev", "sft-dev-second", "--spans", "--skip-ties")


def compare_systems(seed: Seed) -> None:
    """The table: systems of the comparison, controls, and in the full profile the ablations."""
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
    seed.imitation("imitation", "annotations/edits.jsonl")          # the short ones last
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
    """The grid of KL coefficient and learning rate for baseline and method, on dev prompts."""
    seed.reward("rm-token", "annotations/edits.jsonl")
    seed.reward("rm-sequence", "annotations/pairs.jsonl", "--kind", "sequence", "--epochs", "3")
    for beta, lr in GRID:
        point = ("--beta", beta, "--lr", lr)
        seed.ppo(f"fine-grained-{beta}-{lr}", "rm-token", seed.scale.method_iterations,
                 *seed.method, *point, test=False)
        seed.ppo(f"rlhf-{beta}-{lr}", "rm-sequence", seed.scale.baseline_iterations,
                 *seed.rlhf, *point, test=False)


def scaled(config: Config) -> Scale:
    """The profile's sizes; no more threads for SFT than a seed has workers of its own."""
    scale = SCALES[config.profile]
    share = max(1, config.workers // config.seeds)
    return replace(scale, sft_threads=min(scale.sft_threads, share))


def wall_seconds(out: Path, this_call: float) -> float:
    """Seconds of this call and of the interrupted ones before it, kept in OUT/seconds.json."""
    path = out / "seconds.json"
    total = this_call + (json.loads(path.read_text()) if path.exists() else 0.0)
    write_atomic(path, json.dumps(round(total, 1)).encode())
    return round(total, 1)


def main(config: Config) -> None:
    out, started = Path(config.out), time.perf_counter()
    scale = scaled(config)
    seeds = [Seed(number, out / f"seed{number}", scale, config.device, config.dtype,
                  config.lora_rank)
             for number in range(config.first_seed, config.first_seed + config.seeds)]
    for seed in seeds:
        start(seed)
        (sweep if config.profile == "sweep" else compare_systems)(seed)
    stages = [stage for seed in seeds for stage in seed.stages]
    run_stages(stages, out, config.workers)
    results = collect(config.profile, [seed.folder for seed in seeds]) | {
        "command": f"python -m fgrlhf.reproduce --profile {config.profile} --seeds {config.seeds} "
                   f"--first-seed {config.first_seed} --out {config.out}"
                   + (f" --dtype {config.dtype}" if config.dtype != "float32" else "")
                   + (f" --lora-rank {config.lora_rank}" if config.lora_rank else ""),
        "machine": f"{os.cpu_count()} CPU cores, torch {torch.__version__}, device {config.device}",
        "seconds": wall_seconds(out, time.perf_counter() - started),
        "commands": [stage.text for stage in stages]}
    examples = results.pop("examples", {})
    write_atomic(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    write_report(out / "report.html", results | {"examples": examples})
    print(text_table(results))
    print(f"\n{out}/results.json, {out}/report.html")


if __name__ == "__main__":
    run(lambda: main(parse(Config, prog="python -m fgrlhf.reproduce", description=__doc__)))
