"""Training states of many ranks, by torch.distributed.checkpoint: each rank writes its own part.

    OUT/state-000040.shards/   the tensors, under names like policy/layers.0.attention.wq.weight
    OUT/state-000040.pt        everything else, and a sha256 of the shards' index

A state written by N ranks is read by any number: every rank reads what its own shards need. The
index is a pickle by torch's design; it is opened only if it is the one the state vouches for.
"""

import hashlib
import shutil
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor

from fgrlhf import distributed
from fgrlhf.config import UserError


def strip(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """A nested value with {"tensor": name} for each tensor, the tensors themselves in `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {key: strip(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(strip(item, f"{name}/{i}", tensors) for i, item in enumerate(value))
    return value


def fill(value: object, tensors: dict[str, Tensor]) -> object:
    """The inverse of `strip`."""
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: fill(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(fill(item, tensors) for item in value)
    return value


def names(value: object) -> set[str]:
    """The names of the tensors that `fill` would put in."""
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return {value["tensor"]}
        value = list(value.values())
    return set().union(*map(names, value)) if isinstance(value, (list, tuple)) else set()


def save(folder: Path, step: int, parts: dict) -> tuple[dict, dict | None]:
    """(what the state itself holds of `parts`, what it says of shards). Every rank calls it.

    parts: name -> state_dict. For one process that is the parts themselves, and no shards.
    """
    if distributed.size() == 1:
        return parts, None
    tensors: dict[str, Tensor] = {}
    stripped = {name: strip(part, name, tensors) for name, part in parts.items()}
    path = folder / f"state-{step:06}.shards"
    dcp.save(tensors, checkpoint_id=path)
    return stripped, {"folder": path.name, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    return hashlib.sha256((path / ".metadata").read_bytes()).hexdigest()


def drop(folder: Path) -> None:
    """Remove the shards whose state is gone."""
    for path in folder.glob("state-*.shards"):
        if not path.with_suffix(".pt").exists():
            shutil.rmtree(path)


def load(folder: Path, parts: dict, saved: dict, shards: dict | None) -> None:
    """Put what `save` gave into the parts, of any number of ranks. Every rank calls it.

    parts: name -> an object with state_dict and load_state_dict; an optimizer also `allocate`.
    """
    if shards is None and distributed.size() == 1:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        return
    here: dict[str, Tensor] = {}                            # this rank's tensors, to be overwritten
    for name, part in parts.items():
        if hasattr(part, "allocate"):
            part.allocate()
        strip(part.state_dict(), name, here)
    if shards is None:                                      # written by one process: whole tensors
        found: dict[str, Tensor] = {}
        saved = {name: strip(part, name, found) for name, part in saved.items()}
        here = {name: distributed.like(x, here[name]) for name, x in found.items()}
    else:
        here = {name: here[name] for name in names(saved)}  # no moments where never a gradient was
        path = folder / shards["folder"]
        if not (path / ".metadata").is_file() or _sha256(path) != shards["sha256"]:
            raise UserError(f"{path}: damaged or missing; it is not what the training state "
                            "beside it was written with")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                 # that one process is reading alone
            dcp.load(here, checkpoint_id=path)
    for name, part in parts.items():
        part.load_state_dict(fill(saved[name], here))
