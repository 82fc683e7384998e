"""How the benchmarks measure: in turn, within one run, and memory in a process of its own.

A disturbance of the machine meets all variants when they take turns; a ratio is taken within one
round, and its median and quartiles over the rounds are reported. Peak memory is what a first call
adds beyond its inputs, in a process that has done nothing else.
"""

import ctypes
import os
import platform
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable

import torch


def add_flags(parser: ArgumentParser, repeats: int) -> None:
    """The flags every benchmark has."""
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds; one more warms up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"),
                        help="cpu: this process's own time, for a shared machine and one thread")
    parser.add_argument("--no-memory", action="store_true", help="skip the fresh processes")
    parser.add_argument("--json", help="file to write the same figures to")
    parser.add_argument("--peak-of", help="print the peak memory of this row alone, in MiB")


def clock_of(options) -> Callable[[], float]:
    return time.process_time if options.clock == "cpu" else time.perf_counter


def in_turn(runs: dict[str, Callable], floors: dict[str, str], repeats: int, clock) -> dict:
    """name -> {seconds, ratio, quartiles}: rounds in which every run has its turn.

    floors: the name of the run that a run's ratio is taken to. A run that raises becomes a row
    {failed}: a peer that cannot do it is a result as well.
    """
    seconds, failed = {name: [] for name in runs}, {}
    for turn in range(repeats + 1):                             # the first round warms up
        for name, run in runs.items():
            if name in failed:
                continue
            wait()
            start = clock()
            try:
                run()
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
                continue
            wait()
            if turn:
                seconds[name].append(clock() - start)
    rows = {}
    for name in runs:
        if name in failed:
            rows[name] = {"failed": failed[name]}
            continue
        ratios = [s / f for s, f in zip(seconds[name], seconds[floors[name]])]
        low, _, high = statistics.quantiles(ratios, n=4) if repeats > 1 else ratios * 3
        rows[name] = {"seconds": statistics.median(seconds[name]),
                      "ratio": statistics.median(ratios), "quartiles": [low, high]}
    return rows


def wait() -> None:
    """Until an accelerator has done all it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_mib(run: Callable, device: str) -> float:
    """MiB that a first call of `run` adds at its peak."""
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)   # or pages freed before would hide what it adds
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                                                     # peak := present
    before = resident_mib("VmRSS")
    run()
    return resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def peak_in_fresh_process(module: str, flags: list[str], name: str, options) -> float | None:
    """What `python -m module FLAGS --peak-of NAME` prints; None outside Linux, without /proc."""
    if options.no_memory or (options.device == "cpu" and platform.system() != "Linux"):
        return None
    command = [sys.executable, "-m", module, *flags, "--peak-of", name, "--device", options.device,
               "--threads", str(options.threads)]
    # large tensors on pages of their own, returned when freed: the peak is what was alive at once
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True,
                                env=environment).stdout)


def machine(options) -> dict:
    """What runs where, printed before any row; on an accelerator with its ceilings, measured."""
    found = {"machine": platform.machine(), "system": platform.system(),
             "torch": torch.__version__, "command": " ".join(sys.argv[1:]), **vars(options)}
    if options.device.startswith("cuda"):
        found |= {"device_name": torch.cuda.get_device_name(options.device)} | ceilings(options)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} thread(s), "
          f"{options.clock} clock")
    for name in found.keys() - vars(options).keys() - {"machine", "system", "torch", "command"}:
        print(f"  {name} {found[name]}")
    return found


def ceilings(options) -> dict[str, float]:
    """What the accelerator can do: bytes a second of a copy, flops a second of a matmul."""
    found = {}
    source = torch.empty(2**28, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    work = {"copy_bytes_per_second": (lambda: target.copy_(source), 2 * len(source))}
    for dtype in (torch.float32, torch.bfloat16):
        a, b, out = (torch.randn(8192, 8192, device=options.device, dtype=dtype) for _ in range(3))
        work[f"matmul_flops_per_second_{dtype}".replace("torch.", "")] = (
            lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 2 * 8192**3)
    for name, (run, amount) in work.items():
        rows = in_turn({name: run}, {name: name}, 9, time.perf_counter)
        found[name] = amount / rows[name]["seconds"]
    return found


def table_row(name: str, row: dict, memory: str = "") -> str:
    """One line: time, its ratio to the floor, the quartiles of the ratio, memory."""
    if "failed" in row:
        return f"  {name:<25} {row['failed']}"
    low, high = row["quartiles"]
    return (f"  {name:<25} {1e3 * row['seconds']:9.2f} ms {row['ratio']:6.3f}x "
            f"[{low:.3f}, {high:.3f}] {memory}")
