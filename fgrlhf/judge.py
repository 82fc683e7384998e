"""Judges say which of two answers is better (paper, section 3.2); the policy gives the answers.

A judge takes AlpacaEval outputs of a system and of a reference on the same prompts. It returns one
preference per prompt, in [0, 1]: 1 when the system wins, 0.5 for a tie, or None when the judgement
failed. Their mean is the win rate (evaluate.win_rates). The judges here are a reward model and
recorded annotations. fgrlhf/simulate/oracle.py has the oracle of the built-in world,
fgrlhf/collect/judge.py asks a language model.
"""

import dataclasses
import json
import math
import sys
from collections import Counter

import torch
from tqdm import tqdm

from fgrlhf.data.fields import UserError, show
from fgrlhf.data.outputs import input_of, passages_of, prompt_key
from fgrlhf.data.records import Annotation, Output, Prompt, normalise_whitespace
from fgrlhf.encode import Encoder, encode_prompt
from fgrlhf.engine.draws import generator
from fgrlhf.engine.encoding import Encoding
from fgrlhf.evaluate import compare, constant
from fgrlhf.model import LLaMA
from fgrlhf.prompts import same_prompts
from fgrlhf.reward import RewardModel
from fgrlhf.rollout import sample
from fgrlhf.sequences import by_length, pack
from fgrlhf.templates import end_of_turn, find_template, shows_context
from fgrlhf.tokenizer import Tokenizer

TOGETHER = 16                       # answers per forward pass where they share long prompts


def answers(policy: LLaMA, tokenizer: Tokenizer, prompts: list[Prompt], template: str,
            max_new_tokens: int, temperature: float, seed: int, name: str = "policy",
            batch: int = 256, purpose: str = "answers",
            counts: Counter | None = None, progress: bool = False) -> list[Output]:
    """Answers each prompt once, in batches of similar length. Temperature 0 is greedy.

    An answer ends at EOS, or before the control token that ends a turn of the template. `counts`
    counts the "answers", and those that are "cut" at `max_new_tokens` before they end. `progress`
    shows a bar in a terminal.

    Answers that are compared must not share random numbers: give another seed or another purpose.
    Raises FloatingPointError when the policy's log-probabilities are not finite.
    """
    room = policy.config.max_seq_len - max_new_tokens
    ids = [encode_prompt(tokenizer, prompt, template, room) for prompt in prompts]
    texts, end = [""] * len(prompts), end_of_turn(tokenizer, template)
    order = sorted(range(len(prompts)), key=lambda i: len(ids[i]))
    for start in tqdm(range(0, len(order), batch), desc="answers", leave=False,
                      disable=None if progress else True):          # None: only in a terminal
        rows = order[start:start + batch]
        rollout = sample(policy, [ids[i] for i in rows], tokenizer.eos_id, max_new_tokens,
                         temperature, generator(seed, purpose, start))
        if not rollout.logp_old.isfinite().all():
            raise FloatingPointError("log-probabilities of the answers: expected finite numbers, "
                                     f"got others at temperature {temperature:g}; try temperature "
                                     "0 or 1, or another checkpoint of the policy")
        tokens, prompt_lengths, lengths = rollout.sequences
        for row, i in enumerate(rows):
            response = tokens[row, prompt_lengths[row]:prompt_lengths[row] + lengths[row]].tolist()
            if end in response:                                     # a turn that ends without EOS
                response = response[:response.index(end)]
            elif counts is not None:
                counts["cut"] += bool(rollout.truncated[row])
            texts[i] = tokenizer.decode(response).strip()
    if counts is not None:
        counts["answers"] += len(prompts)
    return [answer_to(prompt, text, name) for prompt, text in zip(prompts, texts)]


# ----- outputs and their prompts ------------------------------------------------------------------

def answer_to(prompt: Prompt, text: str, name: str) -> Output:
    """Returns the output of the system `name`. It keeps the prompt's other fields but its id."""
    context = [dataclasses.asdict(passage) for passage in prompt.context]
    return Output(prompt.prompt, text, name, other=tuple(
        (field, json.dumps(value)) for field, value in (
            ("input", prompt.input), ("context", context), ("dataset", prompt.dataset)) if value))


def prompt_of(output: Output, template: str) -> Prompt:
    """Returns the prompt that an output answers, with the passages when `template` shows them."""
    shown = template and shows_context(template)
    passages = passages_of(output) if shown else ()
    return Prompt(output.instruction[:60], output.instruction, input_of(output), passages)


def check_same_prompts(system: list[Output], reference: list[Output], template: str = "") -> None:
    """Raises UserError unless both lists answer the same prompts in the same order.

    template: of the prompts, when their passages count, because the template shows them.
    """
    if list(map(prompt_key, system)) != list(map(prompt_key, reference)):
        raise UserError(f"outputs: expected the {len(reference)} instructions of the reference in "
                        f"the same order, got {len(system)} others; join them first")
    for ours, theirs in zip(system, reference):
        if prompt_of(ours, template).context != prompt_of(theirs, template).context:
            raise UserError(f"outputs: expected the same context as in the reference, because the "
                            f"template {find_template(template).name} shows it, got another for "
                            f"{show(ours.instruction)}; answer both from one prompt file")


