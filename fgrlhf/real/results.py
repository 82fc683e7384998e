"""Collects the figures of the profile real for results.json, from the judgements of judge.py.

The statistics of one system are functions of its summaries. With one seed their intervals are from
a bootstrap over articles, the same draws for all systems; with several, Student's t over seeds.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fgrlhf.checkpoint import load_tokenizer
from fgrlhf.checks.signs import signs_of_run
from fgrlhf.data.files import read_object
from fgrlhf.data.readers import read_edits, read_outputs
from fgrlhf.encode import Encoder
from fgrlhf.evaluate import compare
from fgrlhf.real.made_up import made_up
from fgrlhf.real.judge import article_of
from fgrlhf.real.prompts import EVIDENCE, described
from fgrlhf.real.stages import LONGEST, POLICIES, TEST
from fgrlhf.real.tables import REWARDS, analysis_tables, probe_tables, reliability_curves
from fgrlhf.reproduce.examples import changes, pieces
from fgrlhf.reproduce.names import SYSTEMS
from fgrlhf.reproduce.results import cell, read_lines, seed_of
from fgrlhf.reward import load_reward
from fgrlhf.sequences import pack

Rows = dict[str, np.ndarray]        # the figures of judge.py by name, one number per summary

ORDER = ("sft", "rlhf", "fine-grained-paper", "fine-grained", "imitation", "dpo-sft")
PUBLISHED = {"candidates": "DeFacto's summaries (Pegasus)",
             "annotators": "The same, edited by annotators"}
DECODINGS = {"sampled": "", "greedy": "_greedy"}        # and the end of a metric's name
CHANGES = ("made_up", "named", "made_up_rate", "words")         # also relative to SFT
LOGGED = {"reward": lambda line: line["rollout/reward"],        # of metrics.jsonl
          "kl_k1": lambda line: line["rollout/kl_k1"] * line["rollout/length"],
          "length": lambda line: line["rollout/length"]}
DRAWS = 1000
FOUND = {"pair_accuracy": "edit_accuracy", "pair_accuracy_shorter": "shorter",
         "equal_length/pair_accuracy": "equal_length", "edit_auc": "token_auc",
         "edit_auc_within": "token_auc_within"}
NOTES = [
    "DeFacto: summaries of news by a model, and minimal edits of them by people. SmolLM2-135M, a "
    "pretrained LLaMA. Nothing here was built for the method.",
    "Made up: words with a capital or a digit, the first of a sentence aside, that the article "
    "does not have. The rate on DeFacto's val is 37% where an annotator found an error, 12% after "
    "the annotator's edit, and 13% where there was none. These summaries are fluent; samples of "
    "the policies often are not. A summary without names makes nothing up.",
    "The judge is a sequence-level reward model on edits of other summaries, which no other model "
    "has seen. It is of the same form as the reward model of PPO-RLHF, and it takes an answer that "
    "was cut off for a whole one. It likes empty summaries; they count as lost.",
    "Reward models are linear probes on layer 20 of the pretrained model. In fine-grained PPO, EOS "
    "gets no reward (--no-reward-eos); in PPO-RLHF, a response without EOS loses 3 "
    "(--missing-eos-penalty). Two learning rates of each system but SFT were tried, and three "
    "rates and three betas of PPO-RLHF; all else has one setting.",
    "With one seed the intervals are over the articles, for this one training run of each system. "
    "With several seeds they are over seeds, for these articles."]

STATISTICS: dict[str, Callable[[Rows], float]] = {
    "made_up": lambda rows: rows["made_up"].mean(),
    "made_up_any": lambda rows: (rows["made_up"] > 0).mean(),
    "made_up_rate": lambda rows: rows["made_up"].sum() / rows["named"].sum()
    if rows["named"].sum() else math.nan,
    "named": lambda rows: rows["named"].mean(),
    "cut_off": lambda rows: (rows["tokens"] >= int(LONGEST)).mean(),
    "empty": lambda rows: (rows["words"] == 0).mean(),
    "words": lambda rows: rows["words"].mean(),
    "copied": lambda rows: rows["copied"].mean()}


def rows_of(found: list[dict]) -> Rows:
    """Returns the figures of several summaries, by name."""
    return {name: np.array([row[name] for row in found], dtype=float)
            for name in ("reward", "tokens", "named", "made_up", "words", "copied")}


def judged(folder: Path, system: str) -> dict[str, Rows]:
    """Returns the figures of a system's test answers, by decoding. Wins are against SFT's.

    An empty summary loses, or ties with another empty one, because the judge likes empty summaries.
    `win_by_reward` is what the judge says by itself.
    """
    found, start = (read_object(folder / f"judged/{name}.json")["answers"]
                    for name in (system, "sft"))
    result = {}
    for decoding in DECODINGS:
        rows, first = rows_of(found[f"{system}-{decoding}"]), rows_of(start[f"sft-{decoding}"])
        costs = [[-one["reward"], np.where(one["words"] == 0, np.inf, -one["reward"])]
                 for one in (rows, first)]
        by_reward, wins = (np.array(compare(a.tolist(), b.tolist())) for a, b in zip(*costs))
        result[decoding] = rows | {"win": wins, "win_by_reward": by_reward}
    return result


def estimate(seeds: list[tuple[Rows, ...]], statistic: Callable[..., float]) -> dict:
    """Returns the cell of a statistic of one or more systems, given for each seed."""
    found = cell([float(statistic(*systems)) for systems in seeds])
    if len(seeds) > 1:
        return found
    rng, (systems,) = np.random.default_rng(0), seeds
    n = len(next(iter(systems[0].values())))
    draws = [statistic(*({name: values[rows] for name, values in one.items()} for one in systems))
             for rows in rng.integers(0, n, (DRAWS, n))]
    interval = np.percentile(draws, (2.5, 97.5)).tolist()
    return found | {"interval": interval if np.isfinite(interval).all() else None}


def change(ours: float, theirs: float) -> float:
    """Returns ours / theirs - 1, and NaN for 0 of them."""
    return ours / theirs - 1 if theirs else math.nan


def systems_table(tests: dict[str, list[dict[str, Rows]]]) -> dict:
    """Returns the table of the systems. `..._change` is relative to SFT, -0.5 for half."""
    table = {}
    for system, seeds in tests.items():
        label, role = SYSTEMS[system]
        metrics = {}
        for decoding, end in DECODINGS.items():
            own = [(one[decoding],) for one in seeds]
            both = [(one[decoding], sft[decoding]) for one, sft in zip(seeds, tests["sft"])]
            metrics |= {name + end: estimate(own, statistic)
                        for name, statistic in STATISTICS.items()}
            if system == "sft":
                continue
            metrics["win_rate" + end] = estimate(own, lambda rows: rows["win"].mean())
            metrics["win_rate_by_reward" + end] = estimate(
                own, lambda rows: rows["win_by_reward"].mean())
            for name in CHANGES:
                metrics[f"{name}_change{end}"] = estimate(
                    both, lambda ours, sft, of=STATISTICS[name]: change(of(ours), of(sft)))
        table[system] = {"label": label, "role": role, "metrics": metrics}
    return table


def published_table(folder: Path) -> dict:
    """Returns the rows of DeFacto's own summaries and of the annotators' versions of them."""
    found = read_object(folder / "judged/published.json")["answers"]
    return {name: {"label": label, "role": "published", "metrics": {
        metric: estimate([(rows_of(found[name]),)], statistic)
        for metric, statistic in STATISTICS.items() if metric != "cut_off"}}
        for name, label in PUBLISHED.items()}


def comparisons(tests: dict[str, list[dict[str, Rows]]]) -> list[dict]:
    """Returns the differences of the judge's win rates between the methods and the others."""
    result = []
    for ours in ("fine-grained-paper", "fine-grained"):
        for other in ("rlhf", "imitation", "dpo-sft"):
            for decoding in DECODINGS:
                both = [(a[decoding], b[decoding]) for a, b in zip(tests[ours], tests[other])]
                result.append({
                    "systems": [ours, other], "decoding": decoding,
                    "label": f"{SYSTEMS[ours][0]} minus {SYSTEMS[other][0]}, {decoding}"}
                    | estimate(both, lambda a, b: a["win"].mean() - b["win"].mean()))
    return result


