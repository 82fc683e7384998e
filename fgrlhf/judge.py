"""Judges say which of two answers is better (paper, section 3.2); the policy gives the answers.

A judge takes AlpacaEval outputs of a system and of a reference on the same prompts. It returns one
preference per prompt: 1 (the system wins), 0.5 (tie) or 0. Their mean is the win rate. The judges
here are a reward model and recorded annotations. fgrlhf/simulate/oracle.py has the oracle of the
built-in world, fgrlhf/collect/judge.py asks a language model.
"""

import json

import torch
from tqdm import tqdm

from fgrlhf.data.fields import UserError
from fgrlhf.data.readers import read_annotations
from fgrlhf.data.records import Annotation, Output, Prompt
from fgrlhf.encode import encode_prompt, encode_response
from fgrlhf.engine.draws import generator
from fgrlhf.evaluate import compare
from fgrlhf.model import LLaMA
from fgrlhf.reward import RewardModel
from fgrlhf.rollout import sample
from fgrlhf.sequences import pack
from fgrlhf.tokenizer import Tokenizer


def answers(policy: LLaMA, tokenizer: Tokenizer, prompts: list[Prompt], template: str,
            max_new_tokens: int, temperature: float, seed: int, name: str = "policy",
            batch: int = 256, purpose: str = "answers") -> list[Output]:
    """Answers each prompt once, in batches of similar length. Temperature 0 is greedy.

    Answers that are compared must not share random numbers: give another seed or another purpose.
    """
    room = policy.config.max_seq_len - max_new_tokens
    ids = [encode_prompt(tokenizer, prompt, template, room) for prompt in prompts]
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch):
        rows = order[start:start + batch]
        rollout = sample(policy, [ids[i] for i in rows], tokenizer.eos_id, max_new_tokens,
                         temperature, generator(seed, purpose, start))
        tokens, prompt_lengths, lengths = rollout.sequences
        for row, i in enumerate(rows):
            response = tokens[row, prompt_lengths[row]:prompt_lengths[row] + lengths[row]].tolist()
            texts[i] = tokenizer.decode(response).strip()
    return [Output(prompt.prompt, text, name,
                   other=(("input", json.dumps(prompt.input)),) if prompt.input else ())
            for prompt, text in zip(prompts, texts)]


def check_same_prompts(system: list[Output], reference: list[Output]) -> None:
    """Raises UserError unless both lists answer the same instructions in the same order."""
    if [o.instruction for o in system] != [o.instruction for o in reference]:
        raise UserError(f"outputs: expected the {len(reference)} instructions of the reference in "
                        f"the same order, got {len(system)} others; "
                        "write both from one prompt file")


@torch.no_grad()
def by_reward(model: RewardModel, tokenizer: Tokenizer, template: str, system: list[Output],
              reference: list[Output]) -> list[float]:
    """The preferences of a reward model: the answer with the higher R(x, y) wins."""
    check_same_prompts(system, reference)
    context, rewards = model.trunk.config.max_seq_len, []
    for output in tqdm([*system, *reference], desc="judge", leave=False):
        record = Prompt("output", output.instruction, input_of(output))
        prompt = encode_prompt(tokenizer, record, template, context - 1)
        ids = encode_response(tokenizer, output.output, prompt, context)
        rewards.append(model.sequence_rewards(pack([prompt], [ids], device=model.device)).item())
    return compare([-r for r in rewards[:len(system)]], [-r for r in rewards[len(system):]])


def by_annotations(path: str) -> list[float]:
    """Recorded judgements of output_1 against output_2, as preferences for output_2's system."""
    return preferences_of(read_annotations(path))


def preferences_of(annotations: list[Annotation]) -> list[float]:
    """1 where the system of output_2 wins, 0.5 for a tie, 0 where it loses."""
    return [{1: 0.0, None: 0.5, 2: 1.0}[a.winner] for a in annotations]


def input_of(output: Output) -> str | None:
    """Returns the `input` of an AlpacaEval output, or None."""
    return json.loads(dict(output.other).get("input", "null")) or None
