"""What every training script shares: its folder, metrics, checkpoints, random draws.

    OUT/config.json      the resolved configuration
    OUT/metrics.jsonl    one JSON object a step; a pure function of config and seed
    OUT/timing.jsonl     seconds a step, kept apart because they never repeat
    OUT/state-*.pt       the newest --keep training states, for --resume; removed once it is done
    OUT/done.json        written last: a run without it is not finished
    OUT/failed-batch.pt  what a number that is not finite came from; see replay.py

Every random draw is made by `generator(seed, purpose, step)`, a function of its arguments. No RNG
state is carried along: resuming needs model, optimizer and step, and is bit-exact on one device.
Ctrl-C and SIGTERM let the step end, save, and say how to continue; SIGKILL loses the steps since
the last state, which are made again.
"""

import contextlib
import hashlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from fgrlhf import config as configuration
from fgrlhf import distributed, shards, states
from fgrlhf.checkpoint import save_state
from fgrlhf.config import UserError
from fgrlhf.files import read_object, sync, write_atomic
from kernels.memory import keep_freed

HARMLESS = ("resume", "out", "device", "keep", "save_every")      # may differ when a run is resumed


def generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def batches(count: int, size: int, seed: int, epoch: int) -> list[list[int]]:
    """A seeded permutation of range(count) in batches of `size`, the last one shorter."""
    order = torch.randperm(count, generator=generator(seed, "order", epoch)).tolist()
    return [order[i:i + size] for i in range(0, count, size)]


