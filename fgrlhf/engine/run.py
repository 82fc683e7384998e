"""The output folder of one training run: configuration, metrics, training states.

    OUT/config.json      the resolved configuration
    OUT/metrics.jsonl    one JSON object per step; a function of configuration and seed
    OUT/timing.jsonl     seconds per step, in a file of their own because they never repeat
    OUT/state-*.pt       the newest --keep training states, for --resume; removed at the end
    OUT/done.json        written last: a run without it is not finished
    OUT/failed-batch.pt  the batch that gave a number that is not finite (python -m fgrlhf.checks)

Every random draw is a function of (seed, purpose, step), see draws.py. Resuming therefore needs
only the models, the optimizers and the step, and is bit-exact on one device. Ctrl-C and SIGTERM let
the step end, save, and print the command that continues. SIGKILL loses the steps since the last
state; the resumed run computes them again.
"""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from fgrlhf.data.fields import UserError
from fgrlhf.data.files import read_object, sync, write_atomic
from fgrlhf.engine import config as configuration, distributed, states

MAY_DIFFER = ("resume", "out", "device", "keep", "save_every")    # in a run that is resumed


class Run:
    """The output folder of one training run, new or resumed.

    `inputs` names the fields of `config` that hold files or folders the run depends on. Their
    sha256 is part of every state, and a resumed run must find the same contents.
    """

    def __init__(self, config, tokenizer_hash: str = "", inputs: tuple[str, ...] = ()):
        self.folder, self.config = Path(config.out), config
        self.writes = distributed.rank() == 0                   # of several ranks, one writes
        self.state, self.seconds, self.total, self.stopped_by = None, 0.0, 0, 0
        self.save_seconds = 0.0                                 # of this call of the script
        self.inputs = {name: states.fingerprint(getattr(config, name)) for name in inputs
                       if getattr(config, name) is not None} | {"tokenizer": tokenizer_hash}
        written = configuration.to_json(config)
        if (self.folder / "done.json").exists():
            self._already_complete(json.loads(written))
        if config.resume:
            self._find_state(json.loads(written))
        elif (self.folder / "metrics.jsonl").exists():
            raise UserError(f"{self.folder}: holds an unfinished run; continue it with --resume, "
                            "choose another --out or remove it")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.writes:
                write_atomic(self.folder / "config.json", written.encode())
        except OSError as error:
            raise UserError(f"--out {self.folder}: not writable ({error.strerror})") from None
        self.clock = time.perf_counter()

    # ----- resuming -------------------------------------------------------------------------------

    def _already_complete(self, config: dict) -> None:
        """Ends the program when --resume finds its own finished run. Refuses any other one."""
        before = read_object(self.folder / "config.json")
        if config["resume"] and all(before.get(field) == value for field, value in config.items()
                                    if field not in MAY_DIFFER):
            done = read_object(self.folder / "done.json")
            self._check_inputs(done.get("inputs", self.inputs), self.folder / "done.json")
            if self.writes:
                states.remove(self.folder)              # a kill may have come before their removal
            print(f"{self.folder}: already complete")
            raise SystemExit(0)
        raise UserError(f"{self.folder}: holds a finished run; choose another --out or remove it")

    def _find_state(self, config: dict) -> None:
        """Reads the newest state, if there is one, and drops the metrics of later steps."""
        found = states.newest(self.folder)
        if found is not None:
            path, self.state = found
            for field, value in json.loads(self.state["config"]).items():
                if field not in MAY_DIFFER and config.get(field) != value:
                    raise UserError(f"{path}: --resume needs the same --{field.replace('_', '-')}: "
                                    f"the run was started with {value!r}, "
                                    f"got {config.get(field)!r}")
            self._check_inputs(self.state["inputs"], path)
            self.seconds = self.state["seconds"]
        for name in ("metrics.jsonl", "timing.jsonl") if self.writes else ():
            self._drop_lines_after(self.step, self.folder / name)

    def _check_inputs(self, before: dict[str, str], path: Path) -> None:
        for name, sha in self.inputs.items():
            if before.get(name, "") != sha:
                flag = "tokenizer" if name == "tokenizer" else "--" + name.replace("_", "-")
                raise UserError(f"{path}: --resume needs the same {flag}: its contents have "
                                "changed since the run was started; restore it or choose another "
                                "--out")

    @staticmethod
    def _drop_lines_after(step: int, path: Path) -> None:
        """Removes the lines that were written after `step`, and a line that was cut off."""
        if not path.exists():
            return
        lines = path.read_text().splitlines(keepends=True)
        lines = [line for line in lines if line.endswith("\n")]
        try:
            kept = [line for line in lines if json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError):
            kept = []
        if len(kept) < step:
            raise UserError(f"{path}: expected a line for each of the {step} steps of the training "
                            f"state, got {len(kept)}; restore the file, or start again in another "
                            "--out")
        write_atomic(path, "".join(kept).encode())

    @property
    def step(self) -> int:
        """The last completed step, 0 in a new run."""
        return self.state["step"] if self.state else 0

    def restore(self, **parts) -> dict:
        """Loads the saved state of each part. Returns the run's extra values, {} in a new run."""
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
            self.bar = tqdm(range(self.step + 1, total + 1), desc=name, initial=self.step,
                            total=total, disable=not self.writes)
            yield from self.bar
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def end_step(self, step: int, metrics: dict[str, float], extra: dict | None = None,
                 **parts) -> None:
        """Logs a step, and saves when a state is due or a signal came. The signal then ends it."""
        self.log(step, metrics)
        self.stopped_by = distributed.largest(self.stopped_by)      # a signal to one rank stops all
        if self.stopped_by or (step % self.config.save_every == 0 and step < self.total):
            self.save(step, extra, **parts)
        if self.stopped_by:
            self.bar.close()
            print(f"stopped after step {step} of {self.total}; continue with:\n"
                  f"{configuration.resume_command()}", file=sys.stderr)
            raise SystemExit(128 + self.stopped_by)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line of metrics and one of timing. `seconds` leaves evaluation out."""
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        rounded = {k: float(f"{float(v):.7g}") for k, v in metrics.items()}
        self._append("metrics.jsonl", {"step": step} | rounded)
        self._append("timing.jsonl", {"step": step, "seconds": round(self.seconds, 4)})

    def _append(self, name: str, record: dict) -> None:
        if not self.writes:
            return
        try:
            with open(self.folder / name, "a") as file:
                file.write(json.dumps(record) + "\n")
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
        started = time.perf_counter()
        with self.untimed():
            whole = {name: part.state_dict() for name, part in parts.items()}
            for name in ("metrics.jsonl", "timing.jsonl") if self.writes else ():
                sync(self.folder / name)                            # no state without its lines
            more = {"step": step, "seconds": self.seconds, "inputs": self.inputs,
                    "config": configuration.to_json(self.config), "extra": extra or {}}
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
            path = self.folder / "failed-batch.pt"
            if distributed.size() > 1:
                models = {}                             # other ranks hold parts of their weights
            states.save_state(path, {
                "step": step, "config": configuration.to_json(self.config),
                "models": {name: states.describe(model) for name, model in models.items()}}
                | {name: tensor.detach().cpu() for name, tensor in tensors.items()})
            raise FloatingPointError(f"step {step}: {error}; the batch is in {path}: see "
                                     f"python -m fgrlhf.checks --replay {path}") from None

    def finish(self, summary: dict) -> None:
        """Marks the run as complete. The training states are then not needed any more."""
        if not self.writes:
            return
        summary |= {"seconds": round(self.seconds, 2),
                    "save_seconds": round(self.save_seconds, 3), "inputs": self.inputs}
        write_atomic(self.folder / "done.json", (json.dumps(summary, indent=2) + "\n").encode())
        states.remove(self.folder)
