"""A golden case: inputs, options, and the outputs that a correct port computes from them.

Expected values are float64. They come from loops over the definition and from torch's autograd;
nothing in this folder imports the code that trains. Real inputs are numbers that float32 holds
exactly, so a port in either precision starts from the same numbers. The padding of the inputs holds
garbage on purpose; outputs are 0 there.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GARBAGE = 50.0                          # in the padding: a port that reads it cannot pass


class Case(NamedTuple):
    """One case, which becomes one entry of the manifest.

    float64, float32: the tolerance in that precision, as in compare.py.
    """

    name: str
    section: str                        # of the paper, or another source of the formula
    equation: str
    computes: str                       # the formula and the names of the outputs, in words
    options: dict                       # numbers and texts
    inputs: dict                        # a Tensor, or anything that JSON holds
    outputs: dict[str, Tensor]          # float64, int64 or bool
    model: bool = False                 # True when the tiny LLaMA is an input too
    float64: float = 1e-12
    float32: float = 1e-5


class Draw:
    """Random inputs that depend only on a name."""

    def __init__(self, name: str):
        self.random = random.Random(name)       # random() repeats in every version of Python

    def numbers(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Multiples of scale / 1024 in [-scale, scale), float64. `scale` is a power of 2."""
        count = torch.Size(shape).numel()
        steps = [int(self.random.random() * 2048) - 1024 for _ in range(count)]
        return torch.tensor(steps, dtype=torch.float64).reshape(shape) * (scale / 1024)

    def ids(self, count: int, low: int, high: int) -> list[int]:
        """`count` integers in [low, high)."""
        return [low + int(self.random.random() * (high - low)) for _ in range(count)]


def mask_of(lengths: Sequence[int], width: int) -> Tensor:
    """[B, width] bool, True on the first lengths[b] columns of row b."""
    return torch.tensor([[t < length for t in range(width)] for length in lengths])


def leaves(*tensors: Tensor) -> list[Tensor]:
    """Copies that autograd follows, for an expected gradient."""
    return [tensor.clone().requires_grad_() for tensor in tensors]


def gradients(loss: Tensor, **by: Tensor) -> dict[str, Tensor]:
    """{"grad_NAME": dloss/dNAME}. The gradient is 0 when the loss does not depend on NAME."""
    found = torch.autograd.grad(loss, list(by.values()), allow_unused=True)
    return {f"grad_{name}": torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(by.items(), found)}


def number(value) -> Tensor:
    """`value` as float64, a scalar or an array."""
    return torch.as_tensor(value, dtype=torch.float64)
