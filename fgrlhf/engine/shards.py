"""Training states of several ranks, by torch.distributed.checkpoint.

    OUT/state-000040.shards/   the tensors, under names such as policy/layers.0.attention.wq.weight
    OUT/state-000040.pt        everything else, and the sha256 of the index of the folder above

Each rank writes its own part. A state that N ranks wrote can be read by any number of ranks: each
rank reads what its own shards need. The index is a pickle by torch's design; it is opened only when
it is the one that the state names.
"""

import hashlib
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor

from fgrlhf.data.fields import UserError
from fgrlhf.engine import distributed


def save_shards(path: Path, parts: dict) -> tuple[dict, dict]:
    """Writes this rank's part of every tensor in `parts` (name -> state_dict) to the folder `path`.

    Returns the parts with names in place of the tensors, and what identifies the folder: its name
    and the sha256 of its index.
    """
    tensors: dict[str, Tensor] = {}
    named = {name: take_out(part, name, tensors) for name, part in parts.items()}
    dcp.save(tensors, checkpoint_id=path)
    return named, {"folder": path.name, "sha256": index_hash(path)}


def load_shards(folder: Path, parts: dict, saved: dict, shards: dict | None) -> dict:
    """Reads this rank's part of every tensor. Returns the parts with the tensors put back.

    parts: name -> an object with state_dict; an optimizer also has `allocate`. saved, shards: what
    `save_shards` returned, or the parts and None for a state that one process wrote.
    """
    here: dict[str, Tensor] = {}                            # the tensors of this rank, overwritten
    for name, part in parts.items():
        if hasattr(part, "allocate"):
            part.allocate()
        take_out(part.state_dict(), name, here)
    if shards is None:                                      # one process wrote it: whole tensors
        found: dict[str, Tensor] = {}
        saved = {name: take_out(part, name, found) for name, part in saved.items()}
        here = {name: distributed.like(x, here[name]) for name, x in found.items()}
    else:
        here = {name: here[name] for name in names(saved)}     # parameters without a gradient have
        path = folder / shards["folder"]                        # no moments
        if not (path / ".metadata").is_file() or index_hash(path) != shards["sha256"]:
            raise UserError(f"{path}: damaged or missing; it does not match the training state "
                            "of the same name")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                 # torch warns that one process reads it
            dcp.load(here, checkpoint_id=path)
    return {name: put_back(saved[name], here) for name in parts}


def index_hash(path: Path) -> str:
    return hashlib.sha256((path / ".metadata").read_bytes()).hexdigest()


def take_out(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """Replaces each tensor of a nested value by {"tensor": name} and puts it into `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {key: take_out(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(take_out(item, f"{name}/{i}", tensors) for i, item in enumerate(value))
    return value


def put_back(value: object, tensors: dict[str, Tensor]) -> object:
    """The inverse of `take_out`."""
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: put_back(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(put_back(item, tensors) for item in value)
    return value


def names(value: object) -> set[str]:
    """Returns the names of the tensors that `put_back` would put in."""
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return {value["tensor"]}
        value = list(value.values())
    return set().union(*map(names, value)) if isinstance(value, (list, tuple)) else set()