def reward_models(folders: list[Path]) -> dict:
    """Returns accuracy and AUC of the reward models on held-out edits, intervals over articles."""
    table = {}
    for name, label in REWARDS.items():
        done = [read_object(folder / name / "done.json") for folder in folders]
        metrics = {}
        for old, new in FOUND.items():
            values = [one.get(f"edits/{old}") for one in done]
            if None not in values:
                metrics[new] = cell(values)
                if len(done) == 1:
                    metrics[new]["interval"] = done[0].get(f"edits/{old}_95")
        table[name] = {"label": label, "metrics": metrics}
    return table


def curves(folders: list[Path]) -> list[dict]:
    """Returns made-up facts and the judge's reward over KL, and reward and KL over episodes."""
    over_kl = {name: STATISTICS[name] for name in ("made_up", "made_up_rate")}
    over_kl["judge"] = lambda rows: rows["reward"].mean()
    result = []
    for folder in folders:
        for system in POLICIES:
            head = {"system": system, "label": SYSTEMS[system][0], "seed": seed_of(folder)}
            samples = read_object(folder / f"judged/{system}.json")["samples"]
            steps = [[row for row in samples if row["step"] == step]
                     for step in sorted({row["step"] for row in samples})]
            rows = [rows_of(some) for some in steps]
            kl = [float(np.mean([row["kl"] for row in some])) for some in steps]
            result += [head | {"metric": name, "x_kl": kl, "y": [
                finite(statistic(one)) for one in rows]} for name, statistic in over_kl.items()]
            lines = read_lines(folder / system / "metrics.jsonl")
            episodes = [int(line["rollout/episodes"]) for line in lines]
            result += [head | {"metric": metric, "x_episodes": episodes, "y": [
                of(line) for line in lines]} for metric, of in LOGGED.items()]
    return result


