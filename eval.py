r"""Evaluate policies and reward models (the paper, section 3.2).

    python eval.py outputs      --policy DIR --prompts FILE --out A.json
    python eval.py win-rate     --outputs A.json --reference B.json --judge oracle --world 0
    python eval.py win-rate     --outputs A.json --reference B.json --judge reward --reward DIR
    python eval.py win-rate     --outputs A.json --reference B.json --judge llm --model NAME \
                                --judgements FILE
    python eval.py win-rate     --judge annotations --annotations FILE
    python eval.py reward-model --reward DIR --data FILE

outputs writes answers in AlpacaEval's format. win-rate asks a judge which of two answers is better:
the oracle of the built-in world, a reward model, a language model, or judgements that somebody
recorded. reward-model measures the accuracy on pairs, and the token AUC where records have spans.

Figures go to stdout as one JSON object, progress to stderr. A win rate is the mean of 1 (win), 1/2
(tie) and 0 (loss) over prompts, with a 95% bootstrap interval over prompts.
"""

import json
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import fgrlhf                               # before torch: it sets how OpenMP's threads wait
import torch

from fgrlhf.checkpoint import load_model, load_tokenizer
from fgrlhf.collect.cache import Cache
from fgrlhf.collect.client import Client, Options
from fgrlhf.collect.judge import by_llm
from fgrlhf.data.fields import UserError
from fgrlhf.data.files import each
from fgrlhf.data.readers import read_outputs, read_prompts
from fgrlhf.data.records import Output, write_jsonl, write_outputs
from fgrlhf.encode import TEMPLATES, ReadingRecords, encode_preferences, encode_prompt, read_encoded
from fgrlhf.engine.config import Computation, arg, dispatch, run
from fgrlhf.engine.distributed import pick_device
from fgrlhf.evaluate import bootstrap, reward_table
from fgrlhf.judge import answers, by_annotations, by_reward, preferences_of
from fgrlhf.reward import judge_preferences, load_reward
from fgrlhf.simulate.oracle import by_oracle
from fgrlhf.simulate.world import World


@dataclass(frozen=True, kw_only=True)
class OutputsConfig(ReadingRecords, Computation):
    policy: str = arg(help="model folder")
    prompts: str = arg(help="prompts to answer")
    out: str = arg(help="file for the answers, in AlpacaEval's model_outputs.json format")
    greedy_out: str | None = arg(None, help="also write greedy answers to this file")
    max_new_tokens: int = arg(64, least=1, help="longest answer")
    temperature: float = arg(1.0, least=0, help="0 is greedy")
    seed: int = arg(0, help="seed of the sampling")
    limit: int | None = arg(None, least=1, help="answer only the first N prompts")
    batch: int = arg(256, least=1, help="prompts decoded together")


@dataclass(frozen=True, kw_only=True)
class WinRateConfig(Computation, Options):
    judge: str = arg(choices=("oracle", "reward", "llm", "annotations"), help="who decides")
    outputs: str | None = arg(None, help="the system's answers")
    reference: str | None = arg(None, help="the reference's answers to the same prompts")
    world: int | None = arg(None, help="oracle: seed of the built-in world")
    reward: str | None = arg(None, help="reward: folder of the reward model")
    template: str = arg("plain", choices=tuple(TEMPLATES),
                        help="reward: how a record becomes a prompt")
    annotations: str | None = arg(None, help="annotations: recorded judgements of output_1 against "
                                             "output_2; the win rate is output_2's")
    judgements: str | None = arg(None, help="llm: file for its judgements, as --annotations reads "
                                            "them; its answers are cached in the same folder")
    seed: int = arg(0, help="seed of the bootstrap")


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(ReadingRecords, Computation):
    reward: str = arg(help="folder of the reward model")
    data: str = arg(help="held-out edits or pairs; token AUC where edits have spans")
    prompt_tokens: int | None = arg(None, least=2, help="keep the last N tokens of a longer prompt "
                                    "(default: refuse it)")
    normalise: bool = arg(False, help="first collapse runs of whitespace in edits")


