"""Equation (7), the critic's loss, AdamW, Muon, and a whole step of fine-grained PPO (2.2)."""

import torch
from torch import Tensor

from fgrlhf.golden.advantage import standardised
from fgrlhf.golden.case import GARBAGE, Case, Draw, gradients, leaves, mask_of, number
from fgrlhf.golden.likelihood import heads
from fgrlhf.golden.transformer import RESPONSES, batch, log_softmax, padded, response_logp, weights

EPS = 0.25


def clipped(logp: Tensor, logp_old: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """The loss of equation (7) over N tokens, and its statistics."""
    terms, outside, k1, k3 = [], 0, [], []
    for now, old, advantage in zip(logp, logp_old, advantages):
        ratio = torch.exp(now - old)
        bound = min(max(ratio, number(1 - EPS)), number(1 + EPS))
        terms.append(min(ratio * advantage, bound * advantage))
        outside += bool((ratio < 1 - EPS) | (ratio > 1 + EPS))
        k1.append(-torch.log(ratio))
        k3.append(ratio - 1 - torch.log(ratio))
    mean = lambda values: sum(values) / len(terms)
    return {"loss": -mean(terms), "clip_fraction": number(outside / len(terms)),
            "kl_k1": mean(k1).detach(), "kl_k3": mean(k3).detach()}


def drifts(count: int) -> Tensor:
    """log ratios below, inside and above the clip range, in turn. None is near its ends."""
    return number([(-0.5, -0.125, 0.0625, 0.375)[k % 4] for k in range(count)])


FORMULA = ("ratio = exp(logp - logp_old). loss = -mean of min(ratio A, clip(ratio, 1 - clip_eps, 1 "
           "+ clip_eps) A). clip_fraction: the fraction of ratios outside the clip range. kl_k1 = "
           "mean(-log ratio), kl_k3 = mean(ratio - 1 - log ratio). ")
CLIPPING = "clipped = g min(1, max_norm / (norm + 1e-6))"


def clipped_loss() -> Case:
    draw = Draw("clipped-loss")
    mask = mask_of([8, 3], 8)
    logp = torch.where(mask, draw.numbers(2, 8) - 2, GARBAGE)
    logp_old = torch.where(mask, logp - drifts(16).reshape(2, 8), -GARBAGE)
    signs = number([1, 1, 1, 1, -1, -1, -1, -1] * 2).reshape(2, 8)   # each drift with each sign
    advantages = torch.where(mask, signs * (draw.numbers(2, 8).abs() + 0.5), GARBAGE)
    (leaf,) = leaves(logp)
    out = clipped(leaf[mask], logp_old[mask], advantages[mask])
    return Case("clipped-loss", "2.2", "(7)",
                FORMULA + "All means are over the tokens of mask; A are the advantages. grad_logp "
                "[B, T] is 0 in the padding.",
                {"clip_eps": EPS}, {"logp": logp, "logp_old": logp_old, "advantages": advantages,
                                    "mask": mask}, out | gradients(out["loss"], logp=leaf))


def linear_ppo() -> Case:
    hidden, head, targets, draw = heads("linear-ppo")
    h, w = leaves(hidden, head)
    temperature, N = 1.25, len(hidden)
    logps = [log_softmax(h[i] @ w.T / temperature) for i in range(N)]
    logp = torch.stack([row[y] for row, y in zip(logps, targets)])
    logp_old = ((logp.detach() - drifts(N)) * 1024).round() / 1024
    advantages = draw.numbers(N, scale=2.0)
    out = clipped(logp, logp_old, advantages)
    entropy = sum(-(row.exp() * row).sum() for row in logps) / N
    return Case("linear-ppo", "2.2", "(7)",
                "logp [N] = log softmax(hidden head^T / temperature)[target]. " + FORMULA
                + "A are the advantages. entropy: the mean in nats. grad_hidden and grad_head are "
                "gradients of loss.",
                {"clip_eps": EPS, "temperature": temperature},
                {"hidden": hidden, "head": head, "targets": targets, "logp_old": logp_old,
                 "advantages": advantages},
                out | {"logp": logp, "entropy": entropy}
                | gradients(out["loss"], hidden=h, head=w))


def value_loss() -> Case:
    draw = Draw("value-loss")
    mask = mask_of([4, 2, 5], 5)
    values, values_old, returns = (torch.where(mask, draw.numbers(3, 5, scale=2.0), GARBAGE)
                                   for _ in range(3))
    (leaf,) = leaves(values)
    terms = []
    for value, old, target in zip(leaf[mask], values_old[mask], returns[mask]):
        bound = old + min(max(value - old, number(-EPS)), number(EPS))
        terms.append(max((value - target) ** 2, (bound - target) ** 2))
    loss = sum(terms) / len(terms) / 2
    return Case("value-loss", "3.1", "L_V",
                "The critic's loss of the PPO-RLHF baseline: loss = 1/2 mean of max((V - G)^2, "
                "(V_old + clip(V - V_old, -clip_eps, clip_eps) - G)^2) over the tokens of mask, G "
                "the returns. grad_values [B, T] is 0 in the padding.", {"clip_eps": EPS},
                {"values": values, "values_old": values_old, "returns": returns, "mask": mask},
                {"loss": loss} | gradients(loss, values=leaf))


def adamw(x: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, o: dict) -> dict[str, Tensor]:
    """One step of AdamW. `step` counts from 1, `o` holds the options of the case."""
    x = x - o["lr"] * o["weight_decay"] * x
    m = o["beta1"] * m + (1 - o["beta1"]) * g
    v = o["beta2"] * v + (1 - o["beta2"]) * g ** 2
    mean, square = m / (1 - o["beta1"] ** step), v / (1 - o["beta2"] ** step)
    return {"x": x - o["lr"] * mean / (torch.sqrt(square) + o["eps"]), "m": m, "v": v}


ADAMW = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-5, "weight_decay": 0.0}
ADAMW_FORMULA = ("x <- x - lr weight_decay x. m <- beta1 m + (1 - beta1) g. v <- beta2 v + (1 - "
                 "beta2) g^2. x <- x - lr m' / (sqrt(v') + eps), m' = m / (1 - beta1^step), v' = v "
                 "/ (1 - beta2^step): eps is outside the root and added after the correction of v. "
                 "Outputs: the new x, m, v.")