def finite(value: float) -> float | None:
    """Returns a number that JSON can hold, None for NaN: summaries without names have no rate."""
    return float(value) if math.isfinite(value) else None


def percent(cell: dict) -> str:
    """Writes a change as "-50% [-60, -40]", and "-" without a number."""
    if cell["mean"] is None:
        return "-"
    interval = " [{:+.0f}, {:+.0f}]".format(*(100 * x for x in cell["interval"] or ())) \
        if cell["interval"] else ""
    return f"{100 * cell['mean']:+.0f}%{interval}"


def reading(systems: dict) -> list[str]:
    """Says in sentences what PPO with each reward changed."""
    start = systems["sft"]["metrics"]
    said = [f"The SFT policy makes up {start['made_up']['mean']:.2f} names and numbers per sampled "
            f"summary, {start['made_up_greedy']['mean']:.2f} per greedy one."]
    for system in ORDER[1:]:
        metrics = systems[system]["metrics"]
        pairs = {name: f"{percent(metrics[name + '_change'])} sampled and "
                 f"{percent(metrics[name + '_change_greedy'])} greedy" for name in CHANGES}
        wins = ["{:.1f}% [{:.1f}, {:.1f}]".format(*(100 * x for x in (
            metrics[name]["mean"], *(metrics[name]["interval"] or (math.nan,) * 2))))
            for name in ("win_rate", "win_rate_greedy")]
        said.append(
            f"{systems[system]['label']} changes what is made up by {pairs['made_up']}; names and "
            f"numbers in all by {pairs['named']}; the made-up share of them by "
            f"{pairs['made_up_rate']}; words by {pairs['words']}. By the judge it wins {wins[0]} "
            f"of the samples and {wins[1]} of the greedy summaries against SFT, a tie counting "
            "one half.")
        empty, by_reward = ([100 * metrics[name + end]["mean"] for end in DECODINGS.values()]
                            for name in ("empty", "win_rate_by_reward"))
        if any(empty):
            said[-1] += (" {:.1f}% of the samples and {:.1f}% of the greedy ones are empty, which "
                         "counts as lost; by the judge's reward it would win {:.1f}% and {:.1f}%."
                         ).format(*empty, *by_reward)
    return said


def examples(folder: Path, count: int = 4) -> dict:
    """Returns texts for the report: the first edits of val with token rewards, and answers."""
    edits = read_edits(folder / "data/val-edits.jsonl")[:count]
    models = {name: load_reward(folder / f"{name}/reward") for name in ("rm-paper", "rm-ours")}
    tokenizer = load_tokenizer(folder / "rm-ours/reward")
    encoder = Encoder(tokenizer, models["rm-ours"].trunk.config.max_seq_len, "plain")
    maps = []
    for edit in edits:
        ids = encoder.preference(edit)
        for name, model in models.items():
            rewards = model.ppo_rewards(pack([ids.prompt], [ids.rejected]))[0].tolist()
            maps.append({"prompt": edit.prompt, "label": REWARDS[name], "rewards": rewards,
                         "tokens": pieces(tokenizer, ids.rejected),
                         "errors": [t in ids.removed for t in range(len(ids.rejected))]})
    before, after = (read_outputs(folder / f"outputs/{name}-greedy.json")
                     for name in ("sft", "fine-grained"))
    rows = [{"prompt": a.instruction, "before": a.output, "after": b.output,
             "before_errors": len(made_up(a.output, article_of(a))),
             "after_errors": len(made_up(b.output, article_of(b)))} for a, b in zip(before, after)]
    worse = [row for row in rows if row["after_errors"] > row["before_errors"]]
    labels = [SYSTEMS["sft"][0], SYSTEMS["fine-grained"][0]]
    return {"heat_maps": maps, "underlined": "a token that the annotator took out",
            "edits": [changes(tokenizer, edit) for edit in edits],
            "before_after": [{"caption": caption, "labels": labels, "rows": some[:count + 2]}
                             for caption, some in (
                (f"Greedy summaries of the first of {TEST} articles of val, whatever they are. "
                 "Errors are names and numbers that the article does not have.", rows),
                (f"Where more is made up than before: {len(worse)} of {len(rows)}. These are the "
                 "first of them.", worse)) if some]}


def collect(folders: list[Path], prompt: str = EVIDENCE) -> dict:
    """Collects everything that the table and the report show. prompt: a rule of prompts.py."""
    tests = {system: [judged(folder, system) for folder in folders] for system in ORDER}
    systems = systems_table(tests)
    return {"profile": "real", "seeds": [seed_of(folder) for folder in folders],
            "notes": [NOTES[0], described(prompt), *NOTES[1:]], "reading": reading(systems),
            "systems": systems | published_table(folders[0]),
            "signs": [f"{SYSTEMS[system][0]}, seed {seed_of(folder)}: {sign}" for system in POLICIES
                      for folder in folders for sign in signs_of_run(folder / system)],
            "reward_models": reward_models(folders),
            "tables": probe_tables(folders[0]) + analysis_tables(folders[0]),
            "comparisons": comparisons(tests), "examples": examples(folders[0]),
            "curves": curves(folders) + reliability_curves(folders[0])}
