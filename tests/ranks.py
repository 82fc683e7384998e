"""What test_distributed.py runs on every rank: all training scripts on a tiny world, in one go.

    torchrun --nproc-per-node N -m tests.ranks FOLDER OUT whole|part|resume|die
"""

import os
import signal
import sys
from pathlib import Path

import torch

import train_ppo
import train_rm
from fgrlhf import distributed, sft
from fgrlhf.run import Run

STOP = 2                                # `part` and `die` end after this step


def runs(folder: Path, out: Path, resume: bool = False) -> dict:
    """name -> (train, config): SFT, both kinds of reward model, both methods, an adapted policy."""
    model, reward = str(folder / "policy"), lambda kind: str(folder / kind)
    data, prompts = str(folder / "edits.jsonl"), str(folder / "prompts.jsonl")
    common = lambda name: {"out": str(out / name), "resume": resume, "save_every": 1, "warmup": 0,
                           "device": "cpu"}
    rm = lambda name, **more: (train_rm.train, train_rm.Config(
        data=data, model=model, batch=7, microbatch=2, epochs=3, lr=1e-3, **common(name),
        **{"muon_lr": 0.0} | more))
    ppo = lambda name, method, kind, **more: (train_ppo.train, train_ppo.Config(
        method=method, policy=model, reward=reward(kind), prompts=prompts, iterations=3, rollouts=7,
        max_new_tokens=6, microbatch=2, lr=1e-3, value_lr=1e-3, skip_checks=True, **common(name),
        **more))
    return {"sft": (sft.train, sft.Config(data=data, model=model, batch=7, epochs=3, lr=1e-3,
                                          muon_lr=0.0, **common("sft"))),
            "rm-token": rm("rm-token"),
            "rm-sequence": rm("rm-sequence", kind="sequence", muon_lr=1e-3),
            "fine-grained": ppo("fine-grained", "fine-grained", "token", epochs=1),
            "rlhf": ppo("rlhf", "rlhf", "sequence", decode_batch=2),
            "adapted": ppo("adapted", "fine-grained", "token", lora_rank=2, epochs=1,
                           minibatches=1)}


class Stopped(Exception):
    """A run was left where a killed one would be."""


def stop_early(die: bool) -> None:
    """Make every run end behind the state of step STOP, `die`: by SIGKILL of the last rank."""
    end_step = Run.end_step

    def patched(self, step, *values, **parts):
        end_step(self, step, *values, **parts)
        if step == STOP:
            if not die:
                raise Stopped
            if distributed.rank() == distributed.size() - 1:
                os.kill(os.getpid(), signal.SIGKILL)
    Run.end_step = patched


def main(folder: str, out: str, how: str) -> None:
    torch.set_num_threads(1)
    before = Run.end_step
    if how in ("part", "die"):
        stop_early(how == "die")
    names = ("fine-grained",) if how == "die" else runs(Path(folder), Path(out))
    for name in names:
        train, config = runs(Path(folder), Path(out), how == "resume")[name]
        try:
            train(config)
        except Stopped:
            pass
    Run.end_step = before


if __name__ == "__main__":
    for how in sys.argv[3].split(","):
        main(sys.argv[1], f"{sys.argv[2]}-{how}", how)
