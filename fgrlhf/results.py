"""From the folders of finished runs to results.json: a mean, a 95% interval and every seed's value.

Over seeds the interval is Student's t (`one_more`: where a further seed's value is to be expected,
what a single run compares itself with); with one seed a difference gets a paired bootstrap over
prompts instead, and a lone figure none. The reference of every win rate is one fixed sample of the
SFT model's answers.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from fgrlhf.align import align
from fgrlhf.checkpoint import load_model, load_tokenizer
from fgrlhf.edits import Prompt
from fgrlhf.encode import encode_prompt
from fgrlhf.evaluate import bootstrap, compare, over_seeds
from fgrlhf.readers import read_edits, read_outputs
from fgrlhf.reward import load_reward
from fgrlhf.rollout import pack
from fgrlhf.worked import LossSettings, UpdateSettings, Worked, settings_of, work
from fgrlhf.world import World

SYSTEMS = {
    "sft": ("SFT", "start"),
    "rlhf": ("PPO-RLHF (sequence RM on pairs)", "baseline"),
    "sequence-edits": ("PPO, sequence RM on edits", "ablation"),
    "fine-grained": ("Fine-grained token-level PPO", "method"),
    "imitation": ("SFT on the edits", "control"),
    "fine-grained-imperfect": ("Fine-grained PPO, imperfect editor", "control"),
    "imitation-imperfect": ("SFT on the edits, imperfect editor", "control"),
    "likelihood": ("Log-likelihood as token reward", "control"),
    "fine-grained-paper-loss": ("Fine-grained PPO, paper's token loss", "ablation"),
    "fine-grained-logp-feature": ("Fine-grained PPO, logp in the head", "ablation"),
}
REWARD_MODELS = {
    "rm-sequence": "Sequence-level on pairs",
    "rm-sequence-edits": "Sequence-level on edits",
    "rm-token": "Token-level on edits",
    "rm-token-imperfect": "Token-level, imperfect editor",
    "rm-likelihood": "Untrained log-likelihood",
    "rm-token-paper-loss": "Token-level, paper's loss",
    "rm-token-logp-feature": "Token-level, logp in the head",
}
REWARD_METRICS = {"edits/pair_accuracy": "edit_accuracy", "pairs/pair_accuracy": "pair_accuracy",
                  "edits/token_auc": "token_auc", "edits/token_auc_within": "token_auc_within",
                  "edits/position_auc_within": "position_auc_within", "seconds": "seconds"}
PAPER = [{"label": "win rate gain over PPO-RLHF (LLaMA-7B, AlpacaFarm)",
          "value": "up to 5.1 points"},
         {"label": "reward model accuracy", "value": "about 85.2%"},
         {"label": "time to converge against PPO-RLHF", "value": "half"}]
NOTES = ["The world is ours: it shows the mechanism, not that a 7B model gains as much.",
         "An edit carries more information than a label: the same number of annotations is not the "
         "same information.",
         "Win rates are against one fixed sample of the SFT model, on test prompts, judged by the "
         "world's oracle (fewer errors win, ties count one half).",
         "PPO runs are tested at their best dev checkpoint, SFT and imitation at their last.",
         "The imperfect editor misses 30% of the errors and makes a needless edit in 10% of the "
         "answers."]


class Tested(NamedTuple):
    """One system's errors on each test prompt of one seed, by decoding."""

    sampled: list[int]
    greedy: list[int]
    reference: list[int]

    def preferences(self, decoding: str) -> list[float]:
        return compare(getattr(self, decoding), self.reference)


