"""The common form of all layouts: the sizes of a model, and the place of each of its parameters.

Describing a checkpoint reads only headers: files are memory-mapped, and each tensor is read when
its `read` is called. What a file claims is compared with what it holds before any memory is
allocated for the claim.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fgrlhf.data.fields import UserError, show
from fgrlhf.data.files import read_object
from fgrlhf.layouts.kinds import check_kind
from fgrlhf.model import LLaMAConfig, RopeScaling

LONGEST = 2 << 20               # bytes of a header, a pickle, a JSON file: those of Llama-3.1-405B
                                # have 0.2 million


def in_a_line(name: object) -> str:
    """Returns the name of a tensor for an error message: as it is, or quoted and cut."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w.]{1,100}", name) else show(name)


class Stored(NamedTuple):
    """The place of one parameter. `read(device)` returns it in memory of its own."""

    file: Path
    name: str                               # its name in the file
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[str | torch.device], Tensor]

    @property
    def place(self) -> str:
        """The file and the tensor, for an error message."""
        return f"{self.file}: tensor {in_a_line(self.name)}"


Weights = tuple[LLaMAConfig, dict[str, Stored]]         # by the names in LLaMA.named_parameters


def damaged(place: str | Path, text: str) -> UserError:
    """Returns the error for a file that lacks something or contradicts itself."""
    return UserError(f"{place}: {text}; copy the checkpoint again")


def read_settings(path: Path) -> dict:
    """Returns the JSON object of a configuration or an index. Raises UserError for a huge file."""
    if path.exists():
        check_kind(path, "one JSON object")
        if (size := path.stat().st_size) > LONGEST:
            raise damaged(path, f"expected a JSON file of at most {LONGEST} bytes, got {size}")
    return read_object(path, "copy the file again")


def make_config(place: str | Path, tie_embeddings: bool,
                **sizes: float | RopeScaling | None) -> LLaMAConfig:
    """Builds a LLaMAConfig from the sizes found at `place`. Raises UserError if they do not fit."""
    try:
        return LLaMAConfig(**sizes, tie_embeddings=tie_embeddings)
    except ValueError as error:
        raise damaged(place, str(error)) from None


def check_finite(tensor: Tensor, place: str) -> None:
    """Raises UserError when a number in `tensor` is NaN or infinite.

    The sum of a tensor that holds such a number is not finite, so one pass without extra memory is
    enough. A sum of finite numbers can overflow: only then each number is looked at.
    """
    if math.isfinite(tensor.sum().item()):
        return
    bad = tensor.numel() - int(tensor.isfinite().sum())
    if bad:
        raise UserError(f"{place}: expected finite numbers, got {bad} of {tensor.numel()} that are "
                        f"NaN or infinite in {tensor.dtype}; use an earlier checkpoint or a wider "
                        "dtype")