def adamw_step() -> Case:
    draw, options = Draw("adamw"), ADAMW | {"lr": 0.125, "weight_decay": 0.25, "step": 3}
    x, g, m = (draw.numbers(3, 4) for _ in range(3))
    g[0], m[0] = draw.numbers(4, scale=2.0 ** -14), draw.numbers(4, scale=2.0 ** -14)   # ~ eps
    v = draw.numbers(3, 4).abs() * 2.0 ** -10
    v[0] = draw.numbers(4).abs() * 2.0 ** -28
    v[1, 0] = m[1, 0] = g[1, 0] = 0.0
    return Case("adamw", "torch", "AdamW", ADAMW_FORMULA, options,
                {"x": x, "g": g, "m": m, "v": v}, adamw(x, g, m, v, 3, options))


MUON = {"lr": 0.125, "momentum": 0.95, "a": 3.4445, "b": -4.775, "c": 2.0315, "steps": 5}


def orthogonalised(u: Tensor, o: dict) -> Tensor:
    """O(u) by the singular value decomposition, which Newton-Schulz steps avoid."""
    left, values, right = torch.linalg.svd(u, full_matrices=False)
    values = values / torch.sqrt((u * u).sum())
    for _ in range(o["steps"]):
        values = o["a"] * values + o["b"] * values ** 3 + o["c"] * values ** 5
    return left @ torch.diag(values) @ right


