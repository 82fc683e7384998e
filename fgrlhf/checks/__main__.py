"""Tries the rules on your own models and prompts, explains a failed batch, or checks a GPU.

    python -m fgrlhf.checks --policy runs/sft/policy --reward runs/rm/reward --prompts train.jsonl
    python -m fgrlhf.checks --replay runs/ppo/failed-batch.pt
    python -m fgrlhf.checks gpu --minutes 8 --out runs/gpu      # everything on a GPU: see gpu.py

train_ppo.py runs the same checks before every run (--skip-checks leaves them out); startup.py says
what they do. --replay takes the batch that stopped a run and says which tensor is not finite, and
where, and what to try.
"""

import sys
from dataclasses import dataclass, replace

from fgrlhf.checks import gpu, replay, startup
from fgrlhf.data.fields import UserError
from fgrlhf.encode import ReadingRecords
from fgrlhf.engine import players
from fgrlhf.engine.config import Computation, arg, parse, program, run
from fgrlhf.engine.distributed import pick_device
from fgrlhf.own_reward import is_own
from fgrlhf.reward import describe_reward


@dataclass(frozen=True, kw_only=True)
class Config(ReadingRecords, Computation):
    policy: str | None = arg(None, help="folder of the policy as PPO would start from it")
    reward: str | None = arg(None, help="folder of the reward model, or module:function")
    prompts: str | None = arg(None, help="prompts to sample responses to")
    replay: str | None = arg(None, help="or a failed-batch.pt: say which tensor is bad, and where")
    method: str | None = arg(None, choices=("fine-grained", "rlhf"), help="method of the planned "
                             "run (default: by the kind of the reward model)")
    max_new_tokens: int = arg(64, least=1, help="longest response of the planned run")
    temperature: float = arg(1.0, help="temperature of sampling and scoring")
    beta: float = arg(0.5, least=0, help="KL coefficient of the planned run")
    rollouts: int = arg(64, least=1, help="responses per iteration of the planned run")
    microbatch: int = arg(16, least=0, help="responses per forward pass of the planned run")
    decode_batch: int = arg(0, least=0, help="responses decoded at once in the planned run; 0: all")
    offload: bool = arg(False, help="the planned run has --offload")
    checkpoint_activations: bool = arg(False, help="the planned run has --checkpoint-activations")
    lora_rank: int = arg(0, least=0, help="rank of the adapters of the planned run; 0: none")
    seed: int = arg(0, help="seed of the sampled responses")


@dataclass(frozen=True, kw_only=True)
class GpuConfig:
    out: str = arg(help="new folder for the table and the rows")
    minutes: float = arg(8.0, help="time for all steps together")
    device: str = arg("cuda", help="cuda, cuda:1, ...; cpu rehearses all steps at small sizes")
    small: bool = arg(False, help="small sizes on a GPU too; they test the steps, and measure "
                      "nothing")
    step: str | None = arg(None, help="run only this step, in this process: its rows go to stdout")


def main(config: Config) -> None:
    """Looks at a failed batch, or loads what a PPO run would load and checks it."""
    wanted = (config.policy, config.reward, config.prompts)
    if any(wanted) == bool(config.replay) or any(wanted) and not all(wanted):
        raise UserError("expected --policy DIR --reward DIR --prompts FILE, or only --replay FILE")
    if not config.temperature > 0:
        raise UserError(f"--temperature {config.temperature}: expected a number above 0")
    if config.replay:
        for line in replay.report(config.replay):
            print(line)
        return
    if config.method is None:
        if is_own(config.reward):
            raise UserError("--method: expected fine-grained or rlhf, because --reward "
                            f"{config.reward} is a function; give one")
        kind = describe_reward(config.reward)["kind"]
        config = replace(config, method={"token": "fine-grained", "sequence": "rlhf"}[kind])
    loaded = players.load(config, pick_device(config.device))
    startup.require(startup.subject(config, loaded), config.seed, sys.stdout)


def command() -> None:
    if sys.argv[1:2] == ["gpu"]:
        gpu.main(parse(GpuConfig, gpu.__doc__, sys.argv[2:], f"{program()} gpu"))
    else:
        main(parse(Config, __doc__))


if __name__ == "__main__":
    run(command)
