"""Collects the figures of finished runs for results.json (paper, section 3.2).

Each figure is a cell: the mean over seeds, its 95% interval by Student's t, the 95% interval in
which one more seed is expected (`one_more`), and the value of every seed. With a single seed a
figure has no interval, and a difference has a paired bootstrap over prompts. The reference of every
win rate is one fixed sample of the SFT model's answers.
"""

import math
from pathlib import Path
from typing import NamedTuple

from fgrlhf.checks.signs import signs_of_run
from fgrlhf.data.files import read_object, require_json
from fgrlhf.data.readers import read_outputs
from fgrlhf.evaluate import bootstrap, compare, over_seeds
from fgrlhf.reproduce.examples import examples
from fgrlhf.reproduce.names import (
    COMPARED, IMPERFECT_EDITORS, NOTES, PAPER, REWARD_METRICS, REWARD_MODELS, SYSTEMS, WORDED)
from fgrlhf.reproduce.stages import ANNOTATIONS, FEWER, TEMPERATURES
from fgrlhf.simulate.advantages import PLACES
from fgrlhf.simulate.annotators import wordings
from fgrlhf.simulate.oracle import count_errors
from fgrlhf.simulate.world import World

class Tested(NamedTuple):
    """The errors of one system on each test prompt of one seed."""

    answers: dict[str, list[int]]       # by decoding: "sampled" (temperature 1), "greedy", "0.7" ..
    reference: list[int]                # of the fixed sample of the SFT model

    def preferences(self, decoding: str) -> list[float]:
        """1 (win), 0.5 (tie) or 0 (loss) per prompt; "mean" is the mean over all temperatures."""
        if decoding != "mean":
            return compare(self.answers[decoding], self.reference)
        each = [compare(errors, self.reference) for errors in self.answers.values()]
        return [sum(values) / len(values) for values in zip(*each)]

    @property
    def decodings(self) -> list[str]:
        """The decodings of the table: "mean" only when all temperatures were sampled."""
        whole = set(TEMPERATURES) <= set(self.answers)
        return [*(d for d in ("sampled", "greedy") if d in self.answers), *["mean"] * whole]


def seed_of(folder: Path) -> int:
    """The seed of the folder "seed3" is 3. It is also the seed of the world."""
    return int(folder.name.removeprefix("seed"))


def read_lines(path: Path) -> list[dict]:
    """Reads a .jsonl file that a run of this project wrote."""
    return [value for _, value in require_json(path)]


def tested(folder: Path, system: str, world: World | None = None) -> Tested:
    """Counts the errors of a system's test answers, and of the reference's, by the oracle.

    world: by default the world of the folder's seed.
    """
    world, outputs = world or World(seed_of(folder)), folder / "outputs"
    errors = lambda name: count_errors(world, read_outputs(outputs / f"{name}.json"))
    first, *others = TEMPERATURES
    files = {"sampled": "test", first: "test-t"} | {t: f"test-t-{t}" for t in others}
    files["greedy"] = "test-greedy"
    return Tested({decoding: errors(f"{system}-{name}") for decoding, name in files.items()
                   if (outputs / f"{system}-{name}.json").exists()}, errors("sft-reference"))


def cell(values: list[float]) -> dict:
    """Makes a cell of the values of all seeds.

    The intervals of a single seed are None. NaN is the value of a seed without data; it becomes
    None, and so do the mean and the intervals.
    """
    values = [None if math.isnan(value) else value for value in values]
    if None in values:
        return {"mean": None, "interval": None, "one_more": None, "per_seed": values}
    interval, one_more = over_seeds(values), over_seeds(values, more=1)
    shown = lambda i: None if math.isnan(i.low) else [i.low, i.high]
    return {"mean": interval.mean, "interval": shown(interval), "one_more": shown(one_more),
            "per_seed": values}


def difference(label: str, ours: list[list[float]], theirs: list[list[float]]) -> dict:
    """Returns the paired difference of two win rates.

    ours, theirs: the preferences of each seed, prompt by prompt. The interval is over seeds; for a
    single seed it is over the prompts.
    """
    by_prompt = [[a - b for a, b in zip(x, y)] for x, y in zip(ours, theirs)]
    per_seed = [sum(d) / len(d) for d in by_prompt]
    interval = over_seeds(per_seed) if len(per_seed) > 1 else bootstrap(by_prompt[0])
    return {"label": label, "mean": interval.mean, "interval": [interval.low, interval.high],
            "per_seed": per_seed}


