"""Judges summaries by what did not train them: a reward model on other edits, and made-up facts.

    python -m fgrlhf.real.judge --reward DIR --outputs A.json,B.json --samples samples.jsonl \
        --prompts train-prompts.jsonl --out judged.json

--outputs are answers of eval.py to prompts whose first passage is the article. --samples are those
that train_ppo.py --save-samples kept; the first --per-step of every --every-th iteration are
judged. OUT has for each of them the judge's reward R, names and numbers, those made up, words, and
the share of copied pairs of words.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from fgrlhf.checkpoint import load_tokenizer
from fgrlhf.data.fields import UserError
from fgrlhf.data.files import read_json, write_atomic
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
    context = json.loads(dict(output.other).get("context", "[]"))
    if not context:
        raise UserError(f"output to {output.instruction!r}: expected a context with the article; "
                        "answer prompts that have one")
    return context[0]["text"]


def measured(output: Output, reward: float) -> dict[str, float]:
    """The figures of one summary."""
    text, article = output.output, article_of(output)
    return {"reward": reward, "named": len(named(text)), "made_up": len(made_up(text, article)),
            "words": len(words(text)), "copied": copied(text, article)}


def read_samples(config: Config) -> tuple[list[dict], list[Output]]:
    """Returns the chosen samples, and each of them as an answer."""
    prompts, rows = read_prompts(config.prompts), []
    for _, line in read_json(config.samples):
        if line["step"] == 1 or line["step"] % config.every == 0:
            rows += [{"step": line["step"]} | row for row in line["responses"][:config.per_step]]
    return rows, [answer_to(prompts[row["prompt"]], row["output"], "sample") for row in rows]


def judge(config: Config) -> None:
    if (config.samples is None) != (config.prompts is None):
        raise UserError("--samples and --prompts: expected both or neither")
    device = pick_device(config.device)
    encoding = check_encoding(config.reward, template=config.template) or Encoding(config.template)
    model = load_reward(config.reward, device, getattr(torch, config.dtype))
    tokenizer = load_tokenizer(config.reward)

    def judged(outputs: list[Output]) -> list[dict]:
        rewards, _ = rewards_of(model, tokenizer, encoding, outputs)
        return [measured(output, reward) for output, reward in zip(outputs, rewards)]
    files = {Path(path).stem: judged(read_outputs(path)) for path in config.outputs.split(",")}
    samples = []
    if config.samples:
        rows, outputs = read_samples(config)
        samples = [row | figures for row, figures in zip(rows, judged(outputs))]
        for row in samples:
            del row["output"], row["prompt"]
    text = json.dumps({"answers": files, "samples": samples})
    write_atomic(config.out, (text + "\n").encode())


if __name__ == "__main__":
    run(lambda: judge(parse(Config, __doc__)))
