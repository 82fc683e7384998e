"""Whole runs of train_ppo.py on a GPU: two steps of `python -m fgrlhf.checks gpu`.

    resume    a run that was stopped and resumed against a run that was never stopped
    methods   one iteration against the same iteration on the CPU

The models have random weights and are a few hundred kilobytes large.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

import train_ppo
from fgrlhf.checkpoint import load_model, save_model
from fgrlhf.checks.gpu_correct import SIZES, lively
from fgrlhf.data.records import Prompt, write_jsonl
from fgrlhf.reward import RewardModel, save_reward
from fgrlhf.tokenizer import train as train_tokenizer


def run_folder(folder: Path) -> Path:
    """Writes what a PPO run reads: a policy, reward models "token" and "sequence", and prompts."""
    if (folder / "prompts.jsonl").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(["name the river", "it is red"] * 5, SIZES.vocab_size,
                                folder / "tokenizer.model")
    save_model(lively(SIZES), folder / "policy", tokenizer=tokenizer)
    for kind in ("token", "sequence"):
        torch.manual_seed(0)
        save_reward(RewardModel(lively(SIZES, 1), kind), folder / kind, tokenizer)
    write_jsonl(folder / "prompts.jsonl",
                [Prompt(str(i), "name the river"[:3 + 2 * (i % 5)]) for i in range(16)])
    return folder


def ppo(place, out: str, **changes) -> Path:
    """Runs train_ppo.py on the models of `run_folder`. Returns the folder of the run."""
    folder, method = run_folder(place.work / "inputs"), changes.get("method", "fine-grained")
    kind = "token" if method == "fine-grained" else "sequence"
    fields = dict(method=method, policy=str(folder / "policy"), reward=str(folder / kind),
                  prompts=str(folder / "prompts.jsonl"), out=str(place.work / out), iterations=1,
                  rollouts=16, max_new_tokens=24, microbatch=8, warmup=0, skip_checks=True,
                  device=str(place.device))
    train_ppo.train(train_ppo.Config(**fields | changes))
    return place.work / out


def resume(place) -> Iterator[dict]:
    """Compares a stopped and resumed run with one that was never stopped, bit for bit.

    Attention kernels for GPUs may add up gradients in any order. Where two equal runs differ, a
    resumed run cannot be equal either. The plain form of attention has one order.
    """
    cases = [("float32", False)]
    if place.device.type == "cuda":
        cases += [("float32", True), ("bfloat16", False), ("bfloat16", True)]
    for dtype, plain in cases:
        at = f"{dtype}-{'plain' if plain else 'kernel'}"
        with plain_attention() if plain else contextlib.nullcontext():
            first, second = (ppo(place, f"{at}-{k}", iterations=4, dtype=dtype) for k in (1, 2))
            ppo(place, f"{at}-3", iterations=2, dtype=dtype, keep_last=True)
            resumed = ppo(place, f"{at}-3", iterations=4, dtype=dtype, keep_last=True, resume=True)
        twice, apart = difference(first, second), difference(first, resumed)
        said = {0.0: "equal bit for bit"}
        form = f"{dtype}, attention {'in its plain form' if plain else 'as in training'}"
        yield {"name": f"the same run twice, {form}", "difference": twice,
               "result": said.get(twice, f"weights differ by up to {twice:.1e}")} | (
                   {"passed": twice == 0} if plain else {})
        yield {"name": f"stopped and resumed, {form}", "difference": apart, "result": said.get(
            apart, f"weights differ by up to {apart:.1e}")} | (
                {"passed": apart == 0} if plain or twice == 0 else {})


@contextlib.contextmanager
def plain_attention():
    """A block in which attention is two matmuls and a softmax on a GPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    with sdpa_kernel(SDPBackend.MATH):
        yield


def difference(first: Path, second: Path) -> float:
    """Returns the largest difference of two runs' last weights, infinite when metrics differ."""
    a, b = (dict(load_model(run / "policy").named_parameters()) for run in (first, second))
    worst = max((a[name] - b[name]).abs().max().item() for name in a)
    logs = [(run / "metrics.jsonl").read_text() for run in (first, second)]
    return worst if worst or logs[0] == logs[1] else float("inf")


def methods(place) -> Iterator[dict]:
    """Runs one iteration on the device and on the CPU, and compares the logged metrics."""
    cpu = place._replace(device=torch.device("cpu"))
    for name, changes in {
            "fine-grained": {}, "rlhf": {"method": "rlhf"}, "adapters": {"lora_rank": 4},
            "models in host memory": {"offload": True},
            "activation checkpointing": {"checkpoint_activations": True}}.items():
        runs = [ppo(where, f"{name}-{where.device.type}-{k}", **changes)
                for k, where in enumerate((place, cpu))]
        ours, theirs = (json.loads((run / "metrics.jsonl").read_text()) for run in runs)
        apart = {key: abs(ours[key] - theirs[key]) / max(abs(theirs[key]), 1e-2) for key in theirs}
        worst = max(apart, key=apart.get)
        yield {"name": f"PPO iteration, {name}", "passed": ours.keys() == theirs.keys()
               and apart[worst] <= 1e-2, "result": f"{len(apart)} metrics differ by at most "
               f"{apart[worst]:.1e} from those of the CPU ({worst}), at most 0.01"}
