"""Chooses the texts that the report shows, from one seed: rewards of tokens, edits, answers.

The first prompts and records of each file are shown, however they turned out. The only texts chosen
by their outcome are the answers that became worse, and their number is shown with them.
"""

from pathlib import Path

import torch

from fgrlhf.align import align
from fgrlhf.checkpoint import load_model, load_tokenizer
from fgrlhf.data.readers import read_edits, read_outputs
from fgrlhf.data.records import Edit, Output, Prompt
from fgrlhf.encode import encode_prompt
from fgrlhf.explain.explained import (
    Explained, LossSettings, UpdateSettings, explain_record, settings_of)
from fgrlhf.reward import RewardModel, load_reward
from fgrlhf.sequences import pack
from fgrlhf.simulate.oracle import count_errors
from fgrlhf.simulate.world import World
from fgrlhf.tokenizer import Tokenizer


def examples(folder: Path, names: dict[str, str], count: int = 6) -> dict:
    """Returns the examples of the report (report.py has their form), at most `count` of each.

    names: the name of each system, by its key.
    """
    world = World(int(folder.name.removeprefix("seed")))
    tokenizer = load_tokenizer(folder / "sft/policy")
    model = load_reward(folder / "rm-token/reward")
    answers = {system: read_outputs(folder / f"outputs/{file}.json") for system, file in (
        ("sft", "sft-reference"), ("rlhf", "rlhf-test"), ("fine-grained", "fine-grained-test"))}
    edits = read_edits(folder / "annotations/edits.jsonl")[:count]
    return {"heat_maps": [heat_map(world, tokenizer, model, answers[system][n], names[system])
                          for n in range(count // 2) for system in answers],
            "edits": [changes(tokenizer, edit) for edit in edits],
            "explained": explain_edit(folder, tokenizer, model),
            "before_after": before_after(world, answers["sft"], answers["fine-grained"],
                                         [names["sft"], names["fine-grained"]], count)}


def before_after(world: World, before: list[Output], after: list[Output], labels: list[str],
                 count: int) -> list[dict]:
    """Returns the answers to the first test prompts, and those that became worse."""
    rows = [{"prompt": a.instruction, "before": a.output, "before_errors": n, "after": b.output,
             "after_errors": m} for a, b, n, m in
            zip(before, after, count_errors(world, before), count_errors(world, after))]
    worse = [row for row in rows if row["after_errors"] > row["before_errors"]]
    groups = [(f"The first {min(count, len(rows))} test prompts, whatever the answers are. The "
               "oracle counts the errors.", rows),
              (f"Where the answer became worse: {len(worse)} of {len(rows)} test prompts. These "
               "are the first of them.", worse)]
    return [{"caption": caption, "labels": labels, "rows": chosen[:count]}
            for caption, chosen in groups if chosen]


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of each token, with its blank in front."""
    text = tokenizer.decode(ids)
    return [" EOS" if i == tokenizer.eos_id else text[start:end] or " "
            for i, (start, end) in zip(ids, tokenizer.spans(ids))]


def heat_map(world: World, tokenizer: Tokenizer, model: RewardModel, output: Output,
             name: str) -> dict:
    """One answer with the calibrated reward of each token, and the tokens inside an error."""
    prompt = encode_prompt(tokenizer, Prompt("test", output.instruction), "plain", 10 ** 6)
    ids = tokenizer.encode(output.output, eos=True)
    with torch.no_grad():
        rewards = model.ppo_rewards(pack([prompt], [ids]))[0].tolist()
    errors = world.errors(output.instruction, output.output)
    wrong = [any(max(e.start, start) < min(e.end, end) for e in errors)
             for start, end in tokenizer.spans(ids)]
    return {"prompt": output.instruction, "label": name, "tokens": pieces(tokenizer, ids),
            "rewards": rewards, "errors": wrong}


def changes(tokenizer: Tokenizer, edit: Edit) -> dict:
    """One edit with the tokens that the alignment calls changed."""
    original, edited = (tokenizer.encode(text, eos=True) for text in (edit.original, edit.edited))
    aligned = align(original, edited)
    return {"prompt": edit.prompt, "original_tokens": pieces(tokenizer, original),
            "original_changed": aligned.original_changed,
            "edited_tokens": pieces(tokenizer, edited), "edited_changed": aligned.edited_changed}


def explain_edit(folder: Path, tokenizer: Tokenizer, model: RewardModel) -> list[Explained]:
    """Explains the first held-out edit that repairs two errors, as `python -m fgrlhf.explain` does.

    The list is empty when there is no such edit.
    """
    edit = next((e for e in read_edits(folder / "held-out/edits.jsonl") if len(e.spans or ()) > 1),
                None)
    if edit is None:
        return []
    loss = settings_of(LossSettings, folder / "rm-token/reward")
    update = settings_of(UpdateSettings, folder / "fine-grained/best")
    policy, reference = (load_model(folder / "sft/policy") for _ in range(2))
    return [explain_record(edit, tokenizer, model, loss, policy, reference, update)]