def dev_curve(folder: Path, system: str) -> list[tuple[int, float, float, float]]:
    """Reads (episodes, training seconds, dev win rate, dev errors) of each dev evaluation."""
    seconds = {t["step"]: t["seconds"] for t in read_lines(folder / system / "timing.jsonl")}
    return [(int(m["rollout/episodes"]), seconds[m["step"]], m["eval/win_rate"], m["eval/errors"])
            for m in read_lines(folder / system / "metrics.jsonl") if "eval/win_rate" in m]


def first_reaching(curve: list[tuple], win_rate: float) -> tuple[float, float]:
    """Finds (episodes, seconds) when the curve first reaches `win_rate`; infinite if never."""
    return next(((e, s) for e, s, w, _ in curve if w >= win_rate), (math.inf, math.inf))


def speed(folders: list[Path], method: str, reward_model: str) -> dict:
    """Compares what the baseline and a method need, averaged over seeds, by two definitions.

    To the baseline's best dev win rate of the same seed; and, as the paper has it, each to its own
    best. The training of the reward models is a row of its own and is in no other.
    """
    baseline, rows = "rlhf", {}
    add = lambda label, a, b: rows.setdefault(label, []).append((a, b))
    for folder in folders:
        ours, theirs = dev_curve(folder, method), dev_curve(folder, baseline)
        best = max(point[2] for point in theirs)
        own = max(point[2] for point in ours)
        for k, unit in enumerate(("episodes", "seconds")):
            target = f"{unit} to the best of {SYSTEMS[baseline][0]}"
            add(target, first_reaching(theirs, best)[k], first_reaching(ours, best)[k])
        for k, unit in enumerate(("episodes", "seconds")):
            add(f"{unit} to its own best", first_reaching(theirs, best)[k],
                first_reaching(ours, own)[k])
        trained = [read_object(folder / name / "done.json")["seconds"]
                   for name in ("rm-sequence", reward_model)]
        add("seconds for the reward model", *trained)
    table = []
    for label, values in rows.items():
        theirs, ours = zip(*values)
        reached = math.inf not in ours
        table.append({"label": label, "baseline": sum(theirs) / len(theirs),
                      "method": sum(ours) / len(ours) if reached else "not in every run",
                      "ratio": cell([a / b for a, b in values]) if reached else None})
    names = [SYSTEMS[baseline][0], SYSTEMS[method][0]]
    return {"label": f"{names[1]}, dev win rates", "names": names, "rows": table}


def curves(folders: list[Path], systems: list[str]) -> list[dict]:
    """Reads the dev win rate of the PPO runs, and their reward and KL per response."""
    result = []
    for folder in folders:
        for system in systems:
            points = dev_curve(folder, system) if (folder / system).exists() else []
            if not points:                                          # not PPO
                continue
            head = {"system": system, "label": SYSTEMS[system][0], "seed": seed_of(folder)}
            episodes, seconds, win_rates, _ = map(list, zip(*points))
            result.append(head | {"metric": "win_rate", "x_episodes": episodes,
                                  "x_seconds": seconds, "y": win_rates})
            lines = read_lines(folder / system / "metrics.jsonl")
            for metric, unit in (("reward", 1), ("kl_k1", "rollout/length")):
                result.append(head | {"metric": metric, "y": [
                    line[f"rollout/{metric}"] * line.get(unit, 1) for line in lines],
                    "x_episodes": [int(line["rollout/episodes"]) for line in lines]})
    return result


def reward_models(folders: list[Path]) -> dict:
    """Reads the accuracies and AUCs of the reward models on held-out edits and ordinary pairs."""
    table = {}
    for name, label in REWARD_MODELS.items():
        if (folders[0] / name / "done.json").exists():
            done = [read_object(folder / name / "done.json") for folder in folders]
            table[name] = {"label": label, "metrics": {
                new: cell([math.nan if d.get(old) is None else d[old] for d in done])
                for old, new in REWARD_METRICS.items() if any(old in d for d in done)}}
    return table


def sweep_table(folders: list[Path]) -> dict:
    """Reads the best dev win rate of every point of the sweep."""
    roles = {"rlhf-": "baseline", "fine-grained-": "method", "imitation-": "rival",
             "dpo-sft-": "rival", "rloo-": "rival", "grpo-": "rival", "tlcr-": "rival",
             "dpo-edits-": "rival", "dpo-pairs-": "rival"}
    runs = sorted({run.name for folder in folders for run in folder.iterdir()
                   if run.name.startswith(tuple(roles))})
    return {run: {"label": run, "role": next(role for start, role in roles.items()
                                             if run.startswith(start)),
                  "metrics": {"best_dev_win_rate": cell([dev_win_rate(folder, run)
                                                         for folder in folders])}}
            for run in runs}