def bucketed_batches(lengths: list[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """As `batches`, but sequences of similar length share a batch, so that little of it is padding.

    Sorted within windows of 16 batches of the permutation; the batches are then shuffled again.
    """
    result = []
    for window in batches(len(lengths), 16 * size, seed, epoch):
        window.sort(key=lambda i: lengths[i])
        result += [window[i:i + size] for i in range(0, len(window), size)]
    order = torch.randperm(len(result), generator=generator(seed, "batches", epoch)).tolist()
    return [result[i] for i in order]


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where it is present, else the CPU; there freed memory is kept."""
    if name.startswith("mps"):
        raise UserError("--device mps: not supported, it has no float64; use cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not usable here ({reason})") from None
    if device.type == "cpu":
        keep_freed()
    return device


class Run:
    """The output folder of one training run, new or resumed.

    `inputs` names the fields of `config` whose files and folders the run depends on: their sha256
    is part of every state, and a resumed run must find the same.
    """

    def __init__(self, config, tokenizer_hash: str = "", inputs: tuple[str, ...] = ()):
        self.folder, self.config = Path(config.out), config
        self.first = distributed.rank() == 0                # of several ranks the one that writes
        self.state, self.seconds, self.total, self.stopped_by = None, 0.0, 0, 0
        self.save_seconds = 0.0                                     # of this call
        self.inputs = {name: states.fingerprint(getattr(config, name)) for name in inputs
                       if getattr(config, name) is not None} | {"tokenizer": tokenizer_hash}
        written = configuration.to_json(config)
        if (self.folder / "done.json").exists():
            self._already_complete(json.loads(written))
        if config.resume:
            self._restore(json.loads(written))
        elif (self.folder / "metrics.jsonl").exists():
            raise UserError(f"{self.folder}: holds an unfinished run; continue it with --resume, "
                            "choose another --out or remove it")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.first:
                write_atomic(self.folder / "config.json", written.encode())
        except OSError as error:
            raise UserError(f"--out {self.folder}: not writable ({error.strerror})") from None
        self.clock = time.perf_counter()

    def _already_complete(self, config: dict) -> None:
        """End the program where --resume finds its own finished run; refuse any other."""
        before = read_object(self.folder / "config.json")
        if config["resume"] and all(before.get(field) == value for field, value in config.items()
                                    if field not in HARMLESS):
            done = read_object(self.folder / "done.json")
            self._same_inputs(done.get("inputs", self.inputs), self.folder / "done.json")
            self._remove_states()                           # a kill may have come before it
            print(f"{self.folder}: already complete")
            raise SystemExit(0)
        raise UserError(f"{self.folder}: holds a finished run; choose another --out or remove it")

    def _restore(self, config: dict) -> None:
        found = states.newest(self.folder)
        if found is not None:
            path, self.state = found
            for field, value in json.loads(self.state["config"]).items():
                if field not in HARMLESS and config.get(field) != value:
                    raise UserError(f"{path}: --resume needs the same --{field.replace('_', '-')}: "
                                    f"the run was started with {value!r}, "
                                    f"got {config.get(field)!r}")
            self._same_inputs(self.state["inputs"], path)
            self.seconds = self.state["seconds"]
        for name in ("metrics.jsonl", "timing.jsonl") if self.first else ():
            self._cut(self.folder / name, self.step)

    def _same_inputs(self, before: dict[str, str], path: Path) -> None:
        for name, sha in self.inputs.items():
            if before.get(name, "") != sha:
                flag = "tokenizer" if name == "tokenizer" else "--" + name.replace("_", "-")
                raise UserError(f"{path}: --resume needs the same {flag}: its contents have "
                                "changed since the run was started; restore it or choose another "
                                "--out")

    @staticmethod
    def _cut(path: Path, step: int) -> None:
        """Drop the lines that were written after the restored step, a torn one among them."""
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
                            f"state, got {len(kept)}; restore the file or start anew elsewhere")
        write_atomic(path, "".join(kept).encode())

    @property
    def step(self) -> int:
        """The last completed step: 0 for a new run."""
        return self.state["step"] if self.state else 0

    def restore(self, **parts) -> dict:
        """Load each part's saved state_dict; returns the run's extra values ({} for a new run)."""
        if self.state is None:
            return {}
        shards.load(self.folder, parts, self.state["parts"], self.state["shards"])
        return self.state["extra"]

    def steps(self, total: int, name: str) -> Iterator[int]:
        """The steps still to do, up to `total`, with a progress bar; each ends in `end_step`.

        Meanwhile Ctrl-C and SIGTERM only ask the step to be the last; a second one stops at once.
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
                            total=total, disable=not self.first)
            yield from self.bar
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def end_step(self, step: int, metrics: dict[str, float], extra: dict | None = None,
                 **parts) -> None:
        """Log a step; save where it is due or a signal asked, which then ends the program."""
        config = self.config
        self.log(step, metrics)
        self.stopped_by = distributed.largest(self.stopped_by)      # a signal to one stops all
        if self.stopped_by or (step % config.save_every == 0 and step < self.total):
            self.save(step, extra, **parts)
        if self.stopped_by:
            self.bar.close()
            print(f"stopped after step {step} of {self.total}; continue with:\n"
                  f"{configuration.resume_command()}", file=sys.stderr)
            raise SystemExit(128 + self.stopped_by)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line of metrics and one of timing. `seconds` counts training, not evaluation."""
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        rounded = {k: float(f"{float(v):.7g}") for k, v in metrics.items()}
        self._append("metrics.jsonl", {"step": step} | rounded)
        self._append("timing.jsonl", {"step": step, "seconds": round(self.seconds, 4)})

    def _append(self, name: str, record: dict) -> None:
        if not self.first:
            return
        try:
            with open(self.folder / name, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"{self.folder / name}: cannot be written ({error.strerror}); make "
                            "room and continue with --resume") from None

    @contextlib.contextmanager
    def untimed(self):
        """Leave what happens inside (an evaluation, a checkpoint) out of the seconds."""
        started = time.perf_counter()
        yield
        self.clock += time.perf_counter() - started

    def save(self, step: int, extra: dict | None = None, **parts) -> None:
        """Write the training state at the end of `step`, atomically and off the clock."""
        config, started = self.config, time.perf_counter()
        with self.untimed():
            whole = {name: part.state_dict() for name, part in parts.items()}
            held, beside = shards.save(self.folder, step, whole)
            if not self.first:
                return
            for name in ("metrics.jsonl", "timing.jsonl"):          # no state without its lines
                sync(self.folder / name)
            states.save(self.folder, step, {
                "step": step, "seconds": self.seconds, "config": configuration.to_json(config),
                "inputs": self.inputs, "extra": extra or {}, "parts": held, "shards": beside},
                config.keep)
            shards.drop(self.folder)
        self.save_seconds += time.perf_counter() - started

    @contextlib.contextmanager
    def guard(self, step: int, models: dict[str, nn.Module] | None = None,
              more: Callable[[], dict] = dict, **tensors: torch.Tensor):
        """Stop the run before a number that is not finite reaches the weights (rule 9).

        Refuses non-finite `tensors` by name; a FloatingPointError raised inside stops it too.
        Either way OUT/failed-batch.pt holds what `python -m fgrlhf.checks --replay` needs: the
        tensors, those of `more()`, and the weights of `models` as they are.
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
                models = {}                                 # their shards lie with other ranks
            save_state(path, {
                "step": step, "config": configuration.to_json(self.config),
                "models": {name: states.describe(model) for name, model in (models or {}).items()}}
                | {n: t.detach().cpu() for n, t in (tensors | more()).items()})
            raise FloatingPointError(f"step {step}: {error}; the batch is in {path}: see "
                                     f"python -m fgrlhf.checks --replay {path}") from None

    def finish(self, summary: dict) -> None:
        """Mark the run complete. Written last; the training states are not needed any more."""
        if not self.first:
            return
        summary |= {"seconds": round(self.seconds, 2),
                    "save_seconds": round(self.save_seconds, 3), "inputs": self.inputs}
        write_atomic(self.folder / "done.json", (json.dumps(summary, indent=2) + "\n").encode())
        self._remove_states()

    def _remove_states(self) -> None:
        if self.first:
            states.remove(self.folder)
            shards.drop(self.folder)
