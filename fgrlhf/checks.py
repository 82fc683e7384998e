"""Startup checks: DESIGN.md's rules on the user's own models, prompts and device, in seconds.

    python -m fgrlhf.checks --policy runs/sft/policy --reward runs/rm/reward --prompts train.jsonl
    python -m fgrlhf.checks --replay runs/ppo/failed-batch.pt

train_ppo.py runs them before every run (--skip-checks leaves them out). Eight responses are sampled
and each rule is tried on them; a line says pass or FAIL with the number that decided, and the first
failure stops with what to do. No draw and no gradient is left behind: training starts as it would
have started without them.

--replay takes the batch that stopped a run and says which tensor is bad, where; see replay.py.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fgrlhf import plan, replay, rules
from fgrlhf.checkpoint import load_model, load_tokenizer
from fgrlhf.config import UserError, arg, parse, run
from fgrlhf.edits import TEMPLATES
from fgrlhf.encode import encode_prompt
from fgrlhf.readers import read_prompts
from fgrlhf.reward import load_reward
from fgrlhf.rollout import sample
from fgrlhf.rules import Check, Subject
from fgrlhf.run import generator, pick_device

ROWS, TOKENS = 8, 64                    # responses sampled, and their longest length


@dataclass(frozen=True)
class Config:
    policy: str | None = arg(None, help="folder of the policy as PPO would start from it")
    reward: str | None = arg(None, help="folder of the reward model")
    prompts: str | None = arg(None, help="prompts to sample responses to")
    replay: str | None = arg(None, help="or a failed-batch.pt: say which tensor is bad, where")
    template: str = arg("plain", choices=tuple(TEMPLATES), help="how a record becomes a prompt")
    max_new_tokens: int = arg(64, least=1, help="longest response of the run to come")
    temperature: float = arg(1.0, help="of sampling and scoring")
    beta: float = arg(0.5, least=0, help="KL coefficient of the run to come")
    rollouts: int = arg(64, least=1, help="episodes an iteration of the run to come")
    microbatch: int = arg(16, least=0, help="sequences a forward pass of the run to come")
    seed: int = arg(0, help="seed of the eight sampled responses")
    device: str = arg("auto", help="auto, cpu, cuda, ...")


def tokenizer_fits(s: Subject) -> Check:
    """Every id of the tokenizer and of the prompts has its row in both embeddings."""
    sizes = {s.tokenizer.vocab_size, s.policy.config.vocab_size,
             s.reward_model.trunk.config.vocab_size}
    highest = max(max(ids) for ids in s.prompts)
    special = {s.tokenizer.bos_id, s.tokenizer.eos_id}
    passed = len(sizes) == 1 and highest < min(sizes) and s.tokenizer.pad_id not in special
    return Check(passed, f"pieces {sorted(sizes)}, highest prompt id {highest}, BOS, EOS, PAD "
                 f"{s.tokenizer.bos_id}, {s.tokenizer.eos_id}, {s.tokenizer.pad_id}",
                 "give policy and reward model one vocabulary: train both from one SFT model")


def lengths_fit(s: Subject) -> Check:
    """The longest prompt and the longest response together fit either context."""
    lengths = sorted(len(ids) for ids in s.prompts)
    context = min(s.policy.config.max_seq_len, s.reward_model.trunk.config.max_seq_len)
    return Check(lengths[-1] + s.max_new_tokens <= context,
                 f"prompts of {lengths[0]} to {lengths[-1]} tokens (median "
                 f"{lengths[len(lengths) // 2]}) + {s.max_new_tokens} new <= context {context}",
                 "lower --max-new-tokens, shorten the prompts or use a model of longer context")


def memory_suffices(s: Subject) -> Check:
    """Gradients, Adam's moments, KV cache and activations against what is free now."""
    config, head = s.policy.config, s.policy.head
    trainable = sum(p.numel() for p in s.policy.parameters() if p.requires_grad)
    if s.critic is not None:
        trainable += sum(p.numel() for p in s.critic.parameters() if p.requires_grad)
    length = max(len(ids) for ids in s.prompts) + s.max_new_tokens
    part = min(s.microbatch or s.rollouts, s.rollouts)
    a_weight = 12 if head.itemsize >= 4 else 16         # gradient, two moments, and a master copy
    needed = a_weight * trainable + plan.cache_bytes(config, s.rollouts, length, head.itemsize)
    again = s.policy.activation_checkpointing
    needed += plan.activation_bytes(config, part, length, head.itemsize, again)
    needed += again * part * length * plan.block_bytes(config, head.itemsize)
    there = free_bytes(head.device)
    known = "unknown" if there is None else f"{there / 2**30:.2f}"
    return Check(there is None or needed <= there,
                 f"{needed / 2**30:.2f} GiB more at the most, {known} GiB free",
                 "lower --microbatch, then --rollouts or --max-new-tokens, or take a smaller model")


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on `device`; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


