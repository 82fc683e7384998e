"""The steps of `python -m fgrlhf.checks gpu` by name, and how one of them runs in its process.

A step is a function of a Place. It yields its rows, see gpu_table.py. They go to stdout as JSON,
one object per line. Everything else that is printed goes to stderr.
"""

import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from fgrlhf.checks import gpu_correct, gpu_ppo, gpu_runs, gpu_speed
from fgrlhf.checks.gpu import GRACE, OUT_OF_MEMORY
from fgrlhf.data.fields import UserError
from fgrlhf.engine.config import is_out_of_memory
from fgrlhf.engine.distributed import pick_device


class Place(NamedTuple):
    """The device of a step, the sizes that it takes and the folder that it writes to."""

    device: torch.device
    small: bool                 # small sizes: always on a CPU
    work: Path                  # a folder for files that are not kept


FUNCTIONS: dict[str, Callable[[Place], Iterator[dict]]] = {
    "kernels": gpu_correct.kernels,
    "graph": gpu_correct.graph,
    "checks": gpu_correct.checks,
    "resume": gpu_runs.resume,
    "methods": gpu_runs.methods,
    "ceilings": gpu_speed.ceilings,
    "head": gpu_speed.head,
    "decode 135M": partial(gpu_speed.decode, preset="SmolLM2-135M"),
    "decode 1.1B": partial(gpu_speed.decode, preset="TinyLlama-1.1B"),
    "decode 7B": partial(gpu_speed.decode, preset="7B"),
    "train 135M": partial(gpu_speed.train, preset="SmolLM2-135M", rows=8),
    "train 1.1B": partial(gpu_speed.train, preset="TinyLlama-1.1B", rows=8),
    "train 7B LoRA": partial(gpu_speed.train, preset="7B", rows=4, rank=8),
    "PPO 7B LoRA": partial(gpu_ppo.iteration, rank=8),
    "PPO 7B": partial(gpu_ppo.iteration, rank=0),
    "quick": gpu_ppo.quick}


def run_step(name: str, device: str, small: bool, out: Path, seconds: float) -> None:
    """Runs one step in this process, for at most `seconds` and a few more.

    Raises UserError for an unknown step and for a device that cannot be used. Too little memory
    ends the process with the status OUT_OF_MEMORY.
    """
    if name not in FUNCTIONS:
        raise UserError(f"--step {name}: expected one of {', '.join(FUNCTIONS)}")
    # The process ends by itself when the command that started it was killed.
    signal.setitimer(signal.ITIMER_REAL, seconds + 2 * GRACE)
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(row: dict) -> None:
        print(json.dumps(row), file=rows, flush=True)
    where = pick_device(device)
    place = Place(where, small or where.type == "cpu", out / "work")
    torch.set_float32_matmul_precision("highest")           # no TF32
    torch.manual_seed(0)
    say({"machine": machine(place)})
    try:
        for row in FUNCTIONS[name](place):
            say(row)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"out of memory: {str(error).splitlines()[0] if str(error) else ''}", file=sys.stderr)
        raise SystemExit(OUT_OF_MEMORY) from None


def machine(place: Place) -> dict[str, str]:
    """Describes the device and the versions."""
    versions = {"torch": torch.__version__, "Python": platform.python_version()}
    if place.device.type != "cuda":
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
        return {"device": f"{name}, small sizes: a rehearsal, no measurement"} | versions
    about = torch.cuda.get_device_properties(place.device)
    sizes = ", small sizes: a rehearsal, no measurement" if place.small else ""
    return {"device": f"{about.name}, {about.total_memory / 1e9:.1f} GB, compute capability "
            f"{about.major}.{about.minor}{sizes}", **versions, "CUDA": str(torch.version.cuda)}
