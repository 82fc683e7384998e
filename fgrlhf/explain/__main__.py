"""Shows one record in every equation of the method, with all numbers (paper, sections 2.1, 2.2).

    python -m fgrlhf.explain --reward runs/quick/seed0/rm-token/reward \
        --record runs/quick/seed0/held-out/edits.jsonl:edit-2 \
        --policy runs/quick/seed0/fine-grained/best

The first part has both texts with the changes marked, every token with its reward, and equations
(1) to (4) with their numbers. The second part takes the original as a response of the policy. It
has equations (5) to (7) for each token: KL, advantage, ratio and clip, before and after one update
on this response only.

The settings of the loss and of PPO come from the runs that wrote the two folders (config.json in
the folder above). Without --policy, the policy is the model from which the reward model was
trained; the KL is then 0.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fgrlhf.checkpoint import load_model, load_tokenizer
from fgrlhf.data.fields import UserError
from fgrlhf.data.files import read_object
from fgrlhf.data.readers import read_preferences
from fgrlhf.data.records import Edit, Pair
from fgrlhf.engine.config import arg, parse, run
from fgrlhf.engine.encoding import check_encoding
from fgrlhf.engine.places import HTML, refuse_outputs
from fgrlhf.engine.states import fingerprint
from fgrlhf.explain.explained import (
    Explained, LossSettings, UpdateSettings, config_of, explain_record, has_settings, settings_of,
    trained_from)
from fgrlhf.explain.text import explained_text
from fgrlhf.reproduce.report import write_report
from fgrlhf.reward import describe_reward, load_reward
from fgrlhf.templates import template_arg

# The settings of the loss, equation (4).
LOSS = ("unit", "credit_gap", "reduce", "u0", "u0_weight", "token_weight", "pair_weight")


@dataclass(frozen=True)
class Config:
    reward: str = arg(help="folder of a token-level reward model")
    record: str = arg(help="FILE or FILE:ID, a file of edits or pairs; without ID the first record")
    policy: str | None = arg(None, help="model folder of the policy (default: the model from "
                                        "which the reward model was trained)")
    reference: str | None = arg(None, help="model folder of the frozen reference (default: the "
                                           "model from which the policy was trained, or the "
                                           "policy itself)")
    template: str | None = template_arg(None, "template of the prompt (default: that of the "
                                              "reward model)")
    cut_responses: bool = arg(False, help="cut a response that does not fit the model's context "
                              "(default: as in the training of the reward model)")
    html: str | None = arg(None, help="also write an HTML page with the same contents to this file")


def split_place(place: str) -> tuple[str, str]:
    """Splits "FILE" or "FILE:ID" into file and id. Both parts may contain colons."""
    parts = place.split(":")
    cuts = [k for k in range(len(parts), 0, -1) if Path(":".join(parts[:k])).is_file()]
    if not cuts:
        raise UserError(f"--record {place}: expected FILE or FILE:ID, found no such file; "
                        "check the path")
    return ":".join(parts[:cuts[0]]), ":".join(parts[cuts[0]:])


def find(place: str, normalise: bool) -> Edit | Pair:
    """Finds the record of "FILE" or "FILE:ID"."""
    path, wanted = split_place(place)
    records = read_preferences(path, normalise=normalise)
    if not wanted:
        return records[0]
    for record in records:
        if record.id == wanted:
            return record
    raise UserError(f"--record {path}: found no record {wanted!r} with two different texts; choose "
                    f"one of its {len(records)} ids, the first is {records[0].id!r}")


def start_of(folder: str, name: str, start: str | None) -> str | None:
    """Returns `start`, the model from which the run that wrote `folder` was trained, or None.

    `name` is its flag in that run, and its entry in done.json. Raises UserError when the model is
    no longer there, or is no longer the one that the run started from.
    """
    if start is None:
        return None
    run = Path(folder).resolve().parent
    done = read_object(run / "done.json") if (run / "done.json").is_file() else {}
    fault = None if Path(start).exists() else "is not there"
    if not fault and name in (before := done.get("inputs", {})):
        fault = None if fingerprint(start) == before[name] else "has changed since"
    if fault:
        raise UserError(f"{run / 'config.json'}: the run started from --{name} {start}, which "
                        f"{fault}; restore it, or give --policy and --reference")
    return start


def policy_folders(config: Config, settings: LossSettings) -> tuple[str, str] | None:
    """Finds the folders (policy, reference), or None when there is no policy.

    A reward model whose start is not there any more is explained without a policy, and a line on
    stderr says so. A policy is never explained against another reference than its own.
    """
    policy = config.policy
    if policy is None:
        try:
            policy = start_of(config.reward, "model", settings.model)
        except UserError as error:
            print(f"without a policy: {error}", file=sys.stderr)
        return policy and (policy, config.reference or policy)
    return policy, config.reference or start_of(policy, *trained_from(policy)) or policy


def explain(config: Config) -> tuple[Explained, dict[str, str]]:
    """Explains the record. Returns the explanation and the folders used, by name."""
    if describe_reward(config.reward)["kind"] != "token":
        raise UserError(f"--reward {config.reward}: expected a token-level reward model, got a "
                        "sequence-level one; train one with train_rm.py --kind token")
    settings, tokenizer = settings_of(LossSettings, config.reward), load_tokenizer(config.reward)
    if config.template:
        check_encoding(config.reward, template=config.template)
        settings = settings._replace(template=config.template)
    if config.cut_responses:
        settings = settings._replace(cut_responses=True)
    record, used = find(config.record, settings.normalise), {"reward": config.reward}
    folders = policy_folders(config, settings) or ()
    used |= dict(zip(("policy", "reference"), folders))
    refuse_outputs([("--html", config.html, HTML)], [
        ("--record", split_place(config.record)[0]),
        *((f"--{name}", folder) for name, folder in used.items()),
        *(("the settings of a run", config_of(folder)[0]) for folder in used.values())])
    if not has_settings(LossSettings, config.reward):
        print(f"{config.reward}: in the folder above there is no config.json of train_rm.py, so "
              "the settings of its loss are not known; the loss is shown with the defaults "
              + ", ".join(f"{name} {getattr(settings, name)}" for name in LOSS), file=sys.stderr)
    reward = load_reward(config.reward, "cpu", torch.float32).requires_grad_(False)
    if not folders:
        return explain_record(record, tokenizer, reward, settings), used
    for name, folder in used.items():
        if load_tokenizer(folder).sha256 != tokenizer.sha256:
            raise UserError(f"--{name} {folder}: expected the tokenizer of --reward "
                            f"{config.reward}, got another; choose models of the same run")
        check_encoding(folder, template=settings.template)
    if config.policy and not has_settings(UpdateSettings, config.policy):
        method = config_of(config.policy)[1].get("method")
        print(f"{config.policy}: " + (
            f"--method {method} trained it, whose advantages are not those of the equations here"
            if method else "in the folder above there is no config.json of train_ppo.py")
            + ", so equations (5) to (7) are shown with the default settings of PPO and with the "
            f"reference {used['reference']}", file=sys.stderr)
    policy, reference = (load_model(folder, "cpu", torch.float32) for folder in folders)
    update = settings_of(UpdateSettings, folders[0])
    return explain_record(record, tokenizer, reward, settings, policy, reference, update), used


def main(config: Config) -> None:
    explained, used = explain(config)
    if config.html:
        write_report(config.html, {"examples": {"explained": [explained]}})
    print("\n".join(f"{name:10}{folder}" for name, folder in used.items()) + "\n")
    print(explained_text(explained, sys.stdout.isatty() and "NO_COLOR" not in os.environ), end="")
    if explained.update is None:
        print("\nEquations (5) to (7) need a policy; give its folder with --policy.")
    if config.html:
        print(f"\n{config.html}")


if __name__ == "__main__":
    run(lambda: main(parse(Config, __doc__)))