def read_lines(path: Path) -> list[dict]:
    """A .jsonl file of ours."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def tested(folder: Path, system: str) -> Tested:
    """Judge a system's sampled and greedy test answers, and the reference's, by the oracle."""
    world = World(int(folder.name.removeprefix("seed")))
    names = (f"{system}-test", f"{system}-test-greedy", "sft-reference")
    return Tested(*([len(world.errors(o.instruction, o.output))
                     for o in read_outputs(folder / "outputs" / f"{name}.json")] for name in names))


def cell(values: list[float]) -> dict:
    """Mean, its 95% interval over seeds, the interval of one more seed's value, every seed's value.

    Intervals are None for a single seed; NaN, no data, is None.
    """
    values = [None if math.isnan(value) else value for value in values]
    if None in values:
        return {"mean": None, "interval": None, "one_more": None, "per_seed": values}
    interval, one_more = over_seeds(values), over_seeds(values, more=1)
    shown = lambda i: None if math.isnan(i.low) else [i.low, i.high]
    return {"mean": interval.mean, "interval": shown(interval), "one_more": shown(one_more),
            "per_seed": values}


def difference(label: str, ours: list[list[float]], theirs: list[list[float]]) -> dict:
    """A paired difference of win rates: over seeds, or for one seed over its prompts."""
    by_prompt = [[a - b for a, b in zip(x, y)] for x, y in zip(ours, theirs)]
    per_seed = [sum(d) / len(d) for d in by_prompt]
    interval = over_seeds(per_seed) if len(per_seed) > 1 else bootstrap(by_prompt[0])
    return {"label": label, "mean": interval.mean, "interval": [interval.low, interval.high],
            "per_seed": per_seed}


def dev_curve(folder: Path, system: str) -> list[tuple[int, float, float, float]]:
    """(episodes, training seconds, dev win rate, dev errors) at each dev evaluation of a run."""
    seconds = {t["step"]: t["seconds"] for t in read_lines(folder / system / "timing.jsonl")}
    return [(int(m["rollout/episodes"]), seconds[m["step"]], m["eval/win_rate"], m["eval/errors"])
            for m in read_lines(folder / system / "metrics.jsonl") if "eval/win_rate" in m]


def first_reaching(curve: list[tuple], win_rate: float) -> tuple[float, float]:
    """(episodes, seconds) where the curve first reaches `win_rate`; infinite if it never does."""
    return next(((e, s) for e, s, w, _ in curve if w >= win_rate), (math.inf, math.inf))


def speed(folders: list[Path]) -> dict:
    """Episodes and seconds that baseline and method need for the baseline's best dev win rate."""
    rows = {"episodes": ([], []), "seconds": ([], [])}
    for folder in folders:
        baseline = dev_curve(folder, "rlhf")
        best = max(point[2] for point in baseline)
        for curve, side in ((baseline, 0), (dev_curve(folder, "fine-grained"), 1)):
            for unit, value in zip(("episodes", "seconds"), first_reaching(curve, best)):
                rows[unit][side].append(value)
    table = []
    for unit, (baseline, method) in rows.items():
        row = {"label": unit, "baseline": sum(baseline) / len(baseline),
               "method": "not in every run", "ratio": None}
        if math.inf not in method:
            row["method"] = sum(method) / len(method)
            row["ratio"] = cell([a / b for a, b in zip(baseline, method)])
        table.append(row)
    return {"label": "To the baseline's best dev win rate", "rows": table}


def curves(folders: list[Path], systems: list[str]) -> list[dict]:
    """Dev win rate, reward and KL of the PPO runs, for the report."""
    result = []
    trained = [system for system in systems if not system.startswith(("imitation", "sft"))]
    for folder in folders:
        for system in trained:
            if not (folder / system / "metrics.jsonl").exists():
                continue
            head = {"system": system, "label": SYSTEMS[system][0],
                    "seed": int(folder.name.removeprefix("seed"))}
            episodes, seconds, win_rates, _ = map(list, zip(*dev_curve(folder, system)))
            result.append(head | {"metric": "win_rate", "x_episodes": episodes,
                                  "x_seconds": seconds, "y": win_rates})
            lines = read_lines(folder / system / "metrics.jsonl")
            for metric, unit in (("reward", 1), ("kl_k1", "rollout/length")):
                result.append(head | {"metric": metric, "y": [
                    line[f"rollout/{metric}"] * line.get(unit, 1) for line in lines],
                    "x_episodes": [int(line["rollout/episodes"]) for line in lines]})
    return result


def examples(folder: Path, count: int = 6) -> dict:
    """Token rewards of real answers, edit diffs, and answers before and after, from one seed."""
    world = World(int(folder.name.removeprefix("seed")))
    tokenizer = load_tokenizer(folder / "sft" / "policy")
    model = load_reward(folder / "rm-token" / "reward")
    before = read_outputs(folder / "outputs" / "sft-reference.json")
    after = read_outputs(folder / "outputs" / "fine-grained-test.json")

    def pieces(ids: list[int]) -> list[str]:
        text = tokenizer.decode(ids)
        return [" EOS" if i == tokenizer.eos_id else text[start:end] or " "
                for i, (start, end) in zip(ids, tokenizer.spans(ids))]

    count_errors = lambda o: len(world.errors(o.instruction, o.output))
    maps, diffs = [], []
    for output in [o for o in before if count_errors(o) >= 2][:count]:
        prompt = encode_prompt(tokenizer, Prompt("test", output.instruction), "plain", 10 ** 6)
        ids = tokenizer.encode(output.output, eos=True)
        with torch.no_grad():
            rewards = model.ppo_rewards(pack([prompt], [ids]))[0].tolist()
        errors = world.errors(output.instruction, output.output)
        wrong = [any(max(e.start, a) < min(e.end, b) for e in errors)
                 for a, b in tokenizer.spans(ids)]
        maps.append({"prompt": output.instruction, "tokens": pieces(ids), "rewards": rewards,
                     "errors": wrong})
    for edit in read_edits(folder / "annotations" / "edits.jsonl")[:count]:
        sides = [tokenizer.encode(text, eos=True) for text in (edit.original, edit.edited)]
        aligned = align(*sides)
        diffs.append({"prompt": edit.prompt, "original_tokens": pieces(sides[0]),
                      "original_changed": aligned.original_changed,
                      "edited_tokens": pieces(sides[1]), "edited_changed": aligned.edited_changed})
    worked = work_edit(folder, tokenizer, model)
    both = [{"prompt": a.instruction, "before": a.output, "before_errors": count_errors(a),
             "after": b.output, "after_errors": count_errors(b), "label": "fine-grained"}
            for a, b in zip(before, after) if count_errors(a)][:count]
    return {"heat_maps": maps, "edits": diffs, "worked": worked, "before_after": both}