def muon() -> Case:
    """A matrix with more rows than columns, and one with fewer: the step has the longer side."""
    draw, given, made = Draw("muon"), {}, {}
    for name, shape in (("tall", (5, 3)), ("wide", (4, 6))):
        x, g, m = (draw.numbers(*shape) for _ in range(3))
        b = MUON["momentum"]
        momentum = b * m + (1 - b) * g
        step = orthogonalised(b * momentum + (1 - b) * g, MUON)
        given |= {f"x_{name}": x, f"g_{name}": g, f"m_{name}": m}
        made |= {f"x_{name}": x - MUON["lr"] * 0.2 * max(shape) ** 0.5 * step,
                 f"m_{name}": momentum}
    return Case("muon", "Jordan et al. 2024", "Muon",
                "One step for each of two matrices x [rows, columns] with gradient g and momentum "
                "m. m <- momentum m + (1 - momentum) g. u = momentum m + (1 - momentum) g with the "
                "new m. O(u): X = u / sqrt(sum of u^2), then `steps` times X <- a X + b X X^T X + "
                "c X X^T X X^T X, without an epsilon, for tall and wide matrices alike. x <- x - "
                "lr 0.2 sqrt(max(rows, columns)) O(u). Outputs: the new x and m of both.",
                MUON, given, made)


def norm_and_factor(grads: list[Tensor], max_norm: float) -> tuple[Tensor, float]:
    """Returns (the norm of all gradients together, the factor that clips them)."""
    norm = torch.sqrt(sum((g * g).sum() for g in grads))
    return norm, min(1.0, max_norm / (float(norm) + 1e-6))


def clip_gradients() -> Case:
    g = Draw("clip-gradients").numbers(2, 6)
    g[1] *= 2.0 ** -4                                           # below the limit: not clipped
    norms, factors = zip(*(norm_and_factor([row], 1.0) for row in g))
    return Case("clip-gradients", "torch", "gradient norm",
                "Each row of g [N, n] holds all gradients of one step. norm [N] is the norm of "
                "each row. " + CLIPPING + ".", {"max_norm": 1.0}, {"g": g},
                {"norm": torch.stack(norms), "clipped": g * number(factors)[:, None]})


def ppo_step() -> Case:
    draw, given, start = Draw("ppo-step"), batch("ppo-step"), weights()
    options = ADAMW | {"beta": 0.125, "standardise_eps": 1e-6, "clip_eps": EPS,
                       "temperature": 1.25, "max_norm": 1.0, "lr": 2.0 ** -10}
    w = dict(zip(start, leaves(*start.values())))
    mask = mask_of(RESPONSES, max(RESPONSES))
    logp = padded(response_logp(given, w, options["temperature"]), max(RESPONSES))
    drift = drifts(mask.numel()).reshape(mask.shape)
    logp_old = torch.where(mask, ((logp.detach() - drift) * 1024).round() / 1024, GARBAGE)
    logp_ref = torch.where(mask, logp_old + draw.numbers(*mask.shape), -GARBAGE)
    rewards = torch.where(mask, draw.numbers(*mask.shape, scale=2.0), GARBAGE)

    penalised = torch.where(mask, rewards - options["beta"] * (logp_old - logp_ref), 0.0)
    advantages = standardised(penalised, RESPONSES, "rms", options["standardise_eps"])
    out = clipped(logp[mask], logp_old[mask], advantages[mask])
    grads = torch.autograd.grad(out["loss"], list(w.values()))
    norm, factor = norm_and_factor(grads, options["max_norm"])
    moved = {name: adamw(x, g * factor, number(0.0), number(0.0), 1, options)["x"]
             for (name, x), g in zip(start.items(), grads)}
    return Case("ppo-step", "2.2", "(5)-(7)",
                "One step of fine-grained PPO. logp [B, T] as in response-logp. advantages [B, T] "
                "as in advantages. " + FORMULA + "All means are over the real response tokens. "
                "grad.NAME: the gradient of each weight; gradient_norm: the norm of all together. "
                "Then the gradients g are clipped: " + CLIPPING + ". new.NAME: each weight after "
                "the first step of adamw, from m = v = 0.", options,
                given._asdict() | {"logp_old": logp_old, "logp_ref": logp_ref, "rewards": rewards},
                out | {"logp": logp, "advantages": advantages, "gradient_norm": norm}
                | {f"grad.{name}": g for name, g in zip(start, grads)}
                | {f"new.{name}": x for name, x in moved.items()},
                model=True, float64=1e-10, float32=1e-4)


def cases() -> list[Case]:
    return [clipped_loss(), linear_ppo(), value_loss(), clip_gradients(), adamw_step(), muon(),
            ppo_step()]
