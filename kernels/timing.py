"""Measures time and memory for the benchmarks.

All variants run in turn within one process, so that a disturbance of the machine hits all of them.
Each round gives one ratio to the floor; the median and the quartiles of these ratios are reported.
Peak memory is the memory that a first call adds to its inputs, in a process that has done nothing
else.
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
    """Adds the flags that every benchmark has."""
    parser.add_argument("--repeats", type=int, default=repeats,
                        help="number of rounds, after one round that warms up")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"),
                        help="cpu counts the time of this process only: for one thread on a shared "
                             "machine")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--peak-of", metavar="ROW",
                        help="print only the peak memory of one row, in MiB")


def clock_of(options) -> Callable[[], float]:
    """The function that returns the time of --clock, in seconds."""
    return time.process_time if options.clock == "cpu" else time.perf_counter


def in_turn(runs: dict[str, Callable], floors: dict[str, str], repeats: int, clock) -> dict:
    """Times all runs in rounds: returns name -> {seconds, ratio, quartiles}.

    floors: for each run, the name of the run that its time is divided by. A run that raises gets a
    row {failed} with the error, because it is a result when a library cannot do the work.
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


def use(device: str) -> None:
    """Makes a GPU the current device, for which `wait` and `peak_mib` work."""
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.zeros(1, device=device).device)


def wait() -> None:
    """Waits until the current GPU has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_mib(run: Callable, device: str) -> float:
    """The MiB that a first call of `run` adds at its peak."""
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)   # pages that were freed before would hide added memory
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                                         # sets the peak to the present
    before = resident_mib("VmRSS")
    run()
    return resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    """One field of the memory that the kernel reports for this process, in MiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def peak_in_fresh_process(module: str, flags: list[str], name: str, options) -> float | None:
    """The MiB that `python -m module FLAGS --peak-of NAME` prints.

    None with --no-memory, and on a CPU outside Linux, which has no /proc.
    """
    if options.no_memory or (options.device == "cpu" and platform.system() != "Linux"):
        return None
    command = [sys.executable, "-m", module, *flags, "--peak-of", name, "--device", options.device,
               "--threads", str(options.threads)]
    # Large tensors then have their own pages, which are returned when the tensors are freed, so the
    # peak is the memory in use at one time.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True,
                                env=environment).stdout)


def machine(options) -> dict:
    """Prints and returns a description of the machine and the run; on a GPU with its limits."""
    found = {"machine": platform.machine(), "system": platform.system(),
             "torch": torch.__version__, "command": " ".join(sys.argv[1:]), **vars(options)}
    if options.device.startswith("cuda"):
        found |= {"device_name": torch.cuda.get_device_name(options.device)}
        found |= ceilings(options.device)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} thread(s), "
          f"{options.clock} clock")
    for name in found.keys() - vars(options).keys() - {"machine", "system", "torch", "command"}:
        print(f"  {name} {found[name]}")
    return found


def ceilings(device: str, size: int = 8192, copied: int = 2**28,
             repeats: int = 9) -> dict[str, float]:
    """The measured limits of a GPU: bytes per second of a copy, flops per second of a matmul.

    size: rows and columns of the matrices. copied: the bytes that are copied, each read and
    written once. A time is the median of `repeats` calls.
    """
    found = {}
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    work = {"copy_bytes_per_second": (lambda: target.copy_(source), 2 * len(source))}
    for dtype in (torch.float32, torch.bfloat16):
        a, b, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
        work[f"matmul_flops_per_second_{dtype}".replace("torch.", "")] = (
            lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 2 * size**3)
    for name, (run, amount) in work.items():
        rows = in_turn({name: run}, {name: name}, repeats, time.perf_counter)
        found[name] = amount / rows[name]["seconds"]
    return found


def table_row(name: str, row: dict, memory: str = "") -> str:
    """One line of a table: the time, its ratio to the floor with quartiles, the memory."""
    if "failed" in row:
        return f"  {name:<25} {row['failed']}"
    low, high = row["quartiles"]
    return (f"  {name:<25} {1e3 * row['seconds']:9.2f} ms {row['ratio']:6.3f}x "
            f"[{low:.3f}, {high:.3f}] {memory}")
