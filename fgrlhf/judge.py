"""Who says which of two answers is better, and the answers they are asked about.

Each judge takes AlpacaEval outputs of a system and of a reference on the same prompts and gives one
preference a prompt: 1 (the system wins), 0.5 (tie), 0. Their mean is the win rate.
"""

import json
from contextlib import closing
from dataclasses import dataclass

import torch
from tqdm import tqdm

from fgrlhf.collecting import llm
from fgrlhf.collecting.client import Client, Unanswered
from fgrlhf.config import UserError
from fgrlhf.edits import Annotation, Edit, Output, Prompt
from fgrlhf.encode import PreferenceIds, encode_prompt, encode_response, span_types
from fgrlhf.evaluate import Judged, compare
from fgrlhf.model import LLaMA
from fgrlhf.readers import read_annotations, read_outputs, read_prompts
from fgrlhf.reward import RewardModel
from fgrlhf.rollout import pack, sample
from fgrlhf.run import generator
from fgrlhf.world import World

JUDGE_PROMPT = "judge-1"                          # in fgrlhf/prompts


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
        judged.append(Judged(record.id, chosen, rejected, pair.change, rewards, types,
                             (len(pair.chosen), len(pair.rejected)) if model.kind == "token"
                             else None))
    return judged


@torch.no_grad()
def by_reward(model: RewardModel, tokenizer, template: str, system: list[Output],
              reference: list[Output]) -> list[float]:
    """Preferences of a reward model: the higher R(x, y) wins."""
    same_prompts(system, reference)
    context, rewards = model.trunk.config.max_seq_len, []
    for outputs in (system, reference):
        for output in tqdm(outputs, desc="judge", leave=False):
            record = Prompt("output", output.instruction, input_of(output))
            prompt = encode_prompt(tokenizer, record, template, context - 1)
            ids = encode_response(tokenizer, output.output, prompt, context)
            batch = pack([prompt], [ids], device=model.head.weight.device)
            rewards.append(model.sequence_rewards(batch).item())
    return compare([-r for r in rewards[:len(system)]], [-r for r in rewards[len(system):]])


def by_annotations(path: str) -> list[float]:
    """Recorded judgements of output_1 against output_2, as preferences for output_2's system."""
    return preferences_of(read_annotations(path))


def verdict(text: str) -> float:
    """1, 2 or 1.5 (tie) in a language model's answer; raises Flaw for any other."""
    better = llm.parse_object(text, "better")["better"]
    if better not in ("first", "second", "tie"):
        raise llm.Flaw('better must be "first", "second" or "tie"')
    return {"first": 1.0, "second": 2.0, "tie": 1.5}[better]


def by_llm(client: Client, system: list[Output],
           reference: list[Output]) -> list[Annotation | None]:
    """Judgements of a language model: output_1 is the reference's, output_2 the system's.

    Each pair is shown in both orders, since models favour a place; `preference` is the mean of the
    two, 1 .. 2, so that contradictory verdicts are a tie and one tie leaves the other to decide.
    Equal answers tie unasked. None: no usable verdict after asking twice. Raises UserError where
    questions are left unanswered; the client's cache keeps the others for the next run.
    """
    same_prompts(system, reference)
    prompt = llm.load_prompt(JUDGE_PROMPT)

    def judge(i: int) -> Annotation | None:
        ours, theirs = system[i], reference[i]
        shown = {"instruction": ours.instruction, "input": input_of(ours)}
        verdicts = [1.5]
        if ours.output != theirs.output:
            verdicts = [llm.ask(client, prompt, llm.tagged(**shown, first=first.output,
                                                           second=second.output), verdict).value
                        for first, second in ((theirs, ours), (ours, theirs))]
            if None in verdicts:
                return None
            verdicts[1] = 3 - verdicts[1]
        return Annotation(ours.instruction, theirs.output, ours.output,
                          sum(verdicts) / len(verdicts), theirs.generator, ours.generator,
                          client.model, input_of(ours))

    judged, problem = {}, ""
    with closing(client.gather(range(len(system)), judge)) as found:
        for i, result in tqdm(found, desc="judge", total=len(system), leave=False):
            if isinstance(result, Unanswered):
                problem = str(result)
            else:
                judged[i] = result
    if left := len(system) - len(judged):
        raise UserError(f"--judge llm: {left} of {len(system)} pairs are left unanswered "
                        f"({problem or client.stopped_by}); start again for those")
    return [judged[i] for i in range(len(system))]


def input_of(output: Output) -> str | None:
    """The `input` that an AlpacaEval output carries beside its instruction."""
    return json.loads(dict(output.other).get("input", "null")) or None


def preferences_of(annotations: list[Annotation]) -> list[float]:
    """For output_2's system: 1 where it wins, 0.5 tie, 0."""
    return [{1: 0.0, None: 0.5, 2: 1.0}[a.winner] for a in annotations]
