"""Runs commands in the order of their needs, several at a time, and skips those already done.

A stage is a command that a reader can type in the repository's folder; it runs from any folder.
OUT/logs/NAME.log is its log, and OUT/stages/NAME.json records its success and its seconds. Each
stage runs on one thread, and there are as many stages at a time as workers: with models this small,
two processes of one thread do more than one process of two threads.

On a terminal the progress bar names the logs of the running stages, and shows how far each stage is
by the last state of its own bar in its log.

Ctrl-C and SIGTERM are passed on to the running stages, which save and end. If this process is
killed, its stages go on; the next call waits for them before it begins. A stage that ended without
its record runs again; a trainer then finds its finished run and ends at once.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import fgrlhf
from fgrlhf.data.fields import UserError
from fgrlhf.data.files import read_object, write_atomic

STEPS = re.compile(rb"\| *(\d+/\d+) \[")         # in a state of tqdm's bar
REFRESH = 1.0                                   # seconds between two looks at the logs
HOME = Path(fgrlhf.__file__).parent.parent      # the repository, or site-packages once installed


@dataclass(frozen=True)
class Stage:
    """One command. `command` follows the Python interpreter: ("train_rm.py", "--data", ...)."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The command as one types it in the repository's folder."""
        return "python " + shlex.join(self.command)

    @property
    def words(self) -> list[str]:
        """The command as it runs from any folder: a script is the file next to the package."""
        first, *rest = self.command
        return [str(HOME / first) if first.endswith(".py") else first, *rest]

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of the command. `-m fgrlhf.x` is found in HOME."""
        path = os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH")]))
        return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def record_file(stage: Stage, out: Path) -> Path:
    """The file that records a stage's success."""
    return out / "stages" / f"{stage.name}.json"


def finished(stage: Stage, out: Path) -> bool:
    """Returns True if this same command has succeeded in `out` before.

    A record that is missing or damaged counts as no success.
    """
    try:
        return read_object(record_file(stage, out)).get("command") == stage.text
    except UserError:
        return False


@contextlib.contextmanager
def locked(out: Path):
    """Holds OUT/.lock, after it has waited for the stages of an earlier call that was killed.

    Yields the file descriptor of the lock. Every stage inherits it, and so holds the lock too.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            print(f"{out}: waiting for the stages of another call to end (it was "
                  f"{file.read().strip() or 'an older one'})", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        print(f"process {os.getpid()}", file=file, flush=True)
        yield file.fileno()


@contextlib.contextmanager
def stopping(processes: list[subprocess.Popen]):
    """Ends the running stages on Ctrl-C and SIGTERM, and then this program.

    Yields the list of caught signals. No stage may start after the first signal.
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
        print("stopped: the running stages have saved; the same command continues",
              file=sys.stderr)
        raise SystemExit(128 + caught[0])


def execute(stage: Stage, out: Path, lock: int, processes: list[subprocess.Popen]) -> None:
    """Runs one stage to its end. Raises UserError with the last line of its log if it fails."""
    log, started = out / "logs" / f"{stage.name}.log", time.perf_counter()
    record_file(stage, out).unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        file.write(f"$ {stage.text}\n")
        file.flush()
        process = subprocess.Popen(
            [sys.executable, *stage.words], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            env=stage.environment, pass_fds=(lock,))
        processes.append(process)
        code = process.wait()
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-1]
        how = f"failed with exit status {code}" if code > 0 else f"was ended by signal {-code}"
        how += " (by the system, when memory is short)" if code == -signal.SIGKILL else ""
        raise UserError(f"stage {stage.name} {how}: {last} (see {log})")
    record = {"command": stage.text, "seconds": round(time.perf_counter() - started, 2)}
    write_atomic(record_file(stage, out), json.dumps(record).encode())


def progress_of(log: Path) -> str:
    """Returns the last state of the progress bar in a log, such as "12/30", or ""."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 2000))
            return b"".join(STEPS.findall(file.read())[-1:]).decode()
    except OSError:                             # the stage has not begun
        return ""


def wall_seconds(out: Path, this_call: float) -> float:
    """Adds the seconds of this call to those of earlier calls in OUT/seconds.json."""
    path = out / "seconds.json"
    try:
        before = float(path.read_text()) if path.exists() else 0.0
    except ValueError:
        raise UserError(f"{path}: expected a number, got a damaged file; remove it") from None
    write_atomic(path, json.dumps(round(before + this_call, 1)).encode())
    return round(before + this_call, 1)


def run_stages(stages: list[Stage], out: Path, workers: int) -> float:
    """Runs all stages in the order of the list, each after its needs; stops at the first failure.

    Returns the seconds of this call and of those before it in `out`. The list has a stage after the
    stages that it needs. Raises UserError for a script that does not exist, before any stage runs.
    """
    for stage in stages:
        script = Path(stage.words[0])
        if script.suffix == ".py" and not script.is_file():
            raise UserError(f"stage {stage.name}: expected the script {script}, found no such "
                            "file; take a complete clone, or install it again by pip install .")
    processes: list[subprocess.Popen] = []
    with locked(out) as lock, stopping(processes) as caught:
        started = time.perf_counter()
        try:
            schedule(stages, out, workers, lock, processes, caught)
        finally:                                                    # also of a call that stops
            seconds = wall_seconds(out, time.perf_counter() - started)
    return seconds


def schedule(stages: list[Stage], out: Path, workers: int, lock: int,
             processes: list[subprocess.Popen], caught: list[int]) -> None:
    """Starts each stage when its needs are done and a worker is free, until a signal is caught."""
    done: set[str] = set()
    for stage in stages:                    # a stage runs again when a stage that it needs does
        if set(stage.needs) <= done and finished(stage, out):
            done.add(stage.name)
    waiting = [stage for stage in stages if stage.name not in done]
    for stage in waiting:                   # now, because this call may stop before their turn
        record_file(stage, out).unlink(missing_ok=True)
    running: dict[Future, Stage] = {}
    logs = out / "logs"
    pause = REFRESH if sys.stderr.isatty() else None            # a file gets a line per stage only
    with (ThreadPoolExecutor(workers) as pool,
          tqdm(total=len(stages), initial=len(done), unit="stage", desc=f"logs in {logs}",
               dynamic_ncols=True) as bar):
        while waiting or running:
            if caught and not running:
                return
            ready = [stage for stage in waiting if set(stage.needs) <= done and not caught]
            for stage in ready[:workers - len(running)]:
                waiting.remove(stage)
                running[pool.submit(execute, stage, out, lock, processes)] = stage
            names = [f"{stage.name}.log" for stage in running.values()]
            bar.set_postfix_str(", ".join(f"{name} {progress_of(logs / name)}".strip()
                                          for name in names))
            completed, _ = wait(running, pause, return_when=FIRST_COMPLETED)
            for future in completed:
                stage = running.pop(future)
                future.result()
                done.add(stage.name)
                bar.update()
