"""Correctness on a GPU: the first steps of `python -m fgrlhf.checks gpu`.

    kernels   values and gradients against `reference` in float64 on the CPU, for inputs of float32
              and bfloat16, in one chunk of logits and in several
    graph     sample_by_graph against sample_by_step, with the same random numbers
    checks    the startup checks of checks/startup.py, with the planted reward of rule 1

float32 products are computed without TF32. gpu_runs.py has the steps with whole runs.
"""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import torch

from fgrlhf.baseline import Critic
from fgrlhf.checks import startup
from fgrlhf.checks.gpu_kernels import KERNELS, error_of, inputs, several_chunks, spread
from fgrlhf.checks.rounding import COARSE, FINE
from fgrlhf.checks.rules import Subject
from fgrlhf.engine import lora
from fgrlhf.engine.draws import random_ids
from fgrlhf.engine.graph import sample_by_graph
from fgrlhf.model import LLaMA, LLaMAConfig, build
from fgrlhf.reward import RewardModel
from fgrlhf.rollout import Rollout, lay_out, sample_by_step
from fgrlhf.sequences import score

EOS = 2
SIZES = LLaMAConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=275, ffn_dim=160,
                    max_seq_len=96)
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}    # errors above twice those of `reference`


def lively(sizes: LLaMAConfig, seed: int = 0) -> LLaMA:
    """Builds a small model whose distributions are far from uniform."""
    model = build(sizes, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    return model


# ----- kernels ------------------------------------------------------------------------------------

def kernels(place) -> Iterator[dict]:
    """Compares each kernel with its reference in float64. Errors are relative, see `error_of`."""
    n, d, v = (300, 32, 500) if place.small else (1500, 256, 16000)
    for dtype, bound in BOUNDS.items():
        given = inputs(n, d, v, dtype)
        there = {name: x.to(place.device) for name, x in given.items()}
        for name, run in KERNELS.items():
            exact = run("reference", {key: x.double() if x.is_floating_point() else x
                                      for key, x in given.items()})
            found = run("fused", there)
            with several_chunks():
                again = run("fused", there)
            fused = max(error_of(found, exact), error_of(again, exact))
            plain = error_of(run("reference", there), exact)
            yield {"name": f"{name}, {_name(dtype)}", "passed": fused <= 2 * plain + bound,
                   "error": fused, "plain_error": plain,
                   "result": f"error {fused:.1e}, of the plain form {plain:.1e}"}
    yield scoring_and_update(place)


def scoring_and_update(place) -> dict:
    """Compares logp of scoring and of the update's loss in bfloat16, for more than one tile.

    The first ratio of a bfloat16 run is exp of this difference (check_first_ratio).
    """
    sizes = [(2100, 32, v) for v in (500, 1024)] if place.small else [
        (5000, 1024, v) for v in (32000, 49152)]
    worst = max(spread(*size, place.device) for size in sizes)
    return {"name": f"logp of scoring and of the update, bfloat16, {sizes[0][0]} tokens",
            "passed": worst <= FINE, "error": worst,
            "result": f"largest difference {worst:.1e} nats, at most {FINE:g}"}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ----- decoding -----------------------------------------------------------------------------------

def graph(place) -> Iterator[dict]:
    """Compares decoding in steps of fixed shape, a CUDA graph on a GPU, with the ordinary loop.

    In float64 and float32 the tokens must be the same. In bfloat16 the two round differently, so
    each is compared with its own scores.
    """
    sizes = replace(SIZES, vocab_size=64)
    unequal = random_ids([4, 1, 7, 2, 3, 7, 1, 5] * 3, sizes.vocab_size)
    count = 20 if place.small else 40               # more than LOOK of engine/graph.py
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, None)):
        policy = lively(sizes).to(place.device, dtype)
        cases = {"24 unequal prompts": (policy, unequal, count, 1.0),
                 "greedy": (policy, unequal, count, 0.0),
                 "one row": (policy, unequal[2:3], count, 0.7),
                 "one token": (policy, unequal, 1, 1.0),
                 "up to the context": (policy, random_ids([80, 9], 64), count, 1.0),
                 "adapters": (_adapted(policy), unequal, count, 1.0)}
        if dtype == torch.bfloat16 and place.small:         # each new shape costs a CPU time
            cases = {"24 unequal prompts": cases["24 unequal prompts"]}
        for name, (model, prompts, tokens, temperature) in cases.items():
            plain, fixed = both_ways(model, prompts, tokens, temperature)
            yield {"name": f"{name}, {_name(dtype)}"} | (
                same(plain, fixed, bound) if bound else
                scored(model, (plain, fixed), temperature or 1.0))
    if place.device.type == "cuda":
        yield kept_memory(lively(sizes).to(place.device), unequal)


