"""Measures the resident bytes of one PPO iteration, phase by phase, in a new process (Linux).

    python -m tests.measure_memory '{"dtype": "float32", ...}'    a JSON object on stdout

Runs two iterations of train_ppo.py's own functions on random weights, and reports the highest
resident size of each phase of the second iteration. The same measurement with a tiny model (torch,
its libraries and their buffers) is subtracted. Before both, a model with one layer of these sizes
is run, because in bfloat16 oneDNN compiles and keeps a kernel for every shape of a matmul, 256 KB
each: about 80 MB here, for any number of layers.
"""

import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch

import train_ppo
from fgrlhf.baseline import Critic
from fgrlhf.engine import lora
from fgrlhf.engine.players import Players, prepare
from fgrlhf.model import LLaMAConfig, build
from fgrlhf.reward import RewardModel

SIZES = dict(dim=320, n_layers=6, n_heads=5, n_kv_heads=5, vocab_size=6000, ffn_dim=864,
             max_seq_len=128)
PROMPT, RESPONSE = 108, 20                           # few steps to decode, many tokens to update


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak() -> int:
    """The highest resident size since `reset_peak`, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def iteration(config: train_ppo.Config, players: Players, number: int) -> dict[str, int]:
    """Runs one iteration. Returns the peak of each phase."""
    peaks, sample = {}, train_ppo.sample_on_ranks

    def watched(*arguments):
        reset_peak()
        rollout = sample(*arguments)
        peaks["rollout"] = peak()
        reset_peak()
        return rollout
    train_ppo.sample_on_ranks = watched
    _, batch = train_ppo.make_experience(config, players, number)
    train_ppo.sample_on_ranks = sample
    peaks["scoring"] = peak()
    reset_peak()
    train_ppo.update(config, players, batch, number)
    return peaks | {"update": peak()}


def measure(sizes: LLaMAConfig, options: dict, iterations: int = 2) -> dict[str, int]:
    """Builds everything and runs the iterations. Returns the peaks of the last one."""
    config = train_ppo.Config(**dict(
        method="fine-grained", policy="", reward="", prompts="", out="", epochs=1, minibatches=1,
        max_new_tokens=RESPONSE, lr=1e-6, microbatch=4, rollouts=8) | options)
    dtype, rank = getattr(torch, config.dtype), config.lora_rank
    trunk = build(sizes).to(dtype)
    new = lambda seed: lora.adapt(trunk, rank, seed) if rank else build(sizes, seed).to(dtype)
    policy, ref = new(1), new(1).requires_grad_(False)
    model = RewardModel(new(2), "sequence" if config.method == "rlhf" else "token")
    model.requires_grad_(False)
    if not rank:
        del trunk
    critic = lora.train(Critic(model)) if config.method == "rlhf" else None
    prompts = [[1 + (i + k) % 50 for k in range(PROMPT)] for i in range(config.rollouts)]
    tokenizer = SimpleNamespace(eos_id=-1)                      # no response ends early
    players = prepare(config, Players(tokenizer, policy, ref, model, critic, prompts, {}))
    return [iteration(config, players, number) for number in range(1, iterations + 1)][-1]


def main(options: dict) -> None:
    torch.set_num_threads(1)
    sizes = LLaMAConfig(**SIZES | options.pop("sizes", {}))
    measure(replace(sizes, n_layers=1), options, iterations=1)
    tiny = replace(sizes, dim=2 * sizes.n_heads, n_layers=1, ffn_dim=8, vocab_size=60)
    base = measure(tiny, options)
    found = measure(sizes, options)
    print(json.dumps({phase: size - base[phase] for phase, size in found.items()}))


if __name__ == "__main__":
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"              # freed memory goes back at once
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "0"         # see above
    if len(sys.argv) == 2:
        os.execv(sys.executable, [sys.executable, "-m", "tests.measure_memory", sys.argv[1], "now"])
    main(json.loads(sys.argv[1]))
