"""Checks and measures everything on a GPU, in one command of bounded time.

    make gpu                                    # 8 minutes; the same as the next line
    python -m fgrlhf.checks gpu --minutes 8 --out runs/gpu
    python -m fgrlhf.checks gpu --device cpu --out runs/rehearsal   # small sizes, on any machine
    python -m fgrlhf.checks gpu --out runs/gpu-7B --step "decode 7B"    # one step, rows on stdout

It needs no network and no weights. The models are random and are made on the device. Correctness
comes first (gpu_correct.py, gpu_runs.py), then ceilings, kernels, decoding and training
(gpu_speed.py), then a PPO iteration of LLaMA-7B, and what is left of the time goes to the profile
quick of fgrlhf.reproduce (gpu_ppo.py).

Every step is a process of its own with a time limit. A step that hangs, crashes or runs out of
memory loses nothing else, and a step that does not fit into the time left is not run. After every
row of a step these files are written again:

    OUT/gpu.md      the table, with the name of the device
    OUT/gpu.json    the same, with all numbers
    OUT/rows.jsonl  the rows of all steps, appended as they come
    OUT/gpu.log     what the steps print otherwise

The exit status is 0 when no check failed and every step that was started ended well, and 1
otherwise. After Ctrl-C, SIGTERM or SIGHUP the running step is ended and the table says so.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fgrlhf.checks.gpu_table import floors, markdown, step_lines
from fgrlhf.data.fields import UserError
from fgrlhf.data.files import write_atomic
from fgrlhf.engine.config import program

OUT_OF_MEMORY, REFUSED = 3, 2   # exit status of a step
GRACE = 3                       # seconds between SIGTERM and SIGKILL
LOOK = 0.1                      # seconds between two looks at a running step
REHEARSED = 30                  # seconds of the last step at small sizes


class Step(NamedTuple):
    """One step. `command` follows the Python interpreter and prints one JSON object per row."""

    name: str
    about: str
    limit: float                # seconds after which it is ended
    least: float                # with fewer seconds left it is not started
    command: tuple[str, ...] = ()


STEPS = [
    Step("kernels", "loss kernels against float64 on the CPU", 90, 15),
    Step("graph", "graph decoding against decoding step by step", 60, 10),
    Step("checks", "startup checks and the planted token", 60, 10),
    Step("resume", "a stopped and resumed run against one that was never stopped", 90, 20),
    Step("methods", "one PPO iteration of both methods against the CPU", 60, 10),
    Step("ceilings", "copy bandwidth and matmul speed", 30, 8),
    Step("head", "kernels at LLaMA-7B's output matrix against their matmuls", 60, 10),
    Step("decode 135M", "decoding against reading the weights once per step", 45, 12),
    Step("decode 1.1B", "the same", 45, 12),
    Step("decode 7B", "the same", 75, 20),
    Step("train 135M", "training step against its matmuls at the measured speed", 45, 12),
    Step("train 1.1B", "the same", 45, 12),
    Step("train 7B LoRA", "the same, adapters of rank 8", 60, 20),
    Step("PPO 7B LoRA", "one iteration, its peak memory against fgrlhf.plan", 90, 30),
    Step("PPO 7B", "the same, all weights trained", 200, 40),
    Step("quick", "the profile quick of fgrlhf.reproduce, as far as the time allows", 600, 30)]


def main(config) -> None:
    """Runs one step in this process (--step), or all steps in processes of their own."""
    if not config.minutes > 0:
        raise UserError(f"--minutes {config.minutes}: expected a number above 0")
    if config.step is not None:
        from fgrlhf.checks.gpu_steps import run_step
        run_step(config.step, config.device, config.small, Path(config.out), 60 * config.minutes)
        return
    out = Path(config.out)
    if (out / "gpu.json").exists() or (out / "rows.jsonl").exists():
        raise UserError(f"--out {out}: already holds results; choose another folder or remove it")
    words = ("-m", "fgrlhf.checks", "gpu", "--device", config.device, "--out", str(out),
             *["--small"] * config.small)
    steps = [step._replace(command=(*words, "--step", step.name)) for step in STEPS]
    if config.small or config.device == "cpu":              # a CPU may be busy
        steps = [step._replace(limit=2 * step.limit) for step in steps]
        steps[-1] = steps[-1]._replace(limit=REHEARSED)
    status = run_steps(steps, out, 60 * config.minutes,
                       f"{program()} {' '.join(sys.argv[1:])}", partial(print, flush=True))
    raise SystemExit(status)


def run_steps(steps: list[Step], out: Path, seconds: float, command: str,
              say: Callable[[str], object]) -> int:
    """Runs the steps one after the other for at most `seconds`. Returns the exit status.

    say: called with each line of the table when its step has ended. Raises UserError when the
    first step is refused (exit status 2), such as for a device that does not exist.
    """
    started, work = time.monotonic(), out / "work"
    report = {"command": command, "minutes": round(seconds / 60, 2), "machine": {}, "seconds": 0.0,
              "steps": [{"name": step.name, "about": step.about, "status": "not run",
                         "why": "its turn has not come", "seconds": 0.0, "rows": []}
                        for step in steps]}

    def save() -> None:
        report["seconds"] = round(time.monotonic() - started, 1)
        floors(report)
        write_atomic(out / "gpu.json", (json.dumps(report, indent=1) + "\n").encode())
        write_atomic(out / "gpu.md", markdown(report).encode())

    before = {number: signal.signal(number, _interrupt) for number in _SIGNALS
              if signal.getsignal(number) is not signal.SIG_IGN}        # nohup ignores SIGHUP
    try:
        for step, entry in zip(steps, report["steps"]):
            left = seconds - GRACE - (time.monotonic() - started)
            if left < step.least:
                entry["why"] = f"{max(0, left):.0f} s were left, it needs {step.least:.0f}"
            else:
                work.mkdir(parents=True, exist_ok=True)
                run(step, min(step.limit, left), entry, out, report["machine"], save)
                if entry is report["steps"][0] and entry["status"] == "refused":
                    raise UserError(entry["why"].removeprefix("error: "))
            save()
            for line in step_lines(entry):
                say(line)
    except _Ended as end:
        save()
        say(f"stopped by signal {end.args[0]}; {out / 'gpu.md'} has what was measured")
        raise SystemExit(128 + end.args[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        shutil.rmtree(work, ignore_errors=True)
        if not any(entry["rows"] for entry in report["steps"]):
            _remove_refused(out, report)
    say(f"{out / 'gpu.md'}, {out / 'gpu.json'}: {report['seconds']:.0f} s")
    return exit_status(report)


def exit_status(report: dict) -> int:
    """Returns 1 when a check failed or a step that was started did not end well, 0 otherwise.

    The last step is meant to use up the time, so the limit is no failure of it.
    """
    entries = report["steps"]
    bad = [entry for entry in entries if entry["status"] not in ("done", "not run")
           and not (entry is entries[-1] and entry["status"] == "out of time")]
    return int(bool(bad) or any(row.get("passed") is False for entry in entries
                                for row in entry["rows"]))


# ----- one step -----------------------------------------------------------------------------------

def run(step: Step, limit: float, entry: dict, out: Path, machine: dict,
        save: Callable[[], None]) -> None:
    """Runs one step for at most `limit` seconds, and fills in its `entry` of the report."""
    entry |= {"status": "running", "why": ""}
    save()
    started, late = time.monotonic(), False
    with open(out / "rows.jsonl", "ab") as rows, open(out / "gpu.log", "ab") as log:
        log.write(f"\n===== {step.name}\n".encode())
        log.flush()
        start, log_start = rows.tell(), log.tell()
        seconds = ("--minutes", f"{limit / 60:.4f}") if "--step" in step.command else ()
        process = subprocess.Popen(
            [sys.executable, *step.command, *seconds], stdin=subprocess.DEVNULL, stdout=rows,
            stderr=log, start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        try:
            while process.poll() is None and not late:
                time.sleep(LOOK)
                late = time.monotonic() - started > limit
                if take_rows(out / "rows.jsonl", start, entry, machine):
                    save()
        except _Ended as end:
            entry |= {"status": "stopped", "why": f"the command got signal {end.args[0]}"}
            raise
        finally:
            end_group(process)
            take_rows(out / "rows.jsonl", start, entry, machine)
            entry["seconds"] = round(time.monotonic() - started, 1)
            if entry["status"] == "running":
                last = last_line(out / "gpu.log", log_start)
                entry |= describe(process.returncode, late, limit, last)


def describe(code: int | None, late: bool, limit: float, last: str) -> dict[str, str]:
    """Says how a step ended. `last` is the last line that it printed."""
    if late:
        return {"status": "out of time", "why": f"ended after its {limit:.0f} s"}
    if code == 0:
        return {"status": "done", "why": ""}
    if code == OUT_OF_MEMORY:
        return {"status": "out of memory", "why": last}
    if code is not None and code < 0:
        hint = " (the system sends it when memory is short)" if code == -signal.SIGKILL else ""
        return {"status": "crashed", "why": f"ended by signal {-code}{hint}; {last}"}
    return {"status": "refused" if code == REFUSED else "failed", "why": last}


def end_group(process: subprocess.Popen) -> None:
    """Ends a step and every process that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):       # all of them have ended
            pass
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:           # a driver that hangs can outlive SIGKILL
            pass


