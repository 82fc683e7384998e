"""The training states of one run, OUT/state-000040.pt: the newest few, each with a checksum.

A state is written under a temporary name, fsynced and renamed, and only then is an older one
removed: whatever stops the program, or fills the disk, the last good one is there. One that is
damaged all the same is refused by name, and the one before it is used.
"""

import dataclasses
import hashlib
import sys
from pathlib import Path

from torch import nn

from fgrlhf import lora
from fgrlhf.checkpoint import load_state, save_state
from fgrlhf.config import UserError


def paths(folder: Path) -> list[Path]:
    """The states in `folder`, newest first."""
    return sorted(folder.glob("state-*.pt"), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a state's name; -1 for a file that only looks like one."""
    number = path.stem.removeprefix("state-")
    return int(number) if number.isdecimal() else -1


def newest(folder: Path) -> tuple[Path, dict] | None:
    """The newest state that is whole, with its path; None where there is no state at all.

    A damaged one is named on stderr and passed over. Raises UserError when none is whole.
    """
    refusals: list[UserError] = []
    for path in paths(folder):
        try:
            state = load_state(path)
        except UserError as error:
            refusals.append(error)
            continue
        for refusal in refusals:
            print(f"{refusal}: continuing from {path}", file=sys.stderr)
        return path, state
    if refusals:
        raise UserError(f"{refusals[0]}, but there is none; remove {folder} and start anew")
    return None


def save(folder: Path, step: int, state: dict, keep: int) -> None:
    """Write the state of `step`, then remove all but the newest `keep` up to it.

    States of later steps are those a damaged one was passed over for; they go as well.
    """
    save_state(folder / f"state-{step:06}.pt", state)
    older = [path for path in paths(folder) if step_of(path) < step]
    later = [path for path in paths(folder) if step_of(path) > step]
    for path in later + older[keep - 1:]:
        path.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove every state: the run is complete."""
    for path in paths(folder):
        path.unlink(missing_ok=True)


def fingerprint(path: str | Path) -> str:
    """sha256 of a file, or of a folder's file names and contents in order; "" for nothing there."""
    path, sha = Path(path), hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            sha.update(f"{file.name if path.is_dir() else ''}\n".encode())
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    sha.update(block)
    return sha.hexdigest()


def describe(model: nn.Module) -> dict:
    """A model's sizes and weights, adapters merged, as a dumped batch holds them."""
    trunk = getattr(model, "trunk", model)
    plain = lora.merge(trunk) if lora.adapters(trunk) else trunk
    prefix = "" if trunk is model else "trunk."
    weights = {prefix + name: w for name, w in plain.state_dict().items()}
    if trunk is not model:
        weights |= {name: w for name, w in model.state_dict().items()
                    if not name.startswith(prefix)}
    return {"sizes": dataclasses.asdict(trunk.config),
            "weights": {name: w.detach().cpu() for name, w in weights.items()}}