THERE = {"tokenizer and vocabulary": tokenizer_fits, "lengths": lengths_fit,
         "memory": memory_suffices}
RULES = {"masks": rules.masks_count, "sampling = scoring": rules.sampling_equals_scoring,
         "ratio 1, KL 0": rules.ratio_is_one, "rewards and values": rules.rewards_belong,
         "planted reward": rules.planted_reward_stays, "padding is inert": rules.padding_is_inert,
         "microbatches": rules.microbatches_agree, "reward and KL scale": rules.scales_side_by_side}


def run_all(s: Subject, seed: int = 0) -> Iterator[tuple[str, Check]]:
    """(name, result) of every check, in order, each computed when it is asked for.

    Where models, prompts and memory do not fit together nothing is sampled.
    """
    for name, check in THERE.items():
        found = check(s)
        yield name, found
        if not found.passed:
            return
    order = sorted(range(len(s.prompts)), key=lambda i: len(s.prompts[i]))
    rows = [s.prompts[order[i * (len(order) - 1) // (ROWS - 1)]] for i in range(ROWS)]
    rollout = sample(s.policy, rows, s.tokenizer.eos_id, min(s.max_new_tokens, TOKENS),
                     s.temperature, generator(seed, "checks"))
    for name, check in RULES.items():
        yield name, check(s, rollout)


def require(s: Subject, seed: int = 0, file=None) -> None:
    """Run every check, a line each on `file` (stderr); the first failure raises UserError."""
    for name, check in run_all(s, seed):
        print(f"{'pass' if check.passed else 'FAIL'}  {name:24}  {check.number}",
              file=file or sys.stderr)
        if not check.passed:
            raise UserError(f"startup check failed: {name}: {check.number}; {check.advice} "
                            "(--skip-checks trains all the same)")


def main(config: Config) -> None:
    """Replay a batch, or load what a PPO run would load and check it."""
    wanted = (config.policy, config.reward, config.prompts)
    if any(wanted) == bool(config.replay) or any(wanted) and not all(wanted):
        raise UserError("expected --policy DIR --reward DIR --prompts FILE, or --replay FILE alone")
    if not config.temperature > 0:
        raise UserError(f"--temperature {config.temperature}: expected a number above 0")
    if config.replay:
        for line in replay.report(config.replay):
            print(line)
        return
    device, tokenizer = pick_device(config.device), load_tokenizer(config.policy)
    if load_tokenizer(config.reward).sha256 != tokenizer.sha256:
        raise UserError(f"--reward {config.reward}: its tokenizer is not the one of "
                        f"--policy {config.policy}; train both from one SFT model")
    policy, ref = (load_model(config.policy, device, torch.float32) for _ in range(2))
    reward_model = load_reward(config.reward, device, torch.float32).requires_grad_(False)
    prompts = [encode_prompt(tokenizer, record, config.template, policy.config.max_seq_len)
               for record in read_prompts(config.prompts)]
    require(Subject(policy, ref, reward_model, tokenizer, prompts, config.max_new_tokens,
                    config.temperature, config.beta, config.rollouts, config.microbatch),
            config.seed, sys.stdout)


if __name__ == "__main__":
    run(lambda: main(parse(Config, prog="python -m fgrlhf.checks", description=__doc__)))