# ----- judges -------------------------------------------------------------------------------------

def encode_outputs(model: RewardModel, tokenizer: Tokenizer, encoding: Encoding,
                   outputs: list[Output]) -> tuple[list[list[int]], list[list[int]]]:
    """Returns the ids of the prompts and of the answers, as `encoding` made ids in training.

    stderr says how many prompts lost their beginning, as in training, and how many answers are
    cut, because they do not fit the model's context.
    """
    context = model.trunk.config.max_seq_len
    encoder = Encoder(tokenizer, context, encoding.template, encoding.prompt_tokens, True)
    text_of = lambda text: normalise_whitespace(text)[0] if encoding.normalise else text
    ids, prompts, answers = {}, [], []
    for output in outputs:
        record = prompt_of(output, encoding.template)
        if record not in ids:                       # several answers share a prompt
            ids[record] = encoder.prompt(record)
        prompts.append(ids[record])
        answers.append(encoder.response(record, text_of(output.output), prompts[-1]))
    if cut := encoder.counts["prompts_cut"]:
        print(f"{cut} of {len(ids)} prompts lost their beginning, because the reward model was "
              f"trained with --prompt-tokens {encoding.prompt_tokens}", file=sys.stderr)
    if cut := encoder.counts["responses_cut"]:
        print(f"{cut} of {len(outputs)} answers do not fit the reward model's context of {context} "
              "tokens and are judged by their beginning", file=sys.stderr)
    return prompts, answers


@torch.no_grad()
def rewards_of(model: RewardModel, tokenizer: Tokenizer, encoding: Encoding,
               outputs: list[Output]) -> tuple[list[float], list[list[int]]]:
    """Returns R(x, y) of each answer, on the model's own scale, and the ids that the model saw.

    Answers are judged one at a time, or several together where they share long prompts.

    Raises FloatingPointError when a reward is not finite.
    """
    if not outputs:             # a batch needs at least one row
        return [], []
    prompts, seen = encode_outputs(model, tokenizer, encoding, outputs)
    rows = list(zip(map(tuple, prompts), map(tuple, seen)))
    different = list(dict.fromkeys(rows))       # equal answers get the same reward to the last bit
    batch, found = pack(*zip(*different)), {}
    shared = same_prompts(batch.tokens, batch.prompt_lengths, int(batch.lengths.sum())) is not None
    groups = by_length(batch, list(range(len(different))), TOGETHER if shared else 1)
    for group in tqdm(groups, desc="judge", leave=False):
        part = batch.rows(group).to(model.device)
        found |= zip((different[i] for i in group.tolist()), model.sequence_rewards(part).tolist())
    rewards = [found[row] for row in rows]
    if not all(map(math.isfinite, rewards)):
        raise FloatingPointError("rewards: expected finite numbers, got "
                                 f"{next(r for r in rewards if not math.isfinite(r))}; check the "
                                 "reward model's weights")
    return rewards, seen


def best_of(model: RewardModel, tokenizer: Tokenizer, encoding: Encoding,
            tries: list[list[Output]]) -> list[Output]:
    """Returns the answer with the highest R(x, y) to each prompt (best-of-n).

    tries: n lists of answers to the same prompts in the same order.
    """
    rewards, _ = rewards_of(model, tokenizer, encoding, [o for one in tries for o in one])
    prompts = range(len(tries[0]))
    best = [max(range(len(tries)), key=lambda k: rewards[k * len(prompts) + i]) for i in prompts]
    return [tries[k][i] for i, k in enumerate(best)]


def by_reward(model: RewardModel, tokenizer: Tokenizer, encoding: Encoding, system: list[Output],
              reference: list[Output]) -> list[float | None]:
    """The preferences of a reward model: the answer with the higher R(x, y) wins.

    Prompts and answers become ids by `encoding`, as the records did that the model was trained on.
    An answer that does not fit the model's context is judged by its beginning. Two different
    answers of which the model sees the same beginning give None. stderr says how many prompts and
    answers are cut, and when the model is constant.
    """
    check_same_prompts(system, reference, encoding.template)
    n = len(system)
    rewards, seen = rewards_of(model, tokenizer, encoding, [*system, *reference])
    differ = [ours.output != theirs.output for ours, theirs in zip(system, reference)]
    summed = model.kind == "token" and model.response == "sum"
    lengths = list(map(len, seen)) if summed else None
    if any(differ) and (said := constant(rewards, lengths)):
        print(said, file=sys.stderr)
    preferences = compare([-r for r in rewards[:n]], [-r for r in rewards[n:]])
    return [None if differ[i] and seen[i] == seen[n + i] and seen[i][-1] != tokenizer.eos_id
            else preferences[i] for i in range(n)]


def preferences_of(annotations: list[Annotation]) -> list[float | None]:
    """The preferences for the system of output_2 in recorded judgements: `preference` - 1.

    AlpacaEval's 0 is a tie, like 1.5. Its null is a judgement that failed, and gives None.
    """
    return [None if a.preference is None else (a.preference or 1.5) - 1 for a in annotations]