def dev_win_rate(folder: Path, run: str) -> float:
    """The best dev win rate of a PPO run, or that of the last policy of another run."""
    done = read_object(folder / run / "done.json")
    if "best_dev_win_rate" in done:
        return done["best_dev_win_rate"]
    world, outputs = World(seed_of(folder)), folder / "outputs"
    errors, reference = (count_errors(world, read_outputs(outputs / f"{name}.json"))
                         for name in (f"{run}-dev", "sft-dev"))
    preferences = compare(errors, reference)
    return sum(preferences) / len(preferences)


def figures(folders: list[Path], system: str, runs: list[Tested]) -> dict[str, list[float]]:
    """The figures of one system by name, one value per seed."""
    mean = lambda values: sum(values) / len(values)
    metrics = {"win_rate": [mean(t.preferences("sampled")) for t in runs],
               "errors": [mean(t.answers["sampled"]) for t in runs],
               "perfect": [mean([n == 0 for n in t.answers["sampled"]]) for t in runs],
               "ceiling": [mean([1.0 if n else 0.5 for n in t.reference]) for t in runs]}
    if "greedy" in runs[0].answers:
        metrics["win_rate_greedy"] = [mean(t.preferences("greedy")) for t in runs]
        metrics["errors_greedy"] = [mean(t.answers["greedy"]) for t in runs]
    if "mean" in runs[0].decodings:
        for decoding in ("mean", *TEMPERATURES):
            metrics[f"win_rate_{decoding}"] = [mean(t.preferences(decoding)) for t in runs]
    done = [read_object(path) for folder in folders
            if (path := folder / system / "done.json").exists()]
    for name in ("best_dev_win_rate", "best_iteration", "episodes", "seconds"):
        if len(done) == len(folders) and name in done[0]:
            metrics[name] = [d[name] for d in done]
    return metrics


def advantages(folders: list[Path]) -> dict:
    """Reads how well rewards and GAE agree with measured advantages (simulate/advantages.py)."""
    if not (folders[0] / "advantages.json").exists():
        return {}
    found = [read_object(folder / "advantages.json") for folder in folders]
    labels = {f"{name}/reward": label for name, label in REWARD_MODELS.items()}
    table = {}
    for name in found[0]["estimates"]:
        label = next((label for end, label in labels.items() if name.endswith("/" + end)), name)
        same = [next(table for other, table in one["estimates"].items()
                     if other.split("/")[-2:] == name.split("/")[-2:]) for one in found]
        table[label] = {"label": label, "metrics": {
            metric: cell([estimates.get(metric, math.nan) for estimates in same])
            for metric in ("correlation", "sign", *(f"correlation/{p}" for p in PLACES))}}
    table["ceiling"] = {"label": "highest that the measurement allows", "metrics": {
        "correlation": cell([one["ceiling"] for one in found])}}
    return table


def by_annotations(folders: list[Path]) -> list[dict]:
    """Reads the win rates of the systems that were trained on fewer annotations, and on all."""
    win_rates = lambda run: cell([sum(p) / len(p) for p in (
        tested(folder, run).preferences("sampled") for folder in folders)])
    names = ("rlhf", "fine-grained", "imitation", "dpo-sft")
    return [{"annotations": count, "systems": {
        SYSTEMS[name][0]: win_rates(name + suffix) for name in names}}
        for count, suffix in [*((n, f"-{n}") for n in FEWER), (ANNOTATIONS, "")]]


def worth(rows: list[dict]) -> list[str]:
    """Says how many pairs PPO-RLHF needs for the win rate that the method has with N edits.

    rows: of by_annotations. Between two numbers of pairs the win rate is taken as linear in their
    logarithm.
    """
    names = [SYSTEMS[name][0] for name in ("rlhf", "fine-grained")]
    theirs, ours = ([row["systems"][name]["mean"] for row in rows] for name in names)
    counts, sentences = [row["annotations"] for row in rows], []
    for count, win_rate in zip(counts, ours):
        told = f"With {count:,} edits, {names[1]} wins {100 * win_rate:.1f}%: "
        if win_rate > max(theirs):
            told += (f"more than {names[0]} with up to {counts[-1]:,} pairs "
                     f"({100 * max(theirs):.1f}%), so an edit is worth more than "
                     f"{counts[-1] / count:.3g} pairs.")
        elif win_rate <= theirs[0]:
            told += f"no more than {names[0]} with {counts[0]:,} pairs ({100 * theirs[0]:.1f}%)."
        else:
            after = next(i for i, y in enumerate(theirs) if y >= win_rate)
            share = (win_rate - theirs[after - 1]) / (theirs[after] - theirs[after - 1])
            pairs = counts[after - 1] * (counts[after] / counts[after - 1]) ** share
            told += (f"as {names[0]} with about {pairs:,.0f} pairs, so an edit is worth about "
                     f"{pairs / count:.2g} pairs.")
        sentences.append(told)
    return sentences


