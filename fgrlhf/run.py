"""What every training script shares: its folder, metrics, checkpoints, random draws.

    OUT/config.json      the resolved configuration
    OUT/metrics.jsonl    one JSON object a step; a pure function of config and seed
    OUT/timing.jsonl     seconds a step, kept apart because they never repeat
    OUT/state.pt         the newest training state, for --resume; removed once the run is complete
    OUT/done.json        written last: a run without it is not finished

Every random draw is made by `generator(seed, purpose, step)`, a function of its arguments. No RNG
state is carried along: resuming needs model, optimizer and step, and is bit-exact on one device.
"""

import contextlib
import hashlib
import json
import time
from pathlib import Path

import torch

from fgrlhf import config as configuration
from fgrlhf.checkpoint import load_state, save_state
from fgrlhf.config import UserError
from fgrlhf.files import write_atomic


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
    """`auto` is CUDA where it is present, else the CPU."""
    if name.startswith("mps"):
        raise UserError("--device mps: not supported, it has no float64; use cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not usable here ({reason})") from None


class Run:
    """The output folder of one training run, new or resumed."""

    def __init__(self, config, tokenizer_hash: str = ""):
        self.folder, self.config, self.hash = Path(config.out), config, tokenizer_hash
        self.state, self.seconds = None, 0.0
        written = configuration.to_json(config)
        if (self.folder / "done.json").exists():
            before = json.loads((self.folder / "config.json").read_text())
            if config.resume and before | {"resume": True} == json.loads(written):
                print(f"{self.folder}: already complete")
                raise SystemExit(0)
            raise UserError(f"{self.folder}: holds a finished run; "
                            "choose another --out or remove it")
        if config.resume:
            self._restore(json.loads(written))
        elif (self.folder / "metrics.jsonl").exists():
            raise UserError(f"{self.folder}: holds an unfinished run; continue it with --resume, "
                            "choose another --out or remove it")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / "config.json", written.encode())
        except OSError as error:
            raise UserError(f"--out {self.folder}: not writable ({error.strerror})") from None
        self.clock = time.perf_counter()

    def _restore(self, config: dict) -> None:
        path = self.folder / "state.pt"
        if path.exists():
            self.state = load_state(path)
            for field, value in json.loads(self.state["config"]).items():
                if field not in ("resume", "out", "device") and config.get(field) != value:
                    raise UserError(f"{path}: --resume needs the same --{field.replace('_', '-')}: "
                                    f"the run was started with {value!r}, "
                                    f"got {config.get(field)!r}")
            if self.state["tokenizer"] != self.hash:
                raise UserError(f"{path}: --resume needs the same tokenizer; "
                                "the run was started with another")
            self.seconds = self.state["seconds"]
        for name in ("metrics.jsonl", "timing.jsonl"):
            self._cut(self.folder / name, self.step)

    @staticmethod
    def _cut(path: Path, step: int) -> None:
        """Drop the lines that were written after the restored step, a torn one among them."""
        if not path.exists():
            return
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_atomic(path, "".join(kept).encode())

    @property
    def step(self) -> int:
        """The last completed step: 0 for a new run."""
        return self.state["step"] if self.state else 0

    def restore(self, **parts) -> dict:
        """Load each part's saved state_dict; returns the run's extra values ({} for a new run)."""
        if self.state is None:
            return {}
        for name, part in parts.items():
            part.load_state_dict(self.state["parts"][name])
        return self.state["extra"]

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line of metrics and one of timing. `seconds` counts training, not evaluation."""
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        rounded = {k: float(f"{float(v):.7g}") for k, v in metrics.items()}
        self._append("metrics.jsonl", {"step": step} | rounded)
        self._append("timing.jsonl", {"step": step, "seconds": round(self.seconds, 4)})

    def _append(self, name: str, record: dict) -> None:
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(record) + "\n")

    @contextlib.contextmanager
    def untimed(self):
        """Leave what happens inside (an evaluation, a checkpoint) out of the seconds."""
        started = time.perf_counter()
        yield
        self.clock += time.perf_counter() - started

    def save(self, step: int, extra: dict | None = None, **parts) -> None:
        """Write the training state at the end of `step`, atomically and off the clock."""
        with self.untimed():
            save_state(self.folder / "state.pt", {
                "step": step, "seconds": self.seconds, "config": configuration.to_json(self.config),
                "tokenizer": self.hash, "extra": extra or {},
                "parts": {name: part.state_dict() for name, part in parts.items()}})

    @contextlib.contextmanager
    def guard(self, step: int, **tensors: torch.Tensor):
        """Stop the run before a number that is not finite reaches the weights (rule 9).

        Refuses non-finite `tensors` by name; a FloatingPointError raised inside stops it too.
        Either way the tensors are left in OUT/failed-batch.pt.
        """
        try:
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise FloatingPointError(f"{name}: expected finite numbers, got "
                                             f"{int((~tensor.isfinite()).sum())} others")
            yield
        except FloatingPointError as error:
            path = self.folder / "failed-batch.pt"
            save_state(path, {"step": step} | {n: t.detach().cpu() for n, t in tensors.items()})
            raise FloatingPointError(f"step {step}: {error}; the batch is in {path}") from None

    def finish(self, summary: dict) -> None:
        """Mark the run complete. Written last; the training state is not needed any more."""
        summary |= {"seconds": round(self.seconds, 2)}
        write_atomic(self.folder / "done.json", (json.dumps(summary, indent=2) + "\n").encode())
        (self.folder / "state.pt").unlink(missing_ok=True)
