"""The common form of all layouts: the sizes of a model, and the place of each of its parameters.

Describing a checkpoint reads only headers: files are memory-mapped, and each tensor is read when
its `read` is called. Pickles are opened with weights_only=True, so no code in them is executed.
"""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fgrlhf.data.fields import UserError
from fgrlhf.model import LLaMAConfig


class Stored(NamedTuple):
    """The place of one parameter. `read(device)` returns it in memory of its own."""

    file: Path
    name: str                               # its name in the file
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[str | torch.device], Tensor]


Weights = tuple[LLaMAConfig, dict[str, Stored]]         # by the names in LLaMA.named_parameters


def damaged(place: str | Path, text: str) -> UserError:
    """Returns the error for a file that lacks something or contradicts itself."""
    return UserError(f"{place}: {text}; copy the checkpoint again")


def make_config(place: str | Path, tie_embeddings: bool, **sizes: float) -> LLaMAConfig:
    """Builds a LLaMAConfig from the sizes found at `place`. Raises UserError if they do not fit."""
    for name, value in sizes.items():
        if not value > 0:
            raise damaged(place, f"{name}: expected a positive number, got {value}")
    try:
        return LLaMAConfig(**sizes, tie_embeddings=tie_embeddings)
    except ValueError as error:
        raise damaged(place, str(error)) from None


def open_pickle(path: Path) -> Mapping[str, Tensor]:
    """Opens a torch file as tensors by name, memory-mapped. Only tensors are unpickled."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: expected only tensors, got a pickle that asks for more, which "
                        "may be code (nothing was executed); use safetensors instead") from None
    except Exception as error:                          # a damaged pickle can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise damaged(path, f"expected a torch file, got {reason}") from None
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: expected tensors by name, got {type(tensors).__name__}; "
                        "choose a file of weights")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: tensor {name}: expected a tensor, "
                            f"got {type(tensor).__name__}; choose a file of weights")
    return tensors
