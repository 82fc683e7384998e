"""Shows answers before and after training side by side, with a reward model's rewards.

    python -m fgrlhf.explain.answers --before runs/mine/before.json --after runs/mine/after.json \
        --reward runs/mine/rm/reward --html runs/mine/answers.html

Both files have AlpacaEval's format, as `eval.py outputs` writes. R is the reward of the whole
answer, equation (1). For a token-level reward model the tokens with the lowest rewards are named,
and the HTML page has the reward of every token. The rewards are on the model's own scale.
"""

import sys
from dataclasses import dataclass

import torch

from fgrlhf.checkpoint import load_tokenizer
from fgrlhf.data.outputs import joined
from fgrlhf.data.readers import read_outputs
from fgrlhf.data.records import Output
from fgrlhf.engine.config import arg, parse, run
from fgrlhf.engine.encoding import Encoding, check_encoding
from fgrlhf.explain.explained import surfaces
from fgrlhf.explain.text import visible
from fgrlhf.judge import check_same_prompts, encode_outputs
from fgrlhf.reproduce.report import write_report
from fgrlhf.reward import RewardModel, load_reward
from fgrlhf.sequences import pack
from fgrlhf.templates import template_arg
from fgrlhf.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    before: str = arg(help="answers before training")
    after: str = arg(help="answers to the same prompts after training")
    reward: str = arg(help="folder of the reward model")
    template: str = template_arg("plain")
    limit: int = arg(20, least=1, help="show only the first N prompts")
    html: str | None = arg(None, help="also write an HTML page with the reward of every token")


@torch.no_grad()
def rewarded(model: RewardModel, tokenizer: Tokenizer, encoding: Encoding, outputs: list[Output],
             label: str) -> list[dict]:
    """Returns R of each answer, and its tokens with their rewards (report.py: heat_maps)."""
    encoded, result = encode_outputs(model, tokenizer, encoding, outputs), []
    for output, prompt, ids in zip(outputs, *encoded):
        batch = pack([prompt], [ids], device=model.device)
        rewards = model.token_rewards(batch)[0].tolist() if model.kind == "token" else []
        result.append({"prompt": output.instruction, "label": label, "answer": output.output,
                       "R": model.sequence_rewards(batch).item(), "rewards": rewards,
                       "tokens": surfaces(tokenizer, ids) if rewards else []})
    return result


def text(one: dict, lowest: int = 3) -> str:
    """Returns the lines of one answer."""
    lines = [f"  {one['label']:7} R = {one['R']:+9.3f}   {visible(one['answer'])}"]
    ranked = sorted(zip(one["rewards"], one["tokens"]))[:lowest]
    named = ", ".join(f"{visible(token.strip()) or 'blank'} {reward:+.2f}"
                      for reward, token in ranked)
    return "\n".join(lines + [f"{'':25}lowest: {named}"] * bool(named))


def main(config: Config) -> None:
    encoding = check_encoding(config.reward, template=config.template) or Encoding(config.template)
    before = read_outputs(config.before)
    after = joined(read_outputs(config.after), before, (config.after, config.before))
    check_same_prompts(after, before, encoding.template)
    model, tokenizer = load_reward(config.reward), load_tokenizer(config.reward)
    pairs = list(zip(*(rewarded(model, tokenizer, encoding, outputs[:config.limit], label)
                       for outputs, label in ((before, "before"), (after, "after")))))
    if config.html:
        heat = [one for pair in pairs for one in pair if one["rewards"]]
        rows = [{"prompt": a["prompt"], "before": a["answer"], "before_reward": a["R"],
                 "after": b["answer"], "after_reward": b["R"]} for a, b in pairs]
        write_report(config.html, {"examples": {"heat_maps": heat, "before_after": [
            {"caption": f"The first {len(rows)} prompts.", "labels": ["before", "after"],
             "rows": rows}]}})
    sys.stdout.reconfigure(encoding="utf-8")
    for a, b in pairs:
        print(f"{visible(a['prompt'])}\n{text(a)}\n{text(b)}\n")
    higher = sum(b["R"] > a["R"] for a, b in pairs)
    equal = sum(b["R"] == a["R"] for a, b in pairs)
    print(f"R is higher after than before for {higher} of {len(pairs)} prompts, equal for {equal}.")


if __name__ == "__main__":
    run(lambda: main(parse(Config, __doc__)))
