"""The startup checks: rules that keep the method correct, tried on the user's own models.

Eight responses are sampled (four of a large model), and each check prints `pass` or `FAIL` with the
number that decided. The first failure raises UserError with what to do. The checks leave no random
draw and no gradient behind: training starts exactly as it would have started without them. rules.py
has the rules.

In bfloat16 train_ppo.py scores every response again before the update. The rules after "sampling =
scoring" therefore get log-probabilities that were scored again.
"""

import sys
import time
from collections.abc import Iterator

import torch

from fgrlhf.checks import rounding, rules
from fgrlhf.checks.rules import Check, Subject
from fgrlhf.data.fields import UserError
from fgrlhf.engine import distributed, lora
from fgrlhf.engine.draws import generator
from fgrlhf.engine.players import Players
from fgrlhf.model import LLaMA
from fgrlhf.own_reward import OwnReward
from fgrlhf.plan.__main__ import Config as Plan, held, passing
from fgrlhf.rollout import sample
from fgrlhf.sequences import score

# The number of responses sampled, and their longest length. The second pair is for models of more
# than LARGE parameters, whose forward passes take a CPU seconds. test_mutations.py checks that
# every planted fault is found with either pair.
SAMPLE, SMALLER_SAMPLE = (8, 64), (4, 32)
LARGE = 50_000_000


def subject(config, players: Players) -> Subject:
    """Collects what the checks need of a PPO run; `config` is that of train_ppo.py."""
    return Subject(players.policy, players.ref, players.reward_model, players.tokenizer,
                   players.prompts, config.max_new_tokens, config.temperature, config.beta,
                   config.rollouts, config.microbatch, players.critic,
                   decode_batch=config.decode_batch, offload=config.offload,
                   checkpoint_activations=config.checkpoint_activations)


def trunks(s: Subject) -> list[LLaMA]:
    """Returns the models that read prompts and responses. A function as reward is none."""
    own = isinstance(s.reward_model, OwnReward)
    return [s.policy] if own else [s.policy, s.reward_model.trunk]


def tokenizer_fits(s: Subject) -> Check:
    """Checks that every id of the tokenizer and of the prompts has a row in both embeddings."""
    sizes = {s.tokenizer.vocab_size, *(trunk.config.vocab_size for trunk in trunks(s))}
    highest = max(max(ids) for ids in s.prompts)
    special = {s.tokenizer.bos_id, s.tokenizer.eos_id}
    passed = len(sizes) == 1 and highest < min(sizes) and s.tokenizer.pad_id not in special
    return Check(passed, f"pieces {sorted(sizes)}, highest prompt id {highest}, BOS, EOS, PAD "
                 f"{s.tokenizer.bos_id}, {s.tokenizer.eos_id}, {s.tokenizer.pad_id}",
                 "give policy and reward model one vocabulary: train both from one SFT model")


def lengths_fit(s: Subject) -> Check:
    """Checks that the longest prompt and the longest response together fit both contexts."""
    lengths = sorted(len(ids) for ids in s.prompts)
    context = min(trunk.config.max_seq_len for trunk in trunks(s))
    return Check(lengths[-1] + s.max_new_tokens <= context,
                 f"prompts of {lengths[0]} to {lengths[-1]} tokens (median "
                 f"{lengths[len(lengths) // 2]}) + {s.max_new_tokens} new <= context {context}",
                 "lower --max-new-tokens, shorten the prompts or use a model of longer context")


