"""The batch that stopped a run, looked at again: which tensor is bad, where, and from which row.

`Run.guard` leaves OUT/failed-batch.pt when a number is not finite: every tensor of the step, the
weights as they were, the configuration. The forward pass and the gradient are made again here, row
by row, on the CPU.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from fgrlhf.checkpoint import load_state
from fgrlhf.config import UserError
from fgrlhf.model import LLaMA, LLaMAConfig
from fgrlhf.ppo import policy_loss
from fgrlhf.rollout import Sequences, locate, score


class Headed(nn.Module):
    """A trunk with one number a token: what a reward model and a critic have in common."""

    def __init__(self, config: LLaMAConfig):
        super().__init__()
        self.trunk, self.head = LLaMA(config), nn.Linear(config.dim, 1)

    def forward(self, sequences: Sequences) -> Tensor:
        """[N] values at the response tokens."""
        at = locate(sequences)
        return self.head(self.trunk.hidden(sequences.tokens)[at.row, at.position])[:, 0]


def report(path: str | Path) -> Iterator[str]:
    """Lines on a dumped batch: each tensor, each model's weights, the step made again."""
    dump = load_state(path)
    if not {"step", "config", "models"} <= set(dump):
        raise UserError(f"{path}: expected the failed-batch.pt of a stopped run, got a state with "
                        f"the fields {', '.join(map(str, dump))}")
    tensors = {name: value for name, value in dump.items() if isinstance(value, Tensor)}
    yield f"step {dump['step']} of {json.loads(dump['config'])['out']}"
    for name, tensor in tensors.items():
        yield f"{name:18} {str(tuple(tensor.shape)):12} {place(tensor, tensors)}"
    if not {"tokens", "prompt_lengths", "response_lengths"} <= set(tensors):
        yield "no sequences in this batch: nothing to make again"
        return
    for name, saved in dump["models"].items():
        yield from model_again(name, saved, tensors, json.loads(dump["config"]))


def place(tensor: Tensor, tensors: dict[str, Tensor] = {}) -> str:
    """"finite", or how many are not and where the first is: row and token for a [B, T] tensor."""
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


def model_again(name: str, saved: dict, tensors: dict[str, Tensor],
                config: dict) -> Iterator[str]:
    """The weights, then each row's forward pass and gradient with them."""
    for key, weight in saved["weights"].items():
        if weight.is_floating_point() and not weight.isfinite().all():
            yield f"{name}: weight {key}: {place(weight)}"
    headed = any(key.startswith("trunk.") for key in saved["weights"])
    model = (Headed if headed else LLaMA)(LLaMAConfig(**saved["sizes"]))
    missing, _ = model.load_state_dict(saved["weights"], strict=False)
    if missing:
        yield f"{name}: not made again: the batch has no {missing[0]}"
        return
    sequences = Sequences(*(tensors[part] for part in Sequences._fields))
    bad = 0
    for row in range(len(sequences.tokens)):
        for problem in row_again(model, sequences.rows(slice(row, row + 1)), row, tensors, config):
            bad += 1
            yield f"{name}: row {row}: {problem}"
    yield f"{name}: {len(sequences.tokens)} rows made again, {bad} faults"


def row_again(model: nn.Module, alone: Sequences, row: int, tensors: dict[str, Tensor],
              config: dict) -> Iterator[str]:
    """What is not finite in one row's outputs, loss and gradient."""
    length = int(alone.response_lengths[0])
    if isinstance(model, Headed):
        values, kind = model(alone)[None], "value"
    else:
        values, kind = score(model, alone, config.get("temperature", 1.0)), "logp"
    if not values.isfinite().all():
        yield f"{kind} {place(values[0])}"
        return
    loss = values.mean()
    if kind == "logp" and "advantages" in tensors:
        given = [tensors[name][row:row + 1, :length] for name in ("logp_old", "advantages")]
        loss = policy_loss(model, alone, *given, config["clip_eps"], config["temperature"],
                           length).loss
    if not loss.isfinite():
        yield f"loss is {loss.item()}"
        return
    model.zero_grad(set_to_none=True)
    loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            yield f"gradient of {key}: {place(parameter.grad)}"
            return
