"""PPO on a GPU: the last steps of `python -m fgrlhf.checks gpu`.

    iteration   one PPO iteration of LLaMA-7B, and its peak memory against fgrlhf.plan
    quick       the profile quick of fgrlhf.reproduce
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import torch

import train_ppo
from fgrlhf.checks.gpu_speed import model_on, peak_bytes, reset_peak, sizes_of
from fgrlhf.engine import lora
from fgrlhf.engine.draws import random_ids
from fgrlhf.engine.players import Players, prepare
from fgrlhf.model import LLaMAConfig
from fgrlhf.plan import __main__ as plan
from fgrlhf.reward import RewardModel
from kernels import timing

LOWEST, HIGHEST = 0.8, 1.1      # of measured by planned peak memory


def planned(place, rank: int) -> tuple[str, LLaMAConfig, plan.Config]:
    """Returns name, sizes and options of the iteration: LLaMA-7B, or as many layers as fit."""
    name, sizes = sizes_of(place, "7B")
    lengths = {"batch": 4, "prompt": 12, "response": 12} if place.small else {}
    options = plan.Config(lora_rank=rank, offload=not rank, device=place.device.type, **lengths)
    if place.device.type == "cuda":
        free = torch.cuda.mem_get_info(place.device)[0]
        layers = most_layers(sizes, options, 0.92 * free)
        if layers < sizes.n_layers:
            name += f" with {layers} of {sizes.n_layers} layers, which fit"
        sizes = replace(sizes, n_layers=layers)
    return name, sizes, options


def most_layers(sizes: LLaMAConfig, options: plan.Config, room: float) -> int:
    """Returns the largest number of layers whose planned peak is at most `room` bytes, or 1."""
    low, high = 1, sizes.n_layers
    while low < high:
        middle = (low + high + 1) // 2
        peaks = plan.peaks(replace(sizes, n_layers=middle), options)
        low, high = (middle, high) if max(peaks.values()) <= room else (low, middle - 1)
    return low


def iteration(place, rank: int) -> Iterator[dict]:
    """Runs two PPO iterations. Reports time and peak memory of the second, phase by phase.

    The settings are the defaults of fgrlhf.plan: 16 responses of 300 tokens to prompts of 192, one
    sequence per forward pass, activation checkpointing; without adapters the reference and the
    reward model are in host memory between uses.
    """
    name, sizes, options = planned(place, rank)
    config = train_ppo.Config(
        method="fine-grained", policy="", reward="", prompts="", out="", dtype="bfloat16",
        rollouts=options.batch, max_new_tokens=options.response, microbatch=options.microbatch,
        epochs=1, minibatches=1, lr=1e-6, lora_rank=rank, offload=options.offload,
        checkpoint_activations=True)
    players = prepare(config, random_players(sizes, place, rank, options))
    peaks = plan.peaks(sizes, options)
    expected = {"rollout and scoring": max(peaks["rollout"], peaks["scoring"]),
                "update": peaks["update"]}
    for number in (1, 2):
        found = phases(config, players, number, place.device)
    tokens = options.batch * options.response
    for phase, (seconds, peak) in found.items():
        row = {"name": f"{name}, {phase}", "phase_seconds": seconds, "peak_bytes": peak,
               "planned_bytes": expected[phase],
               "result": f"{seconds:.2f} s for {tokens} tokens, planned peak "
               f"{expected[phase] / 1e9:.2f} GB"}
        if peak is not None:
            share = peak / expected[phase]
            row["result"] += f", measured {peak / 1e9:.2f} GB ({share:.2f} of it)"
            row |= {} if place.small else {"passed": LOWEST <= share <= HIGHEST}
        yield row


def random_players(sizes: LLaMAConfig, place, rank: int, options: plan.Config) -> Players:
    """Makes policy, reference and reward model, and prompts that no response ends early for."""
    if rank:
        trunk = model_on(sizes, place.device)
        policy, ref, judge = (lora.adapt(trunk, rank, seed) for seed in (1, 1, 2))
    else:
        policy, ref, judge = (model_on(sizes, place.device, seed) for seed in (1, 1, 2))
    reward_model = RewardModel(judge, "token").requires_grad_(False)
    prompts = random_ids([options.prompt] * options.batch, sizes.vocab_size)
    return Players(SimpleNamespace(eos_id=-1), policy, ref.requires_grad_(False), reward_model,
                   None, prompts, {})


def phases(config: train_ppo.Config, players: Players, number: int,
           device: torch.device) -> dict[str, tuple[float, int | None]]:
    """Runs one iteration. Returns seconds and peak bytes of its two phases."""
    found, held = {}, []

    def experience() -> None:
        held.append(train_ppo.make_experience(config, players, number)[1])
    for phase, run in (("rollout and scoring", experience),
                       ("update", lambda: train_ppo.update(config, players, held[0], number))):
        reset_peak(device)
        timing.wait()
        start = time.perf_counter()
        run()
        timing.wait()
        found[phase] = time.perf_counter() - start, peak_bytes(device)
    return found


# ----- the quick profile --------------------------------------------------------------------------

def quick(place) -> Iterator[dict]:
    """Runs the profile quick until it ends or the time is up. One row per finished stage."""
    out, seen = place.work / "quick", set()
    command = [sys.executable, "-m", "fgrlhf.reproduce", "--profile", "quick", "--seeds", "1",
               "--device", str(place.device), "--out", str(out)]
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("its time is up"))    # then `finally` runs
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        ended = False
        while not ended:                                    # looks once more after the end
            ended = process.poll() is not None
            for path in sorted((out / "stages").glob("*.json"), key=os.path.getmtime):
                if path.name not in seen:
                    seen.add(path.name)
                    seconds = json.loads(path.read_text())["seconds"]
                    yield {"name": f"stage {path.stem}", "stage_seconds": seconds,
                           "result": f"{seconds:.1f} s"}
            time.sleep(0.2)
    finally:
        process.terminate()
        process.wait()
    yield {"name": f"all {len(seen)} stages", "passed": process.returncode == 0,
           "result": f"exit status {process.returncode}"}
    if process.returncode == 0:
        results = json.loads((out / "results.json").read_text())
        yield {"name": "the whole call", "result": f"{results['seconds']:.0f} s"}
        for row in results["systems"]:
            rates = {key: row["metrics"][key]["mean"] for key in ("win_rate", "win_rate_greedy")
                     if key in row["metrics"]}
            yield {"name": f"win rate, {row['label']}", **rates, "result":
                   ", ".join(f"{key} {100 * value:.1f}%" for key, value in rates.items())}
