"""Who says which of two answers is better, and the answers they are asked about.

Each judge takes AlpacaEval outputs of a system and of a reference on the same prompts and gives one
preference a prompt: 1 (the system wins), 0.5 (tie), 0. Their mean is the win rate.
"""

import json
from dataclasses import dataclass

import torch
from tqdm import tqdm

from fgrlhf.config import UserError
from fgrlhf.edits import Edit, Output, Prompt
from fgrlhf.encode import PreferenceIds, encode_prompt, encode_response, span_types
from fgrlhf.evaluate import Judged, compare
from fgrlhf.model import LLaMA
from fgrlhf.readers import read_annotations, read_outputs, read_prompts
from fgrlhf.reward import RewardModel
from fgrlhf.rollout import pack, sample
from fgrlhf.run import generator
from fgrlhf.world import World


def answers(policy: LLaMA, tokenizer, prompts: list[Prompt], template: str, max_new_tokens: int,
            temperature: float, seed: int, name: str = "policy", batch: int = 256,
            purpose: str = "answers") -> list[Output]:
    """One output a prompt, in order, by batches of similar length; temperature 0 is greedy.

    Samples that are compared must not share random numbers: another seed, or another purpose.
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


def same_prompts(system: list[Output], reference: list[Output]) -> None:
    """Both lists must answer the same instructions in the same order."""
    if [o.instruction for o in system] != [o.instruction for o in reference]:
        raise UserError(f"outputs: expected the {len(reference)} instructions of the reference in "
                        f"the same order, got {len(system)} others; "
                        "write both from one prompt file")


def count_errors(world: World, outputs: list[Output]) -> list[int]:
    """Errors of each answer by the world's oracle; refuses prompts that another world asked."""
    for output in outputs:
        if not world.items(output.instruction):
            raise UserError(f"outputs: {output.instruction[:60]!r} is no request of world "
                            f"{world.seed}; give the --world the prompts were written with")
    return [len(world.errors(output.instruction, output.output)) for output in outputs]


@dataclass(frozen=True)
class OracleJudge:
    """The built-in world's oracle: fewer errors win."""

    world: World
    prompts: list[Prompt]
    reference_errors: list[int]

    @staticmethod
    def load(world: int, prompts: str, reference: str) -> "OracleJudge":
        judge = OracleJudge(World(world), read_prompts(prompts), [])
        judge.reference_errors.extend(judge.errors(read_outputs(reference)))
        return judge

    def errors(self, outputs: list[Output]) -> list[int]:
        """Errors of each answer."""
        same_prompts(outputs, [Output(p.prompt, "", "") for p in self.prompts])
        return count_errors(self.world, outputs)

    def compare(self, outputs: list[Output]) -> dict[str, float]:
        """Win rate against the reference's answers, and mean errors an answer."""
        errors = self.errors(outputs)
        preferences = compare(errors, self.reference_errors)
        return {"eval/win_rate": sum(preferences) / len(preferences),
                "eval/errors": sum(errors) / len(errors)}


def by_oracle(world: World, system: list[Output], reference: list[Output]) -> list[float]:
    """Preferences of the built-in oracle."""
    same_prompts(system, reference)
    return compare(count_errors(world, system), count_errors(world, reference))


@torch.no_grad()
def judge_preferences(model: RewardModel, records: list, examples: list[PreferenceIds],
                      tokenizer) -> list[Judged]:
    """Rewards of held-out preferences, with the human error spans where the record has them."""
    device, judged = model.head.weight.device, []
    for record, pair in zip(tqdm(records, desc="evaluate", leave=False), examples):
        both = pack([pair.prompt] * 2, [pair.chosen, pair.rejected], device=device)
        rewards, types = [], []
        if model.kind == "token":
            token_rewards = model.token_rewards(both)
            chosen, rejected = token_rewards.sum(-1).tolist()
            if isinstance(record, Edit) and record.spans is not None:
                length = len(pair.rejected) - (pair.rejected[-1] == tokenizer.eos_id)
                rewards = token_rewards[1, :length].tolist()
                types = span_types(tokenizer, pair.rejected[:length], record.spans)
        else:
            chosen, rejected = model.sequence_rewards(both).tolist()
        judged.append(Judged(record.id, chosen, rejected, pair.change, rewards, types))
    return judged


@torch.no_grad()
def by_reward(model: RewardModel, tokenizer, template: str, system: list[Output],
              reference: list[Output]) -> list[float]:
    """Preferences of a reward model: the higher R(x, y) wins."""
    same_prompts(system, reference)
    context, rewards = model.trunk.config.max_seq_len, []
    for outputs in (system, reference):
        for output in tqdm(outputs, desc="judge", leave=False):
            asked = json.loads(dict(output.other).get("input", "null"))
            record = Prompt("output", output.instruction, asked or None)
            prompt = encode_prompt(tokenizer, record, template, context - 1)
            ids = encode_response(tokenizer, output.output, prompt, context)
            batch = pack([prompt], [ids], device=model.head.weight.device)
            rewards.append(model.sequence_rewards(batch).item())
    return compare([-r for r in rewards[:len(system)]], [-r for r in rewards[len(system):]])


def by_annotations(path: str) -> list[float]:
    """Recorded judgements of output_1 against output_2, as preferences for output_2's system."""
    return [{1: 0.0, None: 0.5, 2: 1.0}[a.winner] for a in read_annotations(path)]
