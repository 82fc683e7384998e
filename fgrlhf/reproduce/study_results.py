"""Collects the figures of the profile study for results.json: every knob, every step, every system.

    knobs   {name: {title, axis, steps: [{value, highest, systems, lead, reward_models, facts}]}}

    highest         cell: the win rate of answers without an error. It is below 1, because they tie
                    with a sample of the SFT model that has none either
    systems         {system: {metric: cell}}    as in the other profiles (results.py)
    lead            {system: {decoding: cell}}  its win rate minus that of PPO-RLHF, paired by seed
    reward_models   {reward model: {metric: cell}}
    facts           {system: {"seen", "unseen"}: cell}      only of the knob held-out

A fact or sum that a test prompt asks for is wrong in an answer that does not state it, or that
states another value. `facts` has the share that is wrong, among the facts that some edit could
mention and among those that no annotator saw.
"""

import math
from pathlib import Path

from fgrlhf.checks.signs import signs_of_run
from fgrlhf.data.files import read_object
from fgrlhf.data.readers import read_outputs
from fgrlhf.data.records import Output
from fgrlhf.evaluate import compare
from fgrlhf.reproduce import study
from fgrlhf.reproduce.names import SYSTEMS as NAMES
from fgrlhf.reproduce.results import cell, difference, seed_of, tested
from fgrlhf.reproduce.study import ANNOTATIONS, ITERATIONS, SYSTEMS, Knob, Point, chosen, point
from fgrlhf.simulate.world import World

REWARDS = {"rm-sequence": "PPO-RLHF", "rm-paper": "paper's loss", "rm-token": "our loss"}
MEASURED = {"edits/pair_accuracy": "edit_accuracy", "pairs/pair_accuracy": "pair_accuracy",
            "edits/token_auc_within": "token_auc_within", "edits/token_auc/value": "auc_seen",
            "edits/token_auc/unseen": "auc_unseen"}
NOTES = [f"Every step has {ANNOTATIONS} annotated prompts and {ITERATIONS} PPO iterations, fewer "
         "than the other profiles. Compare these figures only with one another.",
         "The settings of all systems are those of the other profiles at every step of a knob; no "
         "setting was chosen again.",
         "A win rate compares the answers to test prompts with one fixed sample of the SFT model; "
         "the oracle judges. A lead is a win rate minus that of PPO-RLHF at the same step."]


def wrong_facts(world: World, outputs: list[Output], unseen: set[tuple]) -> dict[str, float]:
    """Returns the share of the requested facts that are wrong, for seen and unseen facts.

    The share is NaN where no prompt asks for such a fact.
    """
    asked, wrong = {"seen": 0, "unseen": 0}, {"seen": 0, "unseen": 0}
    for output in outputs:
        bad = {e.key for e in world.errors(output.instruction, output.output)
               if e.kind in ("value", "missing")}
        for item in world.items(output.instruction):
            place = "unseen" if item.key in unseen else "seen"
            asked[place] += 1
            wrong[place] += item.key in bad
    return {place: wrong[place] / n if n else math.nan for place, n in asked.items()}


def facts(points: list[Point], share: float) -> dict[str, dict]:
    """Returns the shares of wrong facts of every system, as cells."""
    table = {}
    for system in ("sft", *SYSTEMS):
        found = []
        for at in points:
            world = World(at.world)
            outputs = read_outputs(at.folder / "outputs" / f"{at.run(system)}-test.json")
            found.append(wrong_facts(world, outputs, world.unseen(share)))
        table[system] = {place: cell([f[place] for f in found]) for place in found[0]}
    return table


def rewards(points: list[Point]) -> dict[str, dict]:
    """Reads what the reward models of a step are worth, on held-out edits and pairs."""
    table = {}
    for name in REWARDS:
        done = [read_object(at.folder / at.run(name) / "done.json") for at in points]
        table[name] = {new: cell([math.nan if d.get(old) is None else d[old] for d in done])
                       for old, new in MEASURED.items() if any(old in d for d in done)}
    return table


def step(knob: str, value: str, points: list[Point]) -> dict:
    """Collects one step of a knob. points: one of each seed.

    A sign of trouble names its run, which several steps may share.
    """
    tests = {system: [tested(at.folder, at.run(system), World(at.world)) for at in points]
             for system in ("sft", *SYSTEMS)}
    mean = lambda values: sum(values) / len(values)
    by = lambda system, decoding: [t.preferences(decoding) for t in tests[system]]
    samples = [runs.reference for runs in tests["sft"]]
    highest = cell([mean(compare([0] * len(sample), sample)) for sample in samples])
    systems, lead = {}, {}
    for system, runs in tests.items():
        systems[system] = {
            "win_rate": cell([mean(p) for p in by(system, "sampled")]),
            "win_rate_greedy": cell([mean(p) for p in by(system, "greedy")]),
            "errors": cell([mean(t.answers["sampled"]) for t in runs]),
            "seconds": cell([read_object(at.folder / at.run(system) / "done.json")["seconds"]
                             for at in points])}
    for system in SYSTEMS[1:]:
        lead[system] = {decoding: difference("", by(system, decoding), by("rlhf", decoding))
                        for decoding in ("sampled", "greedy")}
    found = {"value": value, "highest": highest, "systems": systems, "lead": lead,
             "reward_models": rewards(points)}
    found["signs"] = [f"{NAMES[system][0]}, run {at.folder.name}/{at.run(system)}: {sign}"
                      for system in SYSTEMS for at in points
                      for sign in signs_of_run(at.folder / at.run(system))]
    return found | ({"facts": facts(points, float(value))} if knob == "held-out" else {})


def collect_knob(folders: list[Path], name: str, knob: Knob) -> dict:
    """Collects every step of a knob."""
    return {"title": knob.title, "axis": knob.axis, "default": knob.default, "steps": [
        step(name, value, [point(folder, name, value) for folder in folders])
        for value in knob.steps]}


def complete(folders: list[Path], name: str, knob: Knob) -> bool:
    """Returns True if every step of the knob has the answers of every system."""
    return all((at.folder / "outputs" / f"{at.run(system)}-test-greedy.json").exists()
               for folder in folders for value in knob.steps
               for at in [point(folder, name, value)] for system in SYSTEMS)


def collect(folders: list[Path], only: str | None = None) -> dict:
    """Collects everything that the table and the report show.

    These are the knobs of this call, and those of earlier calls in the same folder.
    """
    asked = chosen(only)
    knobs = {name: collect_knob(folders, name, knob) for name, knob in study.KNOBS.items()
             if name in asked or complete(folders, name, knob)}
    return {"profile": "study", "seeds": [seed_of(folder) for folder in folders], "notes": NOTES,
            "labels": {system: NAMES[system][0] for system in ("sft", *SYSTEMS)},
            "signs": list(dict.fromkeys(sign for knob in knobs.values() for step in knob["steps"]
                                        for sign in step.pop("signs"))), "knobs": knobs}
