"""Adam, and Muon for the matrices of the trunk, in float32 whatever dtype the weights have.

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      w = w - lr m^ / (sqrt(v^) + 1e-5)

Weights in bfloat16 have a float32 master copy. The master is stepped and saved, and the weight is
the rounded master: a step of 1e-5 would vanish in the 8 bits of a bfloat16 weight. The gradients of
such weights are added up in float32 too, as each backward pass makes them, so that microbatches
change nothing (rule 6).

Muon (Jordan et al. 2024) orthogonalises the momentum of each matrix inside the trunk. Embedding,
norms, adapters and reward heads stay with Adam. With several ranks Muon works on whole matrices,
which every rank then holds: for large models give 0 as its learning rate.
"""

import math

import torch
from torch import Tensor, nn

from fgrlhf.engine import distributed

WIDE = (torch.float32, torch.float64)


class Muon(torch.optim.Optimizer):
    """Steps each matrix along its orthogonalised Nesterov momentum, in float32.

        m = b m + (1 - b) g     u = b m + (1 - b) g     w = w - lr 0.2 sqrt(max(rows, columns)) O(u)

    O(u) replaces the singular values of u by numbers near 1, with five Newton-Schulz steps. The
    factor behind lr gives the step the root mean square of a step of Adam. torch.optim.Muon does
    the same in bfloat16, which takes ten times as long on a CPU without bfloat16 instructions.
    """

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state, b = self.state[matrix], group["momentum"]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix.grad)
                state["momentum"].lerp_(matrix.grad, 1 - b)
                update = orthogonalise(matrix.grad.lerp(state["momentum"], b))
                matrix.sub_(update, alpha=group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


def orthogonalise(u: Tensor, steps: int = 5) -> Tensor:
    """O(u): keeps the singular vectors of u [rows, columns] and maps its singular values near 1.

    Each step applies the odd polynomial x (a + b x^2 + c x^4) to the singular values, with Jordan's
    coefficients.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = u.T if u.shape[0] > u.shape[1] else u
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


class Optimizer:
    """AdamW and Muon over the trainable parameters of `model`, with warm-up and decay.

    The learning rate rises linearly over `warmup` steps, then falls linearly to 0 at step `steps`
    (steps = 0: it stays constant). `muon_lr` 0 leaves everything to Adam. `head_lr` is the rate of
    Adam for `model.head`, the linear head of a reward model; None: `lr`.
    """

    def __init__(self, model: nn.Module, lr: float, warmup: int = 0, steps: int = 0,
                 muon_lr: float = 0.0, weight_decay: float = 0.0, clip_norm: float = 1.0,
                 head_lr: float | None = None):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        is_matrix = [bool(muon_lr) and p.dim() == 2 and "layers." in n and "lora_" not in n
                     for n, p in named]
        self.masters = [_master(p, whole=muon) for p, muon in zip(self.parameters, is_matrix)]
        matrices = [m for m, muon in zip(self.masters, is_matrix) if muon]
        is_head = [head_lr is not None and n.startswith("head.") for n, _ in named]
        heads = [m for m, head in zip(self.masters, is_head) if head]
        others = [m for m, muon, head in zip(self.masters, is_matrix, is_head)
                  if not muon and not head]
        self.parts = [_adam(others, lr, weight_decay)]
        if heads:
            self.parts.append(_adam(heads, head_lr, weight_decay))
        if matrices:
            self.parts.append(Muon(matrices, muon_lr))
        self.whole_on_ranks = [m for p, m in zip(self.parameters, self.masters)
                               if not distributed.is_sharded(p)]
        self.base = [part.param_groups[0]["lr"] for part in self.parts]
        self.warmup, self.steps, self.count, self.clip_norm = warmup, steps, 0, clip_norm
        for parameter, master in zip(self.parameters, self.masters):
            if parameter.dtype not in WIDE:
                parameter.register_post_accumulate_grad_hook(
                    lambda parameter, master=master: _widen(parameter, master))

    def step(self) -> float:
        """Clips the norm of the gradient, steps, and clears the gradient.

        Returns the norm before clipping. Raises FloatingPointError when it is not finite; the
        weights are then still as they were.
        """
        pairs = list(zip(self.parameters, self.masters))
        for parameter, master in pairs:
            _widen(parameter, master)
        norm = distributed.clip_gradients(self.masters, self.whole_on_ranks, self.clip_norm)
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm} at optimizer step {self.count + 1}")
        for part, base in zip(self.parts, self.base):
            part.param_groups[0]["lr"] = base * self._schedule()
            part.step()
            part.zero_grad(set_to_none=True)
        for parameter, master in pairs:
            _round(master, parameter)
        self.count += 1
        return norm

    def _schedule(self) -> float:
        """Returns the factor of the learning rate at the present step."""
        factor = min(1.0, (self.count + 1) / self.warmup) if self.warmup else 1.0
        if self.steps:
            left = (self.steps - self.count) / max(1, self.steps - self.warmup)
            factor = min(factor, max(0.0, left))
        return factor

    def allocate(self) -> None:
        """Makes the moments, as zeros, so that a sharded state can be read into them."""
        for part in self.parts:
            group = part.param_groups[0]
            lr, group["lr"] = group["lr"], 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
            part.step()
            part.zero_grad(set_to_none=True)
            group["lr"] = lr

    def state_dict(self) -> dict:
        narrow = any(p.dtype not in WIDE for p in self.parameters)
        return {"count": self.count, "parts": [part.state_dict() for part in self.parts],
                "masters": [m.detach() for m in self.masters] if narrow else []}

    def load_state_dict(self, state: dict) -> None:
        """Loads moments, master weights and the step. Raises ValueError when a shape differs.

        The settings of the run are those of its flags, which are compared before.
        """
        self.count = int(state["count"])
        for part, saved in zip(self.parts, state["parts"], strict=True):
            parameters = part.param_groups[0]["params"]
            for number, moments in saved["state"].items():
                _check_shapes(parameters[number], *(x for x in moments.values() if x.dim()))
            part.load_state_dict({"state": saved["state"],
                                  "param_groups": part.state_dict()["param_groups"]})
        copies = state["masters"] or [distributed.whole(p.detach()) if m is not p else m
                                      for p, m in zip(self.parameters, self.masters)]
        with torch.no_grad():
            for master, copy in zip(self.masters, copies, strict=True):
                _check_shapes(master, copy)
                master.copy_(copy)


def _adam(parameters: list[Tensor], lr: float, weight_decay: float) -> torch.optim.AdamW:
    one_kind = len({distributed.is_sharded(p) for p in parameters}) < 2     # "fused" needs one kind
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-5,
                             weight_decay=weight_decay, fused=one_kind)


def _check_shapes(parameter: Tensor, *saved: Tensor) -> None:
    if any(x.shape != parameter.shape for x in saved):
        raise ValueError(f"expected {tuple(parameter.shape)}, "
                         f"got {[tuple(x.shape) for x in saved]}")


def _master(parameter: Tensor, whole: bool) -> Tensor:
    """Returns what is stepped for a parameter: itself, or a float32 copy (for Muon, unsharded)."""
    if parameter.dtype in WIDE and not (whole and distributed.is_sharded(parameter)):
        return parameter
    kept = distributed.whole(parameter.detach()) if whole else parameter.detach()
    return nn.Parameter(kept.float())


def _widen(parameter: Tensor, master: Tensor) -> None:
    """Adds the gradient of a parameter to the gradient of its master, in float32, and frees it."""
    if master is parameter or parameter.grad is None:
        return
    alike = distributed.is_sharded(parameter) == distributed.is_sharded(master)
    wide = (parameter.grad if alike else distributed.whole(parameter.grad)).float()
    master.grad = wide if master.grad is None else master.grad.add_(wide)
    parameter.grad = None


@torch.no_grad()
def _round(master: Tensor, parameter: Tensor) -> None:
    """Copies a master back into its parameter, rounded to the parameter's dtype."""
    if master is not parameter:
        parameter.copy_(distributed.like(master.detach().to(parameter.dtype), parameter))
