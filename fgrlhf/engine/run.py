"""The output folder of one training run: configuration, metrics, training states.

    OUT/config.json      the resolved configuration
    OUT/metrics.jsonl    one JSON object per step; a function of configuration and seed
    OUT/samples.jsonl    responses of each step, where a script is asked to keep them
    OUT/timing.jsonl     seconds per step, in a file of their own because they never repeat
    OUT/state-*.pt       the newest --keep training states, for --resume; removed at the end,
                         except with --keep-last
    OUT/done.json        written last: a run without it is not finished
    OUT/failed-batch.pt  the batch that gave a number that is not finite (python -m fgrlhf.checks)

Every random draw is a function of (seed, purpose, step), see draws.py. Resuming therefore needs
only the models, the optimizers and the step, and is bit-exact on one device. Ctrl-C and SIGTERM let
the step end, save, and print the command that continues. SIGKILL loses the steps since the last
state; the resumed run computes them again. There is a state after the last step too, so --resume
repeats only the evaluation at the end and the saving of the model.
"""

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from fgrlhf.data.fields import UserError
from fgrlhf.data.files import sync, write_atomic
from fgrlhf.engine import config as configuration, distributed, states
from fgrlhf.engine.folder import LOGS, OutputFolder
from fgrlhf.engine.summary import Ending, figures, last_lines


