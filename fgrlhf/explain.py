"""One record through the whole method, with every number: what each equation of the paper does.

    python -m fgrlhf.explain --reward runs/quick/seed0/rm-token/reward \
        --record runs/quick/seed0/held-out/edits.jsonl:edit-2 \
        --policy runs/quick/seed0/fine-grained/best

Prints both texts with what changed marked, every token with its reward, equations (1) to (4) with
the numbers filled in; then, with the original as a response of the policy, each token's KL,
advantage, ratio and clip, equations (5) to (7), before and after one update on this response alone.

The settings of the loss and of PPO are those of the runs that wrote the two folders (config.json
beside them). Without --policy it is the model the reward model was trained from, so that the KL is
0. --html writes the same as a page.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fgrlhf.checkpoint import load_model, load_tokenizer
from fgrlhf.config import UserError, arg, parse, run
from fgrlhf.edits import TEMPLATES, Edit, Pair
from fgrlhf.encode import read_preferences
from fgrlhf.report import write_report
from fgrlhf.reporting.worked_text import worked_text
from fgrlhf.reward import load_reward
from fgrlhf.worked import LossSettings, UpdateSettings, Worked, settings_of, work


@dataclass(frozen=True)
class Config:
    reward: str = arg(help="folder of a token-level reward model")
    record: str = arg(help="FILE or FILE:ID: edits or pairs; without an ID the file's first")
    policy: str | None = arg(None, help="model folder of the policy (default: the model that the "
                                        "reward model was trained from)")
    reference: str | None = arg(None, help="model folder of the frozen reference (default: the one "
                                           "the policy was trained from, else the policy)")
    template: str | None = arg(None, choices=tuple(TEMPLATES),
                               help="how a record becomes a prompt (default: the reward model's)")
    html: str | None = arg(None, help="also write the same as an HTML page to this file")


def find(place: str, normalise: bool) -> Edit | Pair:
    """The record of "FILE" or "FILE:ID"; either part may hold colons."""
    parts = place.split(":")
    cuts = [k for k in range(len(parts), 0, -1) if Path(":".join(parts[:k])).is_file()]
    if not cuts:
        raise UserError(f"--record {place}: no such file; expected FILE or FILE:ID")
    path, wanted = ":".join(parts[:cuts[0]]), ":".join(parts[cuts[0]:])
    records = read_preferences(path, normalise)
    if not wanted:
        return records[0]
    for record in records:
        if record.id == wanted:
            return record
    raise UserError(f"--record {path}: no record {wanted!r} with two different texts; "
                    f"its {len(records)} ids begin with {records[0].id!r}")


def policy_folders(config: Config, settings: LossSettings) -> tuple[str, str] | None:
    """(policy, reference), or None where neither the flags nor the runs name one that exists."""
    policy = config.policy or settings.model
    if policy is None or config.policy is None and not Path(policy).exists():
        return None
    start = settings_of(UpdateSettings, policy).policy
    return policy, config.reference or (start if start and Path(start).exists() else policy)


def explain(config: Config) -> tuple[Worked, dict[str, str]]:
    """The record worked through, and which folders it was worked with."""
    reward = load_reward(config.reward, "cpu", torch.float32).requires_grad_(False)
    if reward.kind != "token":
        raise UserError(f"--reward {config.reward}: expected a token-level reward model, got a "
                        "sequence-level one; see train_rm.py --kind")
    settings, tokenizer = settings_of(LossSettings, config.reward), load_tokenizer(config.reward)
    if config.template:
        settings = settings._replace(template=config.template)
    record, used = find(config.record, settings.normalise), {"reward": config.reward}
    if (folders := policy_folders(config, settings)) is None:
        return work(record, tokenizer, reward, settings), used
    used |= dict(zip(("policy", "reference"), folders))
    for name, folder in used.items():
        if load_tokenizer(folder).sha256 != tokenizer.sha256:
            raise UserError(f"--{name} {folder}: its tokenizer is not the one of "
                            f"--reward {config.reward}")
    policy, reference = (load_model(folder, "cpu", torch.float32) for folder in folders)
    update = settings_of(UpdateSettings, folders[0])
    return work(record, tokenizer, reward, settings, policy, reference, update), used


def main(config: Config) -> None:
    worked, used = explain(config)
    if config.html:
        write_report(config.html, {"examples": {"worked": [worked]}})
    sys.stdout.reconfigure(encoding="utf-8")
    print("\n".join(f"{name:10}{folder}" for name, folder in used.items()) + "\n")
    print(worked_text(worked, sys.stdout.isatty() and "NO_COLOR" not in os.environ), end="")
    if worked.update is None:
        print("\nEquations (5) to (7) need a policy: give its folder by --policy.")


if __name__ == "__main__":
    run(lambda: main(parse(Config, prog="python -m fgrlhf.explain", description=__doc__)))
