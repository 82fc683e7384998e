"""Training states: the files that make a stopped run resumable.

    OUT/state-000040.pt        a state, and at its end the sha256 of all bytes before
    OUT/state-000040.shards/   only with several ranks: the tensors (shards.py)

A state is written under a temporary name, fsynced and renamed, and only then is an older state
removed. Whatever stops the program or fills the disk, the last good state is there. A damaged state
is named and passed over, and the state before it is used. Loading never runs code from a file.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from fgrlhf.data.fields import UserError, show
from fgrlhf.data.files import write_atomic
from fgrlhf.engine import distributed, lora
from fgrlhf.layouts.pickles import load_plain


class TrainableState:
    """The part of a module that a training state holds: everything except a shared trunk."""

    def __init__(self, module: nn.Module):
        self.module = module

    def state_dict(self) -> dict[str, Tensor]:
        elsewhere = lora.shared(self.module)
        return {n: x for n, x in self.module.state_dict().items() if n not in elsewhere}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        whole = self.module.state_dict()
        shapes = lambda tensors: {name: x.shape for name, x in tensors.items()}
        if shapes(state) != shapes(self.state_dict()):
            raise UserError("training state: it belongs to a model with other parameters "
                            "(--lora-rank?); choose another --out and start again there")
        self.module.load_state_dict(whole | state)


# ----- one file -----------------------------------------------------------------------------------

class _Hashing:
    """A binary file that is hashed while it is written."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha = file, hashlib.sha256()

    def write(self, data) -> int:
        self.sha.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_state(path: str | Path, state: dict) -> None:
    """Writes a state atomically. The last 32 bytes of the file are the sha256 of the others.

    `state`: dicts, lists and tuples of tensors, numbers, strings, bytes, booleans and None. Raises
    TypeError with the name of any other entry, because reading it back would need running code.
    """
    _check_plain(state, "state")

    def write(file: BinaryIO) -> None:
        hashing = _Hashing(file)
        torch.save(state, hashing)
        file.write(hashing.sha.digest())

    write_atomic(path, write)


def load_state(path: str | Path) -> dict:
    """Reads a state of `save_state` onto the CPU. Raises UserError if a single bit has changed."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such training state")
    sha, left = hashlib.sha256(), path.stat().st_size - 32
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            sha.update(block)
            left -= len(block)
        intact = file.read() == sha.digest()
    if not intact:
        raise UserError(f"{path}: damaged, or no training state: its contents do not match their "
                        "checksum; use an older one")
    return load_plain(path)


def _check_plain(value: object, name: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, name)
            _check_plain(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            _check_plain(item, f"{name}[{number}]")
    elif not isinstance(value, Tensor | bool | int | float | str | bytes | None):
        raise TypeError(f"{name}: expected a tensor, number, string, bytes, None, or a dict, "
                        f"list or tuple of these, got {type(value).__name__}")


# ----- the states of a run ------------------------------------------------------------------------

def paths(folder: Path) -> list[Path]:
    """The states in `folder`, newest first."""
    return sorted(folder.glob("state-*.pt"), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in the name of a state; -1 for a file whose name only looks similar."""
    number = path.stem.removeprefix("state-")
    return int(number) if number.isdecimal() else -1


def newest(folder: Path) -> tuple[Path, dict] | None:
    """Returns (path, state) of the newest intact state, or None if the folder has no state at all.

    Damaged states are named on stderr and passed over. Raises UserError when all are damaged.
    """
    refusals: list[UserError] = []
    for path in paths(folder):
        try:
            state = _checked(path, load_state(path))
        except UserError as error:
            refusals.append(error)
            continue
        for refusal in refusals:
            print(f"{refusal}: continuing from {path}", file=sys.stderr)
        return path, state
    if refusals:
        raise UserError(f"{refusals[0]}, but there is none; remove {folder} and start again")
    return None


FIELDS = {"step": int, "seconds": float, "inputs": dict, "config": str, "extra": dict,
          "parts": dict, "machine": dict}
OLDER = {"machine": {}, "shards": None}             # states of earlier versions lack these fields


def _checked(path: Path, state: object) -> dict:
    """Returns `state` when it has the fields that `save` writes. Raises UserError otherwise."""
    state = OLDER | state if isinstance(state, dict) else {}
    for name, kind in FIELDS.items():
        value = state.get(name)
        if not isinstance(value, kind) or name == "step" and not 0 <= value < 2 ** 63:
            raise UserError(f"{path}: no training state: {name}: expected {kind.__name__}, got "
                            f"{show(value)}; use an older one")
    try:
        if isinstance(json.loads(state["config"]), dict):
            return state
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{path}: no training state: config: expected a JSON object, got "
                    f"{show(state['config'])}; use an older one")


def save(folder: Path, step: int, parts: dict, more: dict, keep: int) -> None:
    """Writes the state of `step`, then removes all but the newest `keep` up to that step.

    parts: name -> state_dict; more: plain values. Every rank calls this function. States of later
    steps are damaged ones that `newest` passed over; they are removed too.
    """
    held, shards = parts, None
    if distributed.size() > 1:
        from fgrlhf.engine.shards import save_shards
        held, shards = save_shards(folder / f"state-{step:06}.shards", parts)
    if distributed.rank() > 0:
        return
    save_state(folder / f"state-{step:06}.pt", more | {"parts": held, "shards": shards})
    older = [path for path in paths(folder) if step_of(path) < step]
    later = [path for path in paths(folder) if step_of(path) > step]
    for path in later + older[keep - 1:]:
        path.unlink(missing_ok=True)
    _remove_orphans(folder)


def load(folder: Path, parts: dict, state: dict) -> None:
    """Loads the parts of a state, written by any number of ranks. Every rank calls this function.

    parts: name -> an object with state_dict and load_state_dict; an optimizer also has `allocate`.
    Raises UserError when the state does not fit them.
    """
    saved, shards = state["parts"], state["shards"]
    try:
        if shards is not None or distributed.size() > 1:
            from fgrlhf.engine.shards import load_shards
            saved = load_shards(folder, parts, saved, shards)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: the training state of step {state['step']} does not fit the "
                        f"models of this run ({show(str(error))}); choose another --out and start "
                        "again there") from None


def remove(folder: Path) -> None:
    """Removes every state: the run is complete."""
    for path in paths(folder):
        path.unlink(missing_ok=True)
    _remove_orphans(folder)


def _remove_orphans(folder: Path) -> None:
    for path in folder.glob("state-*.shards"):
        if not path.with_suffix(".pt").exists():
            shutil.rmtree(path)


# ----- what a run depends on ----------------------------------------------------------------------

def fingerprint(path: str | Path) -> str:
    """sha256 of a file, or of the names and contents of a folder's files; "" if none exists."""
    path, sha = Path(path), hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            sha.update(f"{file.name if path.is_dir() else ''}\n".encode())
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    sha.update(block)
    return sha.hexdigest()


def describe(model: nn.Module) -> dict:
    """The sizes and weights of a model, adapters merged, for the dump of a batch that failed."""
    trunk = getattr(model, "trunk", model)
    plain = lora.merge(trunk) if lora.adapters(trunk) else trunk
    prefix = "" if trunk is model else "trunk."
    weights = {prefix + name: w for name, w in plain.state_dict().items()}
    if trunk is not model:
        weights |= {name: w for name, w in model.state_dict().items()
                    if not name.startswith(prefix)}
    return {"sizes": dataclasses.asdict(trunk.config),
            "weights": {name: w.detach().cpu() for name, w in weights.items()}}