def outputs(config: OutputsConfig) -> dict:
    device = pick_device(config.device)
    policy = load_model(config.policy, device, getattr(torch, config.dtype))
    tokenizer = load_tokenizer(config.policy)
    prompts = read_prompts(config.prompts, config.on_bad_record)[:config.limit]
    room = policy.config.max_seq_len - config.max_new_tokens
    fitting = lambda prompt: encode_prompt(tokenizer, prompt, config.template, room) and prompt
    prompts = each(prompts, fitting, config.on_bad_record, config.prompts)
    wanted = [(config.out, config.temperature)]
    if config.greedy_out:
        wanted.append((config.greedy_out, 0.0))
    for path, temperature in wanted:
        write_outputs(path, answers(policy, tokenizer, prompts, config.template,
                                    config.max_new_tokens, temperature, config.seed,
                                    str(config.policy), config.batch))
    return {"outputs": len(prompts), "out": [path for path, _ in wanted]}


def asked_llm(config: WinRateConfig, system: list[Output], reference: list[Output]) -> list[float]:
    """The preferences of a language model. Its usable judgements go to --judgements."""
    path = Path(config.judgements)
    asking = Client(config)
    asking.cache = Cache(path.with_name(path.stem + ".cache.jsonl"))
    with closing(asking.cache):
        found = by_llm(asking, system, reference)
    judged = [annotation for annotation in found if annotation]
    if len(judged) < len(found):
        print(f"{len(found) - len(judged)} of {len(found)} pairs left out: no usable verdict after "
              "asking twice", file=sys.stderr)
    if not judged:
        raise UserError("--judge llm: expected verdicts, got not one that is usable; look at "
                        f"{asking.cache.path}")
    write_jsonl(path, judged)
    return preferences_of(judged)


def win_rate(config: WinRateConfig) -> dict:
    needed = {"oracle": ("outputs", "reference", "world"),
              "reward": ("outputs", "reference", "reward"),
              "llm": ("outputs", "reference", "model", "judgements"),
              "annotations": ("annotations",)}[config.judge]
    for name in needed:
        if getattr(config, name) is None:
            raise UserError(f"--judge {config.judge}: expected --{name} too")
    if config.judge == "annotations":
        preferences = by_annotations(config.annotations)
    else:
        system, reference = read_outputs(config.outputs), read_outputs(config.reference)
        if config.judge == "oracle":
            preferences = by_oracle(World(config.world), system, reference)
        elif config.judge == "llm":
            preferences = asked_llm(config, system, reference)
        else:
            model = load_reward(config.reward, pick_device(config.device),
                                getattr(torch, config.dtype))
            preferences = by_reward(model, load_tokenizer(config.reward), config.template,
                                    system, reference)
    interval = bootstrap(preferences, config.seed)
    return {"win_rate": interval.mean, "interval_95": [interval.low, interval.high],
            "judge": config.judge, "wins": preferences.count(1.0), "ties": preferences.count(0.5),
            "losses": preferences.count(0.0)}


def reward_model(config: RewardModelConfig) -> dict:
    model = load_reward(config.reward, pick_device(config.device),
                        getattr(torch, config.dtype))
    tokenizer = load_tokenizer(config.reward)
    encode = lambda records: encode_preferences(records, tokenizer, model.trunk.config.max_seq_len,
                                                config.template, config.prompt_tokens)
    records, examples = read_encoded(config.data, encode, config.normalise, None,
                                     config.on_bad_record)
    return reward_table(judge_preferences(model, records, examples, tokenizer))


if __name__ == "__main__":
    commands = {"outputs": (OutputsConfig, outputs), "win-rate": (WinRateConfig, win_rate),
                "reward-model": (RewardModelConfig, reward_model)}
    printed = lambda action: lambda config: print(json.dumps(action(config)))
    run(lambda: dispatch({name: (config, printed(action))
                          for name, (config, action) in commands.items()}, __doc__))
