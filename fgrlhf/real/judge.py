"""Judges summaries by what did not train them: a reward model on other edits, and made-up facts.

    python -m fgrlhf.real.judge --reward DIR --outputs A.json,B.json --samples samples.jsonl \
        --prompts train-prompts.jsonl --out judged.json

--outputs are answers of eval.py to prompts whose first passage is the article. --samples are those
that train_ppo.py --save-samples kept; the first --per-step of every --every-th iteration are
judged. OUT has for each of them the judge's reward R, names and numbers, those made up, words, the
tokens that the judge saw without EOS, and the share of copied pairs of words. The judge takes an
answer that was cut off for a whole one, because the text does not tell.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from fgrlhf.checkpoint import load_tokenizer
from fgrlhf.data.fields import UserError, take
from fgrlhf.data.files import require_json, write_atomic
from fgrlhf.data.outputs import passages_of
from fgrlhf.data.readers import read_outputs, read_prompts
from fgrlhf.data.records import Output
from fgrlhf.engine.config import Computation, arg, parse, run
from fgrlhf.engine.distributed import pick_device
from fgrlhf.engine.encoding import Encoding, check_encoding
from fgrlhf.judge import answer_to, rewards_of
from fgrlhf.real.made_up import copied, made_up, named, words
from fgrlhf.reward import load_reward
from fgrlhf.templates import template_arg


@dataclass(frozen=True, kw_only=True)
class Config(Computation):
    reward: str = arg(help="folder of the reward model that judges")
    outputs: str = arg(help="files of answers, with commas between them")
    out: str = arg(help="file for the judgements")
    samples: str | None = arg(None, help="samples.jsonl of a PPO run")
    prompts: str | None = arg(None, help="with --samples: the prompts of that run")
    every: int = arg(3, least=1, help="judge the samples of every N-th iteration, and the first")
    per_step: int = arg(16, least=1, help="samples per iteration")
    template: str = template_arg("plain")


def article_of(output: Output) -> str:
    """Returns the text of the first passage. Raises UserError for an answer without one."""
    passages = passages_of(output)
    if not passages:
        raise UserError(f"output to {output.instruction!r}: expected a context with the article; "
                        "answer prompts that have one")
    return passages[0].text


def measured(output: Output, reward: float, tokens: int) -> dict[str, float]:
    """The figures of one summary."""
    text, article = output.output, article_of(output)
    return {"reward": reward, "tokens": tokens, "named": len(named(text)),
            "made_up": len(made_up(text, article)), "words": len(words(text)),
            "copied": copied(text, article)}


def read_samples(config: Config) -> tuple[list[dict], list[Output]]:
    """Returns the chosen samples, and each of them as an answer."""
    prompts, rows, outputs = {p.id: p for p in read_prompts(config.prompts)}, [], []
    for place, line in require_json(config.samples):
        step, responses = (take(line, name, kind, place)
                           for name, kind in (("step", int), ("responses", list)))
        if step != 1 and step % config.every:
            continue
        for row in responses[:config.per_step]:
            record_id, output, kl = (take(row, name, kind, place) for name, kind in (
                ("id", str), ("output", str), ("kl", float)))
            if record_id not in prompts:
                raise UserError(f"--prompts {config.prompts}: expected the prompts of "
                                f"{config.samples}, got no record {record_id!r}; give the file of "
                                "that run")
            rows.append({"step": step, "kl": kl})
            outputs.append(answer_to(prompts[record_id], output, "sample"))
    return rows, outputs


def judge(config: Config) -> None:
    if (config.samples is None) != (config.prompts is None):
        raise UserError("--samples and --prompts: expected both or neither")
    chosen = read_samples(config) if config.samples else ([], [])
    files = {Path(path).stem: read_outputs(path) for path in config.outputs.split(",")}
    device = pick_device(config.device)
    encoding = check_encoding(config.reward, template=config.template) or Encoding(config.template)
    model = load_reward(config.reward, device, getattr(torch, config.dtype))
    tokenizer = load_tokenizer(config.reward)

    def judged(outputs: list[Output]) -> list[dict]:
        rewards, seen = rewards_of(model, tokenizer, encoding, outputs)
        return [measured(output, reward, len(ids) - 1)
                for output, reward, ids in zip(outputs, rewards, seen)]
    samples = [row | figures for row, figures in zip(chosen[0], judged(chosen[1]))]
    text = json.dumps({"answers": {name: judged(outputs) for name, outputs in files.items()},
                       "samples": samples})
    write_atomic(config.out, (text + "\n").encode())


if __name__ == "__main__":
    run(lambda: judge(parse(Config, __doc__)))
