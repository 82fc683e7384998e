"""The profile study: one knob of the world or of its annotators at a time, in four steps or more.

Every step trains five systems: PPO-RLHF, the method with the paper's loss and with ours, SFT on the
edits, and DPO + SFT on them. A knob has one step that changes nothing; this step is the same for
all knobs and runs once per seed. World, SFT model and the two answers to each prompt are shared by
all steps of a knob that changes only the annotators.

    OUT/seed0/NAME                    the step that changes nothing
    OUT/seed0/NAME-miss-0.4           the same stage at another step

The runs are shorter than those of the other profiles, so that the whole study takes a night: fewer
annotations, fewer PPO iterations, fewer prompts. Figures of this profile must therefore be compared
only with one another. STUDY.md has the questions and the commands.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fgrlhf.data.fields import UserError
from fgrlhf.reproduce.stages import DPO, IMITATION, Seed, begin, multiply_rates, rate_factor

ANNOTATIONS = 400               # annotated prompts of each step
ANSWERED = 5000                 # prompts with two answers: enough when most of them are left out
FEW_ANSWERED = 1200             # in the worlds of other knobs, where nobody leaves any out
ITERATIONS = 20                 # of every PPO run
SIZES = ("--train", str(ANSWERED), "--dev", "100", "--test", "300")
LONGEST = ("--max-new-tokens", "96")    # of answers to longer requests
SYSTEMS = ("rlhf", "fine-grained-paper", "fine-grained", "imitation", "dpo-sft")


class Knob(NamedTuple):
    """One thing that the study changes, and the values that it gets."""

    title: str
    axis: str                           # what the numbers of `steps` are
    steps: tuple[str, ...]
    default: str                        # the step that changes nothing
    flag: str = ""                      # of `fgrlhf.simulate annotate`, or LR; "": of the world
    edits_only: bool = False            # labels stay as they are, and so does PPO-RLHF


SHARES = ("0", "0.25", "0.5", "1")
LR = "--lr"                             # the knob multiplies the learning rates
KNOBS = {
    "held-out": Knob("Facts that no edit mentions", "share of facts and sums that the annotators "
                     "never see", ("0", "0.1", "0.2", "0.4"), "0", "--unseen"),
    "miss": Knob("An editor who misses errors", "probability that the editor misses an error",
                 ("0", "0.25", "0.5", "0.75"), "0", "--miss", True),
    "harmful": Knob("An editor who does harm", "probability that an edit puts in a wrong value",
                    SHARES, "0", "--harmful", True),
    "needless": Knob("Needless edits", "probability that an edit swaps a wording",
                     SHARES, "0", "--needless", True),
    "style": Knob("An editor with a style", "probability that an edit brings all sentences into "
                  "one wording", SHARES, "0", "--style", True),
    "rewrite": Knob("Rewrites in place of minimal edits", "share of edits that keep nothing",
                    SHARES, "0", "--rewrite", True),
    "taste": Knob("Annotators who disagree", "share of labels and edits that follow the taste of "
                  "one of two groups", SHARES, "0", "--taste"),
    "noise": Knob("Noise in the labels", "share of labels that a coin decides", SHARES, "0",
                  "--noise"),
    "longer": Knob("Annotators who like length", "share of labels that the longer answer wins",
                   SHARES, "0", "--longer"),
    "annotations": Knob("Fewer annotations", "annotated prompts", ("50", "100", "200", "400"),
                        str(ANNOTATIONS), "--limit"),
    "lands": Knob("More facts", "lands, with six facts each", ("6", "12", "24", "48"), "12"),
    "errors": Knob("Errors per answer", "factor of the share of facts with a fixed mistake",
                   ("0.5", "0.75", "1", "1.5"), "1"),
    "strength": Knob("Strength of the errors", "factor of the probability of every mistake and "
                     "habit", ("0.4", "0.7", "1", "1.25"), "1"),
    "items": Knob("Longer answers", "most facts of a request", ("3", "4", "5", "6"), "4"),
    "coupled": Knob("Errors that spread", "share of lands and units where an error makes later "
                    "items wrong", SHARES, "0"),
    "size": Knob("Model size", "million parameters", ("0.1", "0.4", "1.6", "6.5"), "0.4"),
    "rates": Knob("Learning rates", "factor of every learning rate but that of SFT",
                  ("0.25", "0.5", "1", "2", "4"), "1", LR),
}
PRESET = {"0.1": "tiny-48", "0.4": "tiny", "1.6": "tiny-192", "6.5": "tiny-384"}
APART = ("size", "rates")               # only by --only


class Point(NamedTuple):
    """One step of a knob for one seed: where its runs are."""

    folder: Path
    tag: str                            # the end of the names of its runs
    world: str                          # as --world names it
    edits_only: bool = False

    def run(self, name: str) -> str:
        """The name of the run of a system or reward model. Steps share what does not change."""
        shared = name == "sft" or self.edits_only and name in ("rlhf", "rm-sequence")
        return name if shared else name + self.tag


def chosen(only: str | None) -> dict[str, Knob]:
    """Returns the knob of --only, or all knobs but those APART."""
    if only is None:
        return {name: knob for name, knob in KNOBS.items() if name not in APART}
    if only not in KNOBS:
        raise UserError(f"--only {only}: expected one of {', '.join(KNOBS)}")
    return {only: KNOBS[only]}


def point(folder: Path, name: str, value: str) -> Point:
    """The step `value` of the knob `name`. folder: of the seed.

    A knob of the annotators has its runs in that folder, and one of the world in a folder next to
    it.
    """
    knob, world = KNOBS[name], folder.name.removeprefix("seed")
    if value == knob.default:
        return Point(folder, "", world)
    if knob.flag:
        return Point(folder, f"-{name}-{value}", world, knob.edits_only)
    spec = world if name in APART else f"{world},{name}={value}"
    return Point(folder.with_name(f"{folder.name}-{name}-{value}"), "", spec)


def plan(seed: Seed, names: Iterable[str]) -> None:
    """Adds the stages of one seed: what all steps share, then every step of the named knobs."""
    start(seed, ANSWERED)
    add_step(seed, "")
    for name in names:
        knob = KNOBS[name]
        for value in knob.steps:
            if value == knob.default:
                continue
            at = point(seed.folder, name, value)
            if knob.flag == LR:
                before = len(seed.stages)
                add_step(seed, at.tag)
                seed.stages[before:] = [multiply_rates(stage, float(value))
                                        for stage in seed.stages[before:]]
                continue
            if knob.flag:
                add_step(seed, at.tag, knob.flag, value, edits_only=knob.edits_only)
                continue
            other = copy.copy(seed)
            other.stages = []
            other.folder, other.world = at.folder, at.world
            other.longest = LONGEST if name == "items" else ()
            other.init = PRESET[value] if name == "size" else seed.init
            start(other, FEW_ANSWERED)
            add_step(other, "")
            factor = rate_factor(other.init) if name == "size" else 1
            seed.stages += [multiply_rates(stage, factor) for stage in other.stages]


def start(seed: Seed, answered: int) -> None:
    """Adds what the steps of a world share: SFT model, answers, and how reward models are judged.

    The held-out edits are right, whatever the annotators do. They are of the test prompts, because
    there are more of them, and the figures of reward models choose nothing.
    """
    begin(seed, answered, *SIZES)
    seed.test("sft", "sft/policy", "sft")
    seed.outputs("sft-reference", "sft/policy", "test", "--seed", "8", needs=("sft",))
    seed.annotate("held-out", "sft-test", "sft-reference", "--spans", "--skip-ties")


def add_step(seed: Seed, tag: str, *annotator: str, edits_only: bool = False) -> None:
    """Adds annotations, reward models and the five systems. annotator: options of `annotate`.

    edits_only: the labels do not change, so reward model and policy of PPO-RLHF are there already.
    """
    held_out, annotations = "held-out", f"annotations{tag}"
    seed.annotate(annotations, "first", "second", "--skip-ties", "--limit", str(ANNOTATIONS),
                  *annotator)
    if "--unseen" in annotator:                     # the same edits, with other types of errors
        held_out += tag
        seed.annotate(held_out, "sft-test", "sft-reference", "--spans", "--skip-ties", *annotator)
    edits, pairs = f"{annotations}/edits.jsonl", f"{annotations}/pairs.jsonl"
    for system, reward, data, settings, *options in (
            ("rlhf", "rm-sequence", pairs, seed.rlhf, "--kind", "sequence", "--epochs", "3"),
            ("fine-grained-paper", "rm-paper", edits, seed.paper, "--loss", "paper"),
            ("fine-grained", "rm-token", edits, seed.method)):
        if edits_only and system == "rlhf":
            continue
        seed.reward(reward + tag, data, *options, held_out=held_out)
        seed.ppo(system + tag, reward + tag, *settings, iterations=ITERATIONS)
    seed.directly(f"dpo-sft{tag}", "fgrlhf.dpo", edits, *DPO)
    seed.directly(f"imitation{tag}", "fgrlhf.sft", edits, *IMITATION)
