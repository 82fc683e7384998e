"""A look at the batch that stopped a run: which tensor is not finite, and where.

`Run.guard` leaves OUT/failed-batch.pt when a number is not finite. The file holds every tensor of
the step, the weights of the models as they were, and the configuration.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from fgrlhf.data.fields import UserError, show
from fgrlhf.engine.states import load_state

HUGE = 1e4              # trained weights stay far below


def report(path: str | Path) -> Iterator[str]:
    """Yields a line per tensor of the batch and per weight that is not finite, then a verdict."""
    dump = load_state(path)
    if not isinstance(dump, dict) or not {"step", "config", "models"} <= set(dump):
        raise UserError(f"{path}: expected the failed-batch.pt of a stopped run, got "
                        f"{show(dump)}; give that file")
    tensors = {name: value for name, value in dump.items() if isinstance(value, Tensor)}
    yield f"step {dump['step']} of {json.loads(dump['config'])['out']}"
    for name, tensor in tensors.items():
        yield f"{name:18} {str(tuple(tensor.shape)):12} {place(tensor, tensors)}"
    for name, saved in dump["models"].items():
        bad = {key: place(weight) for key, weight in saved["weights"].items()
               if weight.is_floating_point() and not weight.isfinite().all()}
        yield from (f"{name}: weight {key}: {where}" for key, where in bad.items())
        yield f"{name}: {len(saved['weights'])} weights, {len(bad)} of them not finite"
    yield f"verdict: {verdict(dump, tensors)}"


def verdict(dump: dict, tensors: dict[str, Tensor]) -> str:
    """Says what is not finite, or what else stopped the step, and what to try."""
    config, models = json.loads(dump["config"]), dump["models"]
    weights = {f"{model}: weight {name}": weight for model, saved in models.items()
               for name, weight in saved["weights"].items() if weight.is_floating_point()}
    rates = ("lr", "head_lr", "muon_lr", *["value_lr"] * ("critic" in models))
    lower = " and ".join(f"--{name.replace('_', '-')} (it was {config[name]:g})"
                         for name in rates if config.get(name)) or "the learning rate"
    bad = [name for name, tensor in (weights | tensors).items() if place(tensor) != "finite"]
    if bad:
        source = "folder that the run started from" if bad[0] in weights else (
            "model or function that gives these numbers")
        more = f" and {len(bad) - 3} more" if bad[3:] else ""
        return f"{', '.join(bad[:3])}{more} not finite. Check the {source}, or lower {lower}"
    found = ("all tensors and weights are finite" if weights else
             "all tensors are finite (the file of a run on several ranks has no weights)")
    found += (", so the loss or its gradient overflowed, or a check of the step failed (the last "
              "line of the run says which). ")
    largest = max(weights, key=lambda name: weights[name].abs().max(), default=None)
    size = weights[largest].abs().max().item() if weights else 0.0
    if size > HUGE:
        return (f"{found}The largest weight is {size:.3g} ({largest}), and trained weights stay "
                f"far below {HUGE:g}. Lower {lower}, and start again")
    return f"{found}Try a lower {lower}"


def place(tensor: Tensor, tensors: dict[str, Tensor] = {}) -> str:
    """Says "finite", or how many numbers are not and where the first is.

    For a [B, T] tensor of a batch, `tensors`, the place is a row, a token and the token's id.
    """
    if not tensor.is_floating_point() or tensor.isfinite().all():
        return "finite"
    bad = (~tensor.isfinite()).nonzero()
    first, value = bad[0].tolist(), tensor[tuple(bad[0])].item()
    where = f"at {first}"
    if len(first) == 2 and "prompt_lengths" in tensors:
        row, step = first
        at = int(tensors["prompt_lengths"][row]) + step
        where = f"at row {row}, token {step}"
        if at < tensors["tokens"].shape[1]:
            where += f" (id {int(tensors['tokens'][row, at])})"
    return f"NOT FINITE: {len(bad)} of {tensor.numel()}, the first {value} {where}"