def memory_suffices(s: Subject) -> Check:
    """Compares what the run will allocate, as fgrlhf.plan computes it, with the free memory."""
    head, ranks = s.policy.head, distributed.size()
    rows = -(-s.rollouts // ranks)
    adapters = lora.adapters(s.policy)
    settings = Plan(
        method="rlhf" if s.critic is not None else "fine-grained",
        batch=ranks * min(s.decode_batch or rows, rows), microbatch=min(s.microbatch or rows, rows),
        prompt=max(len(ids) for ids in s.prompts), response=s.max_new_tokens,
        dtype=str(head.dtype).removeprefix("torch."), offload=s.offload, world_size=ranks,
        lora_rank=min((min(p.shape) for p in adapters.values()), default=0),
        checkpoint_activations=s.checkpoint_activations, device=head.device.type)
    stays, phases = held(s.policy.config, settings), passing(s.policy.config, settings)
    needed = stays["moments"] + stays["master copy"]
    needed += max(sum(parts.values()) for parts in phases.values())
    there = free_bytes(head.device)
    if there is not None:
        there += freed(s, ranks)
    known = "unknown" if there is None else f"{there / 2**30:.2f}"
    return Check(there is None or needed <= there,
                 f"about {needed / 2**30:.2f} GiB more, {known} GiB free",
                 "lower --microbatch, then --decode-batch, --rollouts or --max-new-tokens, or take "
                 "a smaller model; python -m fgrlhf.plan shows what needs how much")


def freed(s: Subject, ranks: int) -> int:
    """Returns the bytes of weights that leave the device before the first step.

    --offload moves reference and reward model to host memory, and several ranks share the weights.
    """
    size = lambda *models: sum(p.numel() * p.itemsize for model in models if model is not None
                               for p in model.parameters())
    if ranks > 1 and not lora.adapters(s.policy):
        return size(s.policy, s.ref, s.reward_model, s.critic) * (ranks - 1) // ranks
    return size(s.ref, s.reward_model) if s.offload and s.policy.head.is_cuda else 0


def free_bytes(device: torch.device) -> int | None:
    """Returns the bytes that are free on `device`, or None when the system does not say.

    On a GPU this includes what PyTorch has kept of freed tensors.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def sample_size(policy: LLaMA) -> tuple[int, int]:
    """Returns how many responses the checks sample, and their longest length."""
    large = sum(p.numel() for p in policy.parameters()) > LARGE
    return SMALLER_SAMPLE if large else SAMPLE


BEFORE_SAMPLING = {"tokenizer and vocabulary": tokenizer_fits, "lengths": lengths_fit,
                   "memory": memory_suffices}
SAMPLED = {"masks": rules.masks_count, "sampling = scoring": rules.sampling_equals_scoring}
RULES = {"ratio 1, KL 0": rules.ratio_is_one, "rewards and values": rules.rewards_belong,
         "planted reward": rules.planted_reward_stays, "padding is inert": rules.padding_is_inert,
         "microbatches": rules.microbatches_agree, "reward and KL scale": rules.scales_side_by_side}


def run_all(s: Subject, seed: int = 0) -> Iterator[tuple[str, Check]]:
    """Yields (name, result) of every check in order.

    When models, prompts and memory do not fit together, nothing is sampled.
    """
    for name, check in BEFORE_SAMPLING.items():
        found = check(s)
        yield name, found
        if not found.passed:
            return
    count, longest = sample_size(s.policy)
    order = sorted(range(len(s.prompts)), key=lambda i: len(s.prompts[i]))
    rows = [s.prompts[order[i * (len(order) - 1) // (count - 1)]] for i in range(count)]
    rollout = sample(s.policy, rows, s.tokenizer.eos_id, min(s.max_new_tokens, longest),
                     s.temperature, generator(seed, "checks"))
    s = s._replace(rounding=rounding.measure(
        s.policy, rows, rollout, s.tokenizer.eos_id, s.temperature, generator(seed, "rounding"),
        free_bytes(s.policy.head.device)))
    for name, check in SAMPLED.items():
        yield name, check(s, rollout)
    if not s.rounding.wide:                                 # as make_experience does
        with torch.no_grad():
            rollout = rollout._replace(
                logp_old=score(s.policy, rollout.sequences, s.temperature))
    for name, check in RULES.items():
        yield name, check(s, rollout)


def require(s: Subject, seed: int = 0, file=None) -> float:
    """Prints every check to `file` (stderr). Returns the seconds; a failure raises UserError."""
    started = time.perf_counter()
    for name, check in run_all(s, seed):
        if distributed.rank() == 0:
            print(f"{'pass' if check.passed else 'FAIL'}  {name:24}  {check.number}",
                  file=file or sys.stderr)
        if not check.passed:
            raise UserError(f"startup check failed: {name}: {check.number}; {check.advice} "
                            "(--skip-checks starts without the checks)")
    return time.perf_counter() - started