def editors_wording(folders: list[Path], systems: list[str]) -> dict:
    """The share of sentences in test answers that have the wording of the editor with a style."""
    def share(folder: Path, system: str) -> float:
        answers = read_outputs(folder / "outputs" / f"{system}-test.json")
        other, own = wordings("\n".join(answer.output for answer in answers))
        return own / (other + own) if other + own else math.nan
    if "fine-grained-style" not in systems:
        return {}
    return {system: {"label": SYSTEMS[system][0], "metrics": {
        "editors_wording": cell([share(folder, system) for folder in folders])}}
        for system in WORDED if system in systems}


def reading(systems: dict, comparisons: list[dict]) -> list[str]:
    """Says in sentences what the first figures mean: both losses, the baseline, the rivals."""
    points = lambda value: f"{100 * value:+.1f}"
    sentences = []
    for a, b in COMPARED[:4]:
        (name, _), (rival, _) = SYSTEMS[a], SYSTEMS[b]
        rates = [100 * systems[s]["metrics"]["win_rate"]["mean"] for s in (a, b)]
        told = []
        for decoding in ("sampled", "greedy"):
            found = next(c for c in comparisons
                         if (c["systems"], c["decoding"]) == ([a, b], decoding))
            low, high = found["interval"]
            told.append(f"the same {decoding}" if low == high == 0 else
                        f"{points(found['mean'])} points [{points(low)}, {points(high)}] {decoding}"
                        + (", which may be chance" if low <= 0 <= high else ""))
        sentences.append(f"{name} wins {rates[0]:.1f}% of the test prompts against a sample of the "
                         f"SFT policy, {rival} {rates[1]:.1f}%: {told[0]}; {told[1]}.")
    ceiling = systems["sft"]["metrics"]["ceiling"]["mean"]
    sentences.append(f"No system can win more than {100 * ceiling:.1f}%, because against a perfect "
                     "answer of the SFT policy the best is a tie.")
    seeds = len(comparisons[0]["per_seed"])
    sentences.append(f"The intervals are over {seeds} seeds, each with its own world." if seeds > 1
                     else "The intervals are over the test prompts of one seed. Another seed has "
                     "another world, and its figures differ by more.")
    return sentences


def collect(profile: str, folders: list[Path]) -> dict:
    """Collects everything that the table and the report show."""
    head = {"profile": profile, "seeds": [seed_of(folder) for folder in folders], "notes": NOTES}
    if profile == "sweep":
        return head | {"systems": sweep_table(folders), "reward_models": reward_models(folders)}
    present = [s for s in SYSTEMS if (folders[0] / "outputs" / f"{s}-test.json").exists()]
    if any(SYSTEMS[system][1] == "imperfect editor" for system in present):
        head["notes"] = [*NOTES, IMPERFECT_EDITORS]
    tests = {system: [tested(folder, system) for folder in folders] for system in present}
    systems = {}
    for system, runs in tests.items():
        label, role = SYSTEMS[system]
        metrics = {name: cell(values) for name, values in figures(folders, system, runs).items()}
        systems[system] = {"label": label, "role": role, "metrics": metrics}
    by = lambda system, decoding: [t.preferences(decoding) for t in tests[system]]
    comparisons = [{"systems": [a, b], "decoding": decoding} | difference(
                       f"{SYSTEMS[a][0]} minus {SYSTEMS[b][0]}, {decoding}",
                       by(a, decoding), by(b, decoding))
                   for a, b in COMPARED if {a, b} <= set(present)
                   for decoding in tests[a][0].decodings if decoding in tests[b][0].decodings]
    head["reading"] = reading(systems, comparisons)
    head["signs"] = [f"{SYSTEMS[s][0]}, seed {seed_of(folder)}: {sign}" for s in present
                     for folder in folders for sign in signs_of_run(folder / s)]
    if profile == "annotations":
        head["by_annotations"] = by_annotations(folders)
        head["reading"] += worth(head["by_annotations"])
    return head | {"systems": systems, "reward_models": reward_models(folders),
                   "advantages": advantages(folders), "wordings": editors_wording(folders, present),
                   "comparisons": comparisons,
                   "paper": PAPER,
                   "speed": [speed(folders, method, reward_model) for method, reward_model in
                             (("fine-grained-paper", "rm-paper"), ("fine-grained", "rm-token"))],
                   "curves": curves(folders, present),
                   "examples": examples(folders[0], {s: SYSTEMS[s][0] for s in present})}
