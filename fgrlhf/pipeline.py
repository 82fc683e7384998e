"""A small `make`: named commands with their needs, run in parallel, skipped once they are done.

Every stage is a command a reader can run by hand; its log lies in OUT/logs, and
OUT/stages/NAME.json records that it succeeded and how long it took. A stage runs on one thread
unless it asks for more, as many stages at a time as there are workers: at these sizes two
single-threaded processes do more than one with two threads.

Ctrl-C and SIGTERM are passed on to the stages under way, which save and end. When this process is
killed outright they go on alone; the next call waits for them before it begins.
"""

import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fgrlhf.config import UserError
from fgrlhf.files import write_atomic


@dataclass(frozen=True)
class Stage:
    """`command` follows the Python interpreter: ("train_rm.py", "--data", ...)."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    threads: int = 1

    @property
    def text(self) -> str:
        """The command as one types it."""
        prefix = f"OMP_NUM_THREADS={self.threads} " if self.threads > 1 else ""
        return prefix + "python " + shlex.join(self.command)


def record_file(stage: Stage, out: Path) -> Path:
    """Where a stage's success is recorded."""
    return out / "stages" / f"{stage.name}.json"


def finished(stage: Stage, out: Path) -> bool:
    """Whether this very command has succeeded in `out` before."""
    record = record_file(stage, out)
    return record.exists() and json.loads(record.read_text())["command"] == stage.text


@contextlib.contextmanager
def alone(out: Path):
    """Hold OUT/.lock, which every stage holds too; wait for the stages of a call that was killed.

    Yields the lock's file descriptor, for the stages to inherit.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{out}: waiting for the stages of another call to end", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


@contextlib.contextmanager
def passed_on(processes: list[subprocess.Popen]):
    """Ctrl-C and SIGTERM end the stages under way, and then this program.

    Yields the list of signals caught: once there is one, no stage may start.
    """
    caught: list[int] = []

    def pass_on(number, frame):
        caught.append(number)
        for process in processes:
            process.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    except UserError:
        if not caught:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        print("stopped: the stages under way have saved; the same command continues",
              file=sys.stderr)
        raise SystemExit(128 + caught[0])


def execute(stage: Stage, out: Path, lock: int, processes: list[subprocess.Popen]) -> None:
    """Run one stage; on failure raise UserError with the end of its log."""
    log, started = out / "logs" / f"{stage.name}.log", time.perf_counter()
    record_file(stage, out).unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        file.write(f"$ {stage.text}\n")
        file.flush()
        process = subprocess.Popen(
            [sys.executable, *stage.command], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": str(stage.threads)}, pass_fds=(lock,))
        processes.append(process)
        code = process.wait()
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-1]
        raise UserError(f"stage {stage.name} failed with exit status {code}: {last} (see {log})")
    record = {"command": stage.text, "seconds": round(time.perf_counter() - started, 2)}
    write_atomic(record_file(stage, out), json.dumps(record).encode())


def run_stages(stages: list[Stage], out: Path, workers: int) -> None:
    """Run all stages, each after its needs, earlier listed ones first; stop at the first failure.

    `stages` are listed after their needs.
    """
    processes: list[subprocess.Popen] = []
    with alone(out) as lock, passed_on(processes) as caught:
        walk(stages, out, workers, lock, processes, caught)


def walk(stages: list[Stage], out: Path, workers: int, lock: int,
         processes: list[subprocess.Popen], caught: list[int]) -> None:
    """Start each stage once its needs are done and a worker is free, until a signal is caught."""
    done: set[str] = set()
    for stage in stages:                                    # a stage is stale when one it needs is
        if set(stage.needs) <= done and finished(stage, out):
            done.add(stage.name)
    waiting = [stage for stage in stages if stage.name not in done]
    for stage in waiting:                                   # also if this call stops before it
        record_file(stage, out).unlink(missing_ok=True)
    running: dict[Future, Stage] = {}
    with (ThreadPoolExecutor(workers) as pool,
          tqdm(total=len(stages), initial=len(done), unit="stage") as bar):
        while waiting or running:
            if caught and not running:
                return
            ready = [stage for stage in waiting if set(stage.needs) <= done and not caught]
            for stage in ready[:workers - len(running)]:
                waiting.remove(stage)
                running[pool.submit(execute, stage, out, lock, processes)] = stage
            bar.set_postfix_str(", ".join(stage.name for stage in running.values()))
            completed, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in completed:
                stage = running.pop(future)
                future.result()
                done.add(stage.name)
                bar.update()
