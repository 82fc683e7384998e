"""A small `make`: named commands with their needs, run in parallel, skipped once they are done.

Every stage is a command a reader can run by hand; its log lies in OUT/logs, and
OUT/stages/NAME.json records that it succeeded and how long it took. A stage runs on one thread
unless it asks for more, as many stages at a time as there are workers: at these sizes two
single-threaded processes do more than one with two threads.
"""

import json
import os
import shlex
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


def execute(stage: Stage, out: Path) -> None:
    """Run one stage; on failure raise UserError with the end of its log."""
    log, started = out / "logs" / f"{stage.name}.log", time.perf_counter()
    record_file(stage, out).unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        file.write(f"$ {stage.text}\n")
        file.flush()
        code = subprocess.run([sys.executable, *stage.command], stdin=subprocess.DEVNULL,
                              stdout=file, stderr=file,
                              env=os.environ | {"OMP_NUM_THREADS": str(stage.threads)}).returncode
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-1]
        raise UserError(f"stage {stage.name} failed with exit status {code}: {last} (see {log})")
    record = {"command": stage.text, "seconds": round(time.perf_counter() - started, 2)}
    write_atomic(record_file(stage, out), json.dumps(record).encode())


def run_stages(stages: list[Stage], out: Path, workers: int) -> None:
    """Run all stages, each after its needs, earlier listed ones first; stop at the first failure.

    `stages` are listed after their needs.
    """
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
            ready = [stage for stage in waiting if set(stage.needs) <= done]
            for stage in ready[:workers - len(running)]:
                waiting.remove(stage)
                running[pool.submit(execute, stage, out)] = stage
            bar.set_postfix_str(", ".join(stage.name for stage in running.values()))
            completed, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in completed:
                stage = running.pop(future)
                future.result()
                done.add(stage.name)
                bar.update()
