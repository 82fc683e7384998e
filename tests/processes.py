"""Scripts in processes of their own, without paying for `import torch` each time.

A server process imports the project once and forks; the child becomes `python SCRIPT ARGS` by
runpy. It has its own exit status, stdout and stderr, and can be killed like any other.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["torch", "numpy", "tqdm", "sentencepiece", "torch._dynamo",
                               "fgrlhf.judge",
                               "train_rm", "train_ppo", "fgrlhf.sft"])


class Done(NamedTuple):
    status: int
    out: str
    err: str


def _die_after(step: int) -> None:
    """SIGKILL as soon as the metrics of `step` are written: no handler, no flush, no goodbye."""
    from fgrlhf.engine.run import Run
    log = Run.log

    def log_and_die(self, at, metrics):
        log(self, at, metrics)
        if at >= step:
            os.kill(os.getpid(), signal.SIGKILL)
    Run.log = log_and_die


def _become(command: list[str], stem: str, die_after: int | None, instead=None) -> None:
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{stem}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import torch
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore",
                            module="runpy")        # "found in sys.modules": the server imported it
    if die_after is not None:
        _die_after(die_after)
    if instead is not None:
        instead(command)
    _run_as_main(command)


class Stage:
    """Stands in for subprocess.Popen in a pipeline: a fork of this process, nothing to import."""

    def __init__(self, command, stdout, **_):
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            tqdm.set_lock(threading.RLock())        # another thread may have held it at the fork
            script = command[2:] if command[1] == "-m" else command[1:]
            _run_as_main(list(script))
            status = 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            os._exit(status)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def terminate(self) -> None:
        try:
            os.kill(self.pid, signal.SIGTERM)
        except ProcessLookupError:
            pass


def _run_as_main(command: list[str]) -> None:
    name, sys.argv = command[0], command
    if name.endswith(".py"):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


def start(folder: Path, *command, instead=None):
    """The same as `run`, without waiting for its end: the process and where its output goes.

    `instead`, a top-level function, is called with the command before the script would run.
    """
    stem = str(folder / f"process-{time.monotonic_ns()}")
    process = server.Process(target=_become,
                             args=([str(part) for part in command], stem, None, instead))
    process.start()
    return process, stem


def run(folder: Path, *command, die_after: int | None = None, seconds: int = 120) -> Done:
    """`python train_rm.py ...`, or `python -m fgrlhf.sft ...` as ("fgrlhf.sft", ...), to its end.

    Its output goes through files in `folder`. With `die_after` it is killed at that step.
    """
    stem = str(folder / f"process-{time.monotonic_ns()}")
    process = server.Process(target=_become,
                             args=([str(part) for part in command], stem, die_after))
    process.start()
    process.join(seconds)
    assert process.exitcode is not None, f"did not end in {seconds} s"
    return Done(process.exitcode, *(Path(f"{stem}.{end}").read_text() for end in ("out", "err")))