class Run(OutputFolder):
    """One training run in its output folder. OutputFolder has the arguments and the refusals.

    Make it before models are loaded, because it refuses an --out that cannot be used. `restore`
    opens the folder, and so does the first thing that is written.
    """

    def __init__(self, config, tokenizer_hash: str = "", inputs: tuple[str, ...] = (),
                 files: tuple[Path, ...] = (), keep_last: bool = False):
        super().__init__(config, tokenizer_hash, inputs, files, keep_last)
        self.total, self.stopped_by, self.shown = 0, 0, ""
        self.save_seconds = 0.0                                 # of this call of the script
        self.clock = time.perf_counter()

    def restore(self, **parts) -> dict:
        """Opens the folder and loads the saved state of each part.

        Returns the run's extra values, {} in a new run. Training time counts from here.
        """
        self.open()
        self.clock = time.perf_counter()
        if self.state is None:
            return {}
        states.load(self.folder, parts, self.state)
        return self.state["extra"]

    # ----- steps ----------------------------------------------------------------------------------

    def steps(self, total: int, name: str) -> Iterator[int]:
        """Yields the steps still to do, up to `total`, with a progress bar. `end_step` ends each.

        A first Ctrl-C or SIGTERM lets the current step end; a second one stops at once.
        """
        def ask(number, frame):
            self.stopped_by = number
            signal.signal(number, signal.SIG_DFL)
            print("finishing the step, then saving; the same signal again stops at once",
                  file=sys.stderr)

        self.total = total
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield from self.progress(total, name)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def progress(self, total: int, name: str) -> Iterator[int]:
        """Yields the steps still to do, with a progress bar that has the figures of `show`."""
        self.bar = tqdm(range(self.step + 1, total + 1), desc=name, initial=self.step, total=total,
                        disable=not self.writes)
        for step in self.bar:
            yield step
            self.bar.set_postfix_str(self.shown, refresh=False)

    def show(self, metrics: dict[str, float]) -> None:
        """Puts the main figures of a step into the progress bar."""
        self.shown = figures(metrics)

    def end_step(self, step: int, metrics: dict[str, float], extra: dict | None = None,
                 **parts) -> None:
        """Logs a step, and saves when a state is due or a signal came. The signal then ends it.

        Raises FloatingPointError for a metric that is not finite (rule 9).
        """
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"step {step}: {name}: expected a finite number, got "
                                         f"{float(value)}; lower --lr and choose another --out")
        self.log(step, metrics)
        self.show(metrics)
        self.stopped_by = distributed.largest(self.stopped_by)      # a signal to one rank stops all
        due = step == self.total or step % self.config.save_every == 0
        if self.stopped_by or due:
            self.save(step, extra, **parts)
        if self.stopped_by:
            self.bar.close()
            if self.writes:
                print(f"stopped after step {step} of {self.total}; continue with:\n"
                      f"{configuration.resume_command()}", file=sys.stderr)
            raise SystemExit(128 + self.stopped_by)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line of metrics and one of timing. `seconds` leaves evaluation out.

        A figure that does not exist (NaN), such as the AUC of a fold without spans, becomes null.
        """
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        rounded = {k: float(f"{float(v):.7g}") for k, v in metrics.items()}
        self.append("metrics.jsonl", {"step": step} | rounded)
        self.append("timing.jsonl", {"step": step, "seconds": round(self.seconds, 4)})

    def append(self, name: str, record: dict) -> None:
        """Appends one line, which has a "step", to one of the files LOGS."""
        self.open()
        if not self.writes:
            return
        try:
            with open(self.folder / name, "a") as file:
                file.write(_json(record) + "\n")
        except OSError as error:
            raise UserError(f"{self.folder / name}: cannot be written ({error.strerror}); make "
                            "room and continue with --resume") from None

    @contextlib.contextmanager
    def untimed(self):
        """A block that does not count as training time, such as an evaluation."""
        started = time.perf_counter()
        yield
        self.clock += time.perf_counter() - started

    def save(self, step: int, extra: dict | None = None, **parts) -> None:
        """Writes the training state at the end of `step`, untimed."""
        self.open()
        started = time.perf_counter()
        with self.untimed():
            whole = {name: part.state_dict() for name, part in parts.items()}
            for name in LOGS if self.writes else ():                # no state without its lines
                if (self.folder / name).exists():
                    sync(self.folder / name)
            more = {"step": step, "seconds": self.seconds, "inputs": self.inputs,
                    "config": configuration.to_json(self.config), "extra": extra or {},
                    "machine": self._machine()}
            states.save(self.folder, step, whole, more, self.config.keep)
        self.save_seconds += time.perf_counter() - started

    @contextlib.contextmanager
    def guard(self, step: int, models: dict[str, nn.Module], **tensors: torch.Tensor):
        """A block that stops the run before a number that is not finite reaches the weights.

        Refuses `tensors` that are not finite, by name (rule 9). A FloatingPointError inside the
        block stops the run too. Both leave OUT/failed-batch.pt with the tensors and the weights of
        `models` as they are.
        """
        try:
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise FloatingPointError(f"{name}: expected finite numbers, got "
                                             f"{int((~tensor.isfinite()).sum())} others")
            yield
        except FloatingPointError as error:
            self.open()
            path = self.folder / "failed-batch.pt"
            if distributed.size() > 1:
                models = {}                             # other ranks hold parts of their weights
            states.save_state(path, {
                "step": step, "config": configuration.to_json(self.config),
                "models": {name: states.describe(model) for name, model in models.items()}}
                | {name: tensor.detach().cpu() for name, tensor in tensors.items()})
            raise FloatingPointError(f"step {step}: {error}; the batch is in {path}: see "
                                     f"python -m fgrlhf.checks --replay {path}, or lower --lr "
                                     "and choose another --out") from None

    def finish(self, summary: dict, ending: Ending | None = None) -> None:
        """Marks the run as complete, unlocks the folder, and prints the last lines of `ending`.

        The training states are removed, except with `keep_last`. Like in `log`, NaN becomes null.
        """
        self.open()
        if not self.writes:
            return
        summary |= {"seconds": round(self.seconds, 2),
                    "save_seconds": round(self.save_seconds, 3), "inputs": self.inputs}
        write_atomic(self.folder / "done.json", (_json(summary, indent=2) + "\n").encode())
        if not self.keep_last:
            states.remove(self.folder)
        self.unlock()
        if ending:
            print(last_lines(self.folder, ending, summary), file=sys.stderr)


class FoldRun:
    """The training of one fold. It shows its progress, and saves and logs nothing."""

    def __init__(self, run: Run):
        self.steps, self.guard = run.progress, run.guard
        self.restore = lambda **parts: {}
        self.end_step = lambda step, metrics, **parts: run.show(metrics)


def _json(record: dict, indent: int | None = None) -> str:
    """Returns a flat record as JSON, which has no NaN and no infinity: they become null."""
    plain = {name: None if isinstance(value, float) and not math.isfinite(value) else value
             for name, value in record.items()}
    return json.dumps(plain, indent=indent, allow_nan=False)