def _adapted(trunk: LLaMA) -> LLaMA:
    """Returns a model with adapters that change its results."""
    model = lora.adapt(trunk, 4)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, b in lora.adapters(model).items():
            if name.endswith("lora_b"):
                b.copy_(0.3 * torch.randn(b.shape, generator=draw))
    return model


def both_ways(policy: LLaMA, prompts: list[list[int]], count: int,
              temperature: float) -> tuple[Rollout, Rollout]:
    """Samples by the ordinary loop and by steps of fixed shape, with the same random numbers."""
    found = []
    for decode in (sample_by_step, sample_by_graph):
        tokens, lengths = lay_out(prompts, count, policy.config.max_seq_len, policy.head.device)
        uniform = torch.rand(len(prompts), count, dtype=torch.float64,
                             generator=torch.Generator().manual_seed(3))
        uniform = uniform[:, :tokens.shape[1] - int(lengths.max())].to(tokens.device)
        found.append(decode(policy, tokens, lengths, uniform, EOS, temperature))
    return tuple(found)


def same(plain: Rollout, fixed: Rollout, bound: float) -> dict:
    """Says whether two rollouts have the same tokens, and how far their logp differ."""
    equal = all(a.shape == b.shape and torch.equal(a, b) for a, b in
                zip((*plain.sequences, plain.truncated), (*fixed.sequences, fixed.truncated)))
    worst = (plain.logp_old - fixed.logp_old).abs().max().item() if equal else float("nan")
    ended = len(plain.truncated) - int(plain.truncated.sum())
    return {"passed": equal and worst <= bound, "result":
            f"tokens {'equal' if equal else 'DIFFER'}, logp differ by {worst:.1e} nats, at most "
            f"{bound:g}; {ended} of {len(plain.truncated)} responses ended"}


def scored(policy: LLaMA, rollouts: tuple[Rollout, ...], temperature: float) -> dict:
    """Compares logp of sampling with logp of scoring, in bfloat16."""
    apart = []
    with torch.no_grad():
        for rollout in rollouts:
            mask = rollout.sequences.response_mask
            again = score(policy, rollout.sequences, temperature)
            apart.append((again - rollout.logp_old)[mask].square().mean().sqrt().item())
    return {"passed": max(apart) <= COARSE, "result": f"logp of scoring differ by {apart[0]:.1e} "
            f"(loop) and {apart[1]:.1e} nats (fixed), rms, at most {COARSE:g}"}


def kept_memory(policy: LLaMA, prompts: list[list[int]]) -> dict:
    """Samples several times with a graph each, and says whether the memory of a graph is freed."""
    held = []
    for _ in range(6):
        both_ways(policy, prompts, 40, 1.0)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    grown = (held[-1] - held[1]) / 2**20
    return {"name": "memory after 4 more graphs", "passed": grown < 1,
            "result": f"{grown:.2f} MiB more are allocated, at most 1"}


# ----- rules --------------------------------------------------------------------------------------

def checks(place) -> Iterator[dict]:
    """Runs the startup checks of both methods in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        for kind, method in (("token", "fine-grained"), ("sequence", "rlhf")):
            where = f"{method}, {_name(dtype)}"
            found = dict(startup.run_all(subject(place.device, dtype, kind)))
            bad = [f"{name}: {check.number}" for name, check in found.items() if not check.passed]
            wanted = len(startup.BEFORE_SAMPLING | startup.SAMPLED | startup.RULES)
            yield {"name": f"startup checks, {where}", "passed": not bad and len(found) == wanted,
                   "result": "; ".join(bad) or f"{len(found)} of {wanted} checks passed"}
            if "planted reward" in found:
                planted = found["planted reward"]
                yield {"name": f"planted token, {where}", "passed": planted.passed,
                       "result": planted.number}


def subject(device: torch.device, dtype: torch.dtype, kind: str) -> Subject:
    """Makes random models for the startup checks, the reference equal to the policy."""
    policy, ref = (lively(SIZES).to(device, dtype) for _ in range(2))
    torch.manual_seed(0)
    reward_model = RewardModel(lively(SIZES, 1).to(device, dtype), kind).requires_grad_(False)
    critic = Critic(reward_model).requires_grad_(True) if kind == "sequence" else None
    names = SimpleNamespace(vocab_size=SIZES.vocab_size, bos_id=1, eos_id=EOS, pad_id=0)
    prompts = random_ids([3, 9, 5, 14, 7, 4, 11, 6], SIZES.vocab_size)
    return Subject(policy, ref.requires_grad_(False), reward_model, names, prompts, 32, 0.9, 0.5,
                   8, 4, critic)