def take_rows(path: Path, start: int, entry: dict, machine: dict) -> bool:
    """Reads the rows of a step from byte `start` on. Tells whether there are new ones.

    A row with the key "machine" describes the device. A line that is cut off is left for later.
    """
    with open(path, "rb") as file:
        lines = _whole_lines(file, start)
    rows = []
    for line in lines:
        try:
            row = json.loads(line, parse_constant=lambda name: None)        # NaN, Infinity
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("machine"), dict):
            machine |= row["machine"]
        elif isinstance(row, dict) and isinstance(row.get("name"), str):
            rows.append(row)
    new = len(rows) > len(entry["rows"])
    entry["rows"] = rows
    return new


def _whole_lines(file: BinaryIO, start: int) -> list[bytes]:
    file.seek(start)
    return [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]


def last_line(path: Path, start: int) -> str:
    """Returns the last line of a log that is not empty, from byte `start` on."""
    with open(path, "rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:200] if lines else "it printed nothing"


def _remove_refused(out: Path, report: dict) -> None:
    """Removes what a refused command has written, so that it can be repeated."""
    if report["steps"] and report["steps"][0]["status"] == "refused":
        for name in ("rows.jsonl", "gpu.log", "gpu.json", "gpu.md"):
            (out / name).unlink(missing_ok=True)
        if not any(out.iterdir()):
            out.rmdir()


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Ended(BaseException):
    """A signal to this command. Its argument is the number of the signal."""


def _interrupt(number: int, frame) -> None:
    raise _Ended(number)