def work_edit(folder: Path, tokenizer, model) -> list[Worked]:
    """The first held-out edit that mends two errors, worked through as fgrlhf.explain does."""
    edit = next((e for e in read_edits(folder / "held-out" / "edits.jsonl")
                 if len(e.spans or ()) > 1), None)
    if edit is None:
        return []
    policy, reference = (load_model(folder / "sft" / "policy") for _ in range(2))
    return [work(edit, tokenizer, model, settings_of(LossSettings, folder / "rm-token" / "reward"),
                 policy, reference, settings_of(UpdateSettings, folder / "fine-grained" / "best"))]


def reward_models(folders: list[Path]) -> dict:
    """The reward models' figures on held-out edits and ordinary pairs."""
    table = {}
    for name, label in REWARD_MODELS.items():
        if (folders[0] / name / "done.json").exists():
            done = [json.loads((folder / name / "done.json").read_text()) for folder in folders]
            table[name] = {"label": label, "metrics": {
                new: cell([d[old] for d in done])
                for old, new in REWARD_METRICS.items() if old in done[0]}}
    return table


def sweep_table(folders: list[Path]) -> dict:
    """Best dev win rate of every point of the sweep."""
    runs = sorted({run.name for folder in folders for run in folder.iterdir()
                   if run.name.startswith(("rlhf-", "fine-grained-"))})
    table = {}
    for run in runs:
        done = [json.loads((folder / run / "done.json").read_text()) for folder in folders]
        best = cell([d["best_dev_win_rate"] for d in done])
        table[run] = {"label": run, "role": "baseline" if run.startswith("rlhf") else "method",
                      "metrics": {"best_dev_win_rate": best}}
    return table


def collect(profile: str, folders: list[Path]) -> dict:
    """Everything the table and the report show."""
    seeds = [int(folder.name.removeprefix("seed")) for folder in folders]
    head = {"profile": profile, "seeds": seeds, "notes": NOTES}
    if profile == "sweep":
        return head | {"systems": sweep_table(folders), "reward_models": reward_models(folders)}
    present = [s for s in SYSTEMS if (folders[0] / "outputs" / f"{s}-test.json").exists()]
    tests = {system: [tested(folder, system) for folder in folders] for system in present}
    systems = {}
    for system, runs in tests.items():
        metrics = {"win_rate": [sum(p := t.preferences("sampled")) / len(p) for t in runs],
                   "win_rate_greedy": [sum(p := t.preferences("greedy")) / len(p) for t in runs],
                   "errors": [sum(t.sampled) / len(t.sampled) for t in runs],
                   "errors_greedy": [sum(t.greedy) / len(t.greedy) for t in runs]}
        done = [json.loads(path.read_text()) for folder in folders
                if (path := folder / system / "done.json").exists()]
        for name in ("best_dev_win_rate", "best_iteration", "episodes", "seconds"):
            if len(done) == len(folders) and name in done[0]:
                metrics[name] = [d[name] for d in done]
        label, role = SYSTEMS[system]
        systems[system] = {"label": label, "role": role,
                           "metrics": {name: cell(values) for name, values in metrics.items()}}
    by = lambda system, decoding: [t.preferences(decoding) for t in tests[system]]
    comparisons = [difference(f"{a} minus {b}, {decoding}", by(a, decoding), by(b, decoding))
                   for a, b in (("fine-grained", "rlhf"), ("sequence-edits", "rlhf"),
                                ("fine-grained", "sequence-edits"), ("fine-grained", "imitation"),
                                ("fine-grained-imperfect", "imitation-imperfect"),
                                ("likelihood", "sft"))
                   for decoding in ("sampled", "greedy")]
    return head | {"systems": systems, "reward_models": reward_models(folders),
                   "comparisons": comparisons, "speed": speed(folders), "paper": PAPER,
                   "curves": curves(folders, present), "examples": examples(folders[0])}
