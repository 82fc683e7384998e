"""Adam, or Muon for the trunk's matrices beside it, in float32 whatever the weights are kept in.

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      w = w - lr m^ / (sqrt(v^) + 1e-5)

Weights in bfloat16 have a float32 master copy, which is what is stepped and saved; the weights are
the master rounded. A step of 1e-5 would vanish in a weight's 8 bits. Their gradients are added up
in float32 too, as each backward makes them, so that microbatches change nothing (rule 6).

`in_backward` steps each parameter as soon as its gradient is there and frees the gradient: the peak
is without gradients, and the norm is then clipped a parameter at a time, not over all of them. It
needs the whole minibatch in one backward pass.

Muon (Jordan et al. 2024; torch's own) orthogonalises the momentum of each matrix inside the trunk,
in bfloat16; embedding, norms, adapters and reward heads stay with Adam. With several ranks it works
on whole matrices, which every rank then holds: for large models give 0 as its learning rate.
"""

import math

import torch
from torch import Tensor, nn

from fgrlhf import distributed
from fgrlhf.config import UserError

WIDE = (torch.float32, torch.float64)


class Optimizer:
    """AdamW and Muon over the trainable parameters of `model`, with linear warm-up.

    `muon_lr` 0 leaves everything to Adam. The learning rate warms up linearly over `warmup` steps,
    then falls linearly to 0 at `steps` (steps = 0: stays constant).
    """

    def __init__(self, model: nn.Module, lr: float, warmup: int = 0, steps: int = 0,
                 muon_lr: float = 0.0, weight_decay: float = 0.0, clip_norm: float = 1.0,
                 in_backward: bool = False):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        is_matrix = [bool(muon_lr) and p.dim() == 2 and "layers." in n and "lora_" not in n
                     for n, p in named]
        self.masters = [_master(p, whole=muon) for p, muon in zip(self.parameters, is_matrix)]
        self.narrow = any(p.dtype not in WIDE for p in self.parameters)
        matrices = [m for m, muon in zip(self.masters, is_matrix) if muon]
        others = [m for m in self.masters if not any(m is x for x in matrices)]
        one_at_a_time = lambda group: [[m] for m in group] if in_backward else [group]
        unmixed = len({distributed.is_sharded(m) for m in others}) < 2     # fused takes one kind
        self.parts = [torch.optim.AdamW(group, lr=lr, betas=(0.9, 0.999), eps=1e-5,
                                        weight_decay=weight_decay, fused=unmixed)
                      for group in one_at_a_time(others)]
        if matrices:
            self.parts += [torch.optim.Muon(group, lr=muon_lr, weight_decay=weight_decay,
                                            adjust_lr_fn="match_rms_adamw")
                           for group in one_at_a_time(matrices)]
        self.base = [part.param_groups[0]["lr"] for part in self.parts]
        self.warmup, self.steps, self.count = warmup, steps, 0
        self.clip_norm, self.in_backward, self.square = clip_norm, in_backward, 0.0
        for parameter, master in zip(self.parameters, self.masters):
            if in_backward or parameter.dtype not in WIDE:
                parameter.register_post_accumulate_grad_hook(self._hook(master))

    def _hook(self, master: Tensor):
        """What happens to a parameter's gradient once a backward pass has made it."""
        parts = [(part, base) for part, base in zip(self.parts, self.base)
                 if part.param_groups[0]["params"][0] is master]

        def step(parameter: Tensor) -> None:
            _widen(parameter, master)
            norm = self._clipped([master])
            self.square += norm ** 2
            self._step(parts)
            _round(master, parameter)

        return step if self.in_backward else lambda parameter: _widen(parameter, master)

    def _clipped(self, parameters: list[Tensor]) -> float:
        """Clip these gradients together; returns their norm before, which must be finite."""
        norm = distributed.clip_gradients(parameters, self.clip_norm)
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm} at optimizer step {self.count}")
        return norm

    def _step(self, parts: list[tuple[torch.optim.Optimizer, float]]) -> None:
        """Step and clear these parts at the learning rate of the present step."""
        factor = min(1.0, (self.count + 1) / self.warmup) if self.warmup else 1.0
        if self.steps:
            left = (self.steps - self.count) / max(1, self.steps - self.warmup)
            factor = min(factor, max(0.0, left))
        for part, base in parts:
            part.param_groups[0]["lr"] = base * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def step(self) -> float:
        """Clip the gradient's norm, step, clear; returns the norm before clipping.

        With `in_backward` all that has happened already, and this counts the step.
        """
        if self.in_backward:
            norm, self.square = math.sqrt(self.square), 0.0
        else:
            pairs = list(zip(self.parameters, self.masters))
            for parameter, master in pairs:
                _widen(parameter, master)
            distributed.sum_gradients([m for p, m in pairs if not distributed.is_sharded(p)])
            norm = self._clipped(self.masters)
            self._step(list(zip(self.parts, self.base)))
            for parameter, master in pairs:
                _round(master, parameter)
        self.count += 1
        return norm

    def allocate(self) -> None:
        """Make the moments, as zeros, for a sharded state to be read into."""
        for part in self.parts:
            group = part.param_groups[0]
            lr, group["lr"] = group["lr"], 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
            part.step()
            part.zero_grad(set_to_none=True)
            group["lr"] = lr

    def state_dict(self) -> dict:
        masters = [m.detach() for m in self.masters] if self.narrow else []
        return {"count": self.count, "parts": [part.state_dict() for part in self.parts],
                "masters": masters}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]
        for part, saved in zip(self.parts, state["parts"]):
            here = {"fused": part.defaults["fused"]} if "fused" in part.defaults else {}
            groups = [group | here for group in saved["param_groups"]]  # ranks may be others now
            part.load_state_dict(saved | {"param_groups": groups})
        copies = state["masters"] or [distributed.whole(p.detach()) if m is not p else m
                                      for p, m in zip(self.parameters, self.masters)]
        with torch.no_grad():
            for master, copy in zip(self.masters, copies):
                master.copy_(copy)


def check_in_backward(wanted: bool, microbatch: int) -> None:
    """Refuse what a step inside backward cannot do: add up gradients, or wait for other ranks."""
    if wanted and (microbatch or distributed.size() > 1):
        raise UserError("--step-in-backward: expected --microbatch 0 and one process; a gradient "
                        "that is added up must be held")


def _master(parameter: Tensor, whole: bool) -> Tensor:
    """What is stepped for a parameter: itself, or its copy in float32, for Muon unsharded."""
    if parameter.dtype in WIDE and not (whole and distributed.is_sharded(parameter)):
        return parameter
    kept = distributed.whole(parameter.detach()) if whole else parameter.detach()
    return nn.Parameter(kept.float())


def _widen(parameter: Tensor, master: Tensor) -> None:
    """Add a parameter's gradient to its master's, in float32, and free it."""
    if master is parameter or parameter.grad is None:
        return
    alike = distributed.is_sharded(parameter) == distributed.is_sharded(master)
    wide = (parameter.grad if alike else distributed.whole(parameter.grad)).float()
    master.grad = wide if master.grad is None else master.grad.add_(wide)
    parameter.grad = None


@torch.no_grad()
def _round(master: Tensor, parameter: Tensor) -> None:
    """Put a master back into its parameter."""
    if master is not parameter:
        parameter.copy_(distributed.like(master.detach().to(parameter.dtype), parameter))
