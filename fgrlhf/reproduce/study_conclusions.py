"""Says at which step of a knob each system stops helping, from the means over seeds.

A lead is a difference of two win rates of the same seeds, of sampled or of greedy answers. A system
is ahead at a step if the mean of its lead over the seeds is above 0. Its lead over PPO-RLHF is gone
from the first step, in the order of the axis, that is not ahead, if no later step is ahead either.
Otherwise the steps that are not ahead are listed. A step may be chance if the 95% interval of its
lead contains 0. A single seed has its interval over prompts, or none where two leads are
subtracted.

The leads over PPO-RLHF say where a system stops helping. The leads of our method over SFT on the
edits and over DPO + SFT say where reinforcement learning pays.
"""

import math
from typing import Sequence

from fgrlhf.reproduce.results import cell
from fgrlhf.reproduce.table import interval_of, is_number

BASELINE, METHOD, RIVALS = "rlhf", "fine-grained", ("imitation", "dpo-sft")
DECODINGS = ("sampled", "greedy")


def conclusions(knob: dict, labels: dict[str, str]) -> list[str]:
    """Returns a sentence per system, and one per rival of our method. knob: of results.json."""
    values = [step["value"] for step in knob["steps"]]
    found: dict[str, list[str]] = {}
    for decoding in DECODINGS:
        leads = {system: [step["lead"][system][decoding] for step in knob["steps"]]
                 for system in knob["steps"][0]["lead"]}
        compared = {f"{labels[system]} against {labels[BASELINE]}": cells
                    for system, cells in leads.items()}
        compared |= {f"{labels[METHOD]} against {labels[rival]}":
                     [_minus(a, b) for a, b in zip(leads[METHOD], leads[rival])]
                     for rival in RIVALS if METHOD in leads and rival in leads}
        for name, cells in compared.items():
            if told := _told(values, cells):
                found.setdefault(name, []).append(f"{decoding}, {told}")
    return [f"{name}: {'; '.join(told)}" for name, told in found.items()]


def _told(values: Sequence[str], cells: Sequence[dict]) -> str:
    """Says at which steps a lead is above 0. cells: one lead per step, perhaps without a mean."""
    known = [(value, lead) for value, lead in zip(values, cells) if is_number(lead["mean"])]
    behind = [value for value, lead in known if lead["mean"] <= 0]
    last = [value for value, _ in known[len(known) - len(behind):]]
    told = ("" if not known else "ahead at every step" if not behind else
            "ahead at no step" if len(behind) == len(known) else
            f"the lead is gone from {behind[0]} on" if behind == last else
            f"not ahead at {', '.join(behind)}")
    chance = [value for value, lead in known
              if (ends := interval_of(lead)) and ends[0] <= 0 <= ends[1]]
    return told + (f" ({', '.join(chance)} may be chance)" if chance else "")


def _minus(ours: dict, theirs: dict) -> dict:
    """Returns the difference of two leads, paired by seed."""
    return cell([a - b if is_number(a) and is_number(b) else math.nan
                 for a, b in zip(ours["per_seed"], theirs["per_seed"])])
