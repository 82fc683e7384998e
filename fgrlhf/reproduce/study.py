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

from pathlib import Path
from typing import NamedTuple

from fgrlhf.data.fields import UserError
from fgrlhf.reproduce.stages import DPO, IMITATION, Seed, begin

ANNOTATIONS = 400               # annotated prompts of each step
ANSWERED = 5000                 # prompts with two answers: enough when most of them are left out
ITERATIONS = 20                 # of every PPO run
SIZES = ("--train", str(ANSWERED), "--dev", "100", "--test", "300")
SYSTEMS = ("rlhf", "fine-grained-paper", "fine-grained", "imitation", "dpo-sft")


class Knob(NamedTuple):
    """One thing that the study changes, and the values that it gets."""

    title: str
    axis: str                           # what the numbers of `steps` are
    flag: str                           # of `fgrlhf.simulate annotate`
    steps: tuple[str, ...]
    default: str                        # the step that changes nothing


KNOBS = {
    "held-out": Knob("Facts that no edit mentions", "share of facts and sums that the annotators "
                     "never see", "--unseen", ("0", "0.1", "0.2", "0.4"), "0"),
}


class Point(NamedTuple):
    """One step of a knob for one seed: where its runs are."""

    folder: Path
    tag: str                            # the end of the names of its runs

    def run(self, system: str) -> str:
        """The name of the run of a system. All steps share the SFT model."""
        return system if system == "sft" else system + self.tag


def chosen(only: str | None) -> dict[str, Knob]:
    """Returns the knob of --only, or all knobs."""
    if only is None:
        return KNOBS
    if only not in KNOBS:
        raise UserError(f"--only {only}: expected one of {', '.join(KNOBS)}")
    return {only: KNOBS[only]}


def point(folder: Path, name: str, value: str) -> Point:
    """The step `value` of the knob `name` in the folder of a seed."""
    return Point(folder, "" if value == KNOBS[name].default else f"-{name}-{value}")


def plan(seed: Seed, only: str | None = None) -> None:
    """Adds the stages of one seed: what all steps share, then every step of the knobs."""
    begin(seed, ANSWERED, *SIZES)
    seed.test("sft", "sft/policy", "sft")
    seed.outputs("sft-reference", "sft/policy", "test", "--seed", "8", needs=("sft",))
    add_step(seed, "")
    for name, knob in chosen(only).items():
        for value in knob.steps:
            if value != knob.default:
                add_step(seed, point(seed.folder, name, value).tag, knob.flag, value)


def add_step(seed: Seed, tag: str, *annotator: str) -> None:
    """Adds annotations, reward models and the five systems. annotator: options of `annotate`."""
    held_out, annotations = f"held-out{tag}", f"annotations{tag}"
    seed.annotate(annotations, "first", "second", *annotator, "--skip-ties", "--limit",
                  str(ANNOTATIONS))
    # test prompts, because there are more of them and the figures of reward models choose nothing
    seed.annotate(held_out, "sft-test", "sft-reference", *annotator, "--spans", "--skip-ties")
    edits, pairs = f"{annotations}/edits.jsonl", f"{annotations}/pairs.jsonl"
    for system, reward, data, settings, *options in (
            ("rlhf", "rm-sequence", pairs, seed.rlhf, "--kind", "sequence", "--epochs", "3"),
            ("fine-grained-paper", "rm-paper", edits, seed.paper, "--loss", "paper"),
            ("fine-grained", "rm-token", edits, seed.method)):
        seed.reward(reward + tag, data, *options, held_out=held_out)
        seed.ppo(system + tag, reward + tag, *settings, iterations=ITERATIONS)
    seed.directly(f"dpo-sft{tag}", "fgrlhf.dpo", edits, *DPO)
    seed.directly(f"imitation{tag}", "fgrlhf.sft", edits, *IMITATION)
