"""The loss kernels on given inputs: values and gradients in one list, to compare devices.

KERNELS maps the name of a kernel to run(form, inputs), where form is "fused" or "reference". It
returns the values and then the gradients as a list of tensors.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from kernels import (
    clipped_surrogate, exact_kl, linear_cross_entropy, linear_logp, linear_ppo, three_matmuls,
    token_preference)
from kernels.token_preference import Lengths, Options, Unchanged

TEMPERATURE, CLIP = 0.8, 0.2


def inputs(n: int, d: int, v: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draws inputs of N tokens, width D and vocabulary V on the CPU, rounded to `dtype`.

    logp_old is chosen so that no ratio is close to a bound of the clipping, where rounding would
    decide whether a token has a gradient.
    """
    draw = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=draw)
    given = {"hidden": randn(n, d).to(dtype), "head": (randn(v, d) / d ** 0.5).to(dtype),
             "hidden_ref": randn(n, d).to(dtype), "head_ref": (randn(v, d) / d ** 0.5).to(dtype),
             "targets": torch.randint(v, (n,), generator=draw), "advantages": randn(n),
             "weights": randn(n).abs(), "rewards": randn(2, n // 16, 16).to(dtype),
             "masks": torch.rand(2, n // 16, 16, generator=draw) < 0.3}
    logp = linear_logp.reference(given["hidden"].float(), given["head"].float(), given["targets"],
                                 TEMPERATURE).logp
    moves = torch.tensor([-0.6, -0.05, 0.05, 0.6])          # the bounds are log 0.8 and log 1.2
    return given | {"logp_old": logp + moves[torch.randint(4, (n,), generator=draw)]}


def _leaves(given: dict[str, Tensor], *names: str) -> list[Tensor]:
    return [given[name].detach().clone().requires_grad_() for name in names]


def _logp(form: str, given: dict[str, Tensor]) -> list[Tensor]:
    leaves = _leaves(given, "hidden", "head")
    out = getattr(linear_logp, form)(*leaves, given["targets"], TEMPERATURE, True)
    loss = (out.logp * given["weights"]).sum()
    return [*out, *torch.autograd.grad(loss, leaves)]


def _cross_entropy(form: str, given: dict[str, Tensor]) -> list[Tensor]:
    leaves = _leaves(given, "hidden", "head")
    out = getattr(linear_cross_entropy, form)(*leaves, given["targets"], given["weights"])
    return [*out, *torch.autograd.grad(out.loss, leaves)]


def _ppo(form: str, given: dict[str, Tensor]) -> list[Tensor]:
    leaves = _leaves(given, "hidden", "head")
    out = getattr(linear_ppo, form)(*leaves, given["targets"], given["logp_old"],
                                    given["advantages"], CLIP, TEMPERATURE)
    return [out.loss, out.logp, out.entropy, *torch.autograd.grad(out.loss, leaves)]


def _kl(form: str, given: dict[str, Tensor]) -> list[Tensor]:
    leaves = _leaves(given, "hidden", "head")
    kl = getattr(exact_kl, form)(*leaves, given["hidden_ref"], given["head_ref"], TEMPERATURE)
    return [kl, *torch.autograd.grad((kl * given["weights"]).sum(), leaves)]


def _surrogate(form: str, given: dict[str, Tensor]) -> list[Tensor]:
    logp = (given["logp_old"] + 0.05).detach().requires_grad_()
    out = getattr(clipped_surrogate, form)(logp, given["logp_old"], given["advantages"], CLIP,
                                           given["weights"] > 0.5)
    return [out.loss, *torch.autograd.grad(out.loss, [logp])]


def _preference(form: str, given: dict[str, Tensor]) -> list[Tensor]:
    chosen, rejected = (x.clone().requires_grad_() for x in given["rewards"].detach())
    B, T = chosen.shape
    every = torch.arange(B, device=chosen.device)
    out = getattr(token_preference, form)(
        chosen, rejected, *given["masks"], Unchanged(every, every % T, (every + 3) % T),
        Lengths(every % T + 1, T - every % T), Options("share", "difference", 0.3, 0.7))
    return [out.loss, out.margin, *torch.autograd.grad(out.loss, [chosen, rejected])]


KERNELS: dict[str, Callable[[str, dict[str, Tensor]], list[Tensor]]] = {
    "log-probabilities and entropy": _logp, "cross-entropy": _cross_entropy, "PPO loss": _ppo,
    "exact KL": _kl, "clipped surrogate": _surrogate, "token preference": _preference}


def error_of(found: list[Tensor], exact: list[Tensor]) -> float:
    """Returns the largest |found - exact| / max |exact| over the tensors.

    It is infinite when a number is not finite.
    """
    worst = 0.0
    for a, b in zip(found, exact, strict=True):
        error = ((a.detach().cpu().double() - b.detach()).abs().max() / b.detach().abs().max())
        worst = max(worst, error.item() if error.isfinite() else float("inf"))
    return worst


@contextlib.contextmanager
def several_chunks():
    """A block in which the kernels use small chunks and tiles, so that there are several."""
    small = ((three_matmuls, "CHUNK", 256), (three_matmuls, "LOGITS", 2**15),
             (linear_logp, "TILE", 2**16), (exact_kl, "TILE", 2**16))
    before = [getattr(module, name) for module, name, _ in small]
    for module, name, size in small:
        setattr(module, name, (size, size))
    try:
        yield
    finally:
        for (module, name, _), value in zip(small, before):
            setattr(module, name, value)


def spread(n: int, d: int, v: int, device: torch.device) -> float:
    """Returns the largest difference of logp between scoring and the update's loss in bfloat16."""
    draw = torch.Generator(device).manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=draw, device=device)
    hidden, head = randn(n, d).bfloat16(), (4 * randn(v, d) / d ** 0.5).bfloat16()
    targets = torch.randint(v, (n,), generator=draw, device=device)
    scored = linear_logp.score(hidden, head, targets, 1.0, False).logp
    zeros = torch.zeros_like(scored)
    updated = linear_ppo.fused(hidden.requires_grad_(), head, targets, zeros, zeros, CLIP).logp
    return (scored - updated).abs().max().item()
