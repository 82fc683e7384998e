"""What every layout of a checkpoint is read into: sizes, and where each of our parameters lies.

Nothing is read here but headers: files are memory-mapped and every tensor waits for its `read`.
Pickles are opened with weights_only=True, so nothing in them is executed.
"""

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fgrlhf.config import UserError
from fgrlhf.files import read_bytes
from fgrlhf.model import LLaMAConfig


class Stored(NamedTuple):
    """One of our parameters, where it lies; `read(device)` gives it in memory of its own."""

    file: Path
    name: str                               # its name in the file
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[str | torch.device], Tensor]


Weights = tuple[LLaMAConfig, dict[str, Stored]]                     # by our parameter names


def read_object(path: Path) -> dict:
    """The JSON object that a file consists of."""
    try:
        value = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def make_config(place: str | Path, tie_embeddings: bool, **sizes: float) -> LLaMAConfig:
    """A LLaMAConfig of the sizes found at `place`; UserError when they cannot be a LLaMA's."""
    for name, value in sizes.items():
        if not value > 0:
            raise UserError(f"{place}: {name}: expected a positive number, got {value}")
    try:
        return LLaMAConfig(**sizes, tie_embeddings=tie_embeddings)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None


def open_pickle(path: Path) -> Mapping[str, Tensor]:
    """A torch file as tensors by name: memory-mapped, its pickle restricted to tensors."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused: its pickle asks for more than tensors, which may be "
                        "code; nothing was executed") from None
    except Exception as error:                          # a damaged pickle can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: truncated or not a torch file ({reason})") from None
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: expected tensors by name, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: tensor {name}: expected a tensor, "
                            f"got {type(tensor).__name__}")
    return tensors
