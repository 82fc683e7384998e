"""What test_distributed.py runs on every rank: all training scripts on a tiny world, in one go.

    torchrun --nproc-per-node N -m tests.ranks FOLDER OUT whole|die|resume...

`whole` leaves next to each run, in OUT-part, what a run that stopped after step STOP leaves; the
folder of a `resume...` is a copy of such a one, of any number of ranks.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import torch

import train_ppo
import train_rm
from fgrlhf import sft
from fgrlhf.engine import distributed
from fgrlhf.engine.run import Run

STOP = 2                                # `die` ends after this step
BF16 = "bf16-"                          # begins the names of the runs in bfloat16


def runs(folder: Path, out: Path, resume: bool = False) -> dict:
    """name -> (train, config): SFT, both kinds of reward model, both methods, an adapted policy;
    on 1 and 2 ranks in bfloat16 as well."""
    model, reward = str(folder / "policy"), lambda kind: str(folder / kind)
    data, prompts = str(folder / "edits.jsonl"), str(folder / "prompts.jsonl")
    common = lambda name: {"out": str(out / name), "resume": resume, "save_every": 1, "warmup": 0,
                           "device": "cpu"}
    rm = lambda name, **more: (train_rm.train, train_rm.Config(
        data=data, model=model, batch=7, microbatch=2, epochs=3, lr=1e-3, **common(name),
        **{"muon_lr": 0.0} | more))
    ppo = lambda name, method, kind, **more: (train_ppo.train, train_ppo.Config(
        method=method, policy=model, reward=reward(kind), prompts=prompts, iterations=3,
        max_new_tokens=6, microbatch=2, lr=1e-3, skip_checks=True, **common(name),
        **{"rollouts": 7} | more))
    found = {"sft": (sft.train, sft.Config(data=data, model=model, batch=7, epochs=3, lr=1e-3,
                                           muon_lr=0.0, **common("sft"))),
             "rm-token": rm("rm-token", eval_edits=data),
             "rm-sequence": rm("rm-sequence", kind="sequence", muon_lr=1e-3),
             "fine-grained": ppo("fine-grained", "fine-grained", "token", epochs=1),
             "rlhf": ppo("rlhf", "rlhf", "sequence", value_lr=1e-3, decode_batch=2),
             "adapted": ppo("adapted", "fine-grained", "token", lora_rank=2, epochs=1,
                            minibatches=1)}
    if distributed.size() < 4:
        half = {"dtype": "bfloat16"}
        found |= {BF16 + "rm": rm(BF16 + "rm", **half),
                  # 5 and 4 rows: one rank has a group more, and the other repeats a row
                  BF16 + "ppo": ppo(BF16 + "ppo", "fine-grained", "token", epochs=1, rollouts=9,
                                    minibatches=1, **half)}
    return found


def watch(how: str, part: str) -> None:
    """At the state of step STOP: `die` kills the last rank, else rank 0 copies the run to PART."""
    end_step = Run.end_step

    def patched(self, step, *values, **parts):
        end_step(self, step, *values, **parts)
        if step == STOP and how == "die" and distributed.rank() == distributed.size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == STOP and how == "whole" and self.writes:
            shutil.copytree(self.folder, Path(part) / self.folder.name)
    Run.end_step = patched


def main(folder: str, out: str, how: str) -> None:
    """All runs, into the folder OUT-HOW."""
    torch.set_num_threads(1)
    before = Run.end_step
    watch(how, f"{out}-part")
    found = runs(Path(folder), Path(f"{out}-{how}"), how.startswith("resume"))
    for name in ("fine-grained",) if how == "die" else found:
        train, config = found[name]
        train(config)
    Run.end_step = before


if __name__ == "__main__":
    for how in sys.argv[3].split(","):
        main(sys.argv[1], sys.argv[2], how)
