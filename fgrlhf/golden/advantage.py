"""Equations (5) and (6), reward-to-go and GAE (paper, sections 2.2 and 3.1), term by term."""

from collections.abc import Callable

import torch
from torch import Tensor

from fgrlhf.golden.case import GARBAGE, Case, Draw, mask_of, number

LENGTHS, T = (5, 1, 3), 5


def batch(name: str, *names: str) -> dict[str, Tensor]:
    """Tensors [B, T] with garbage in the padding, and their mask."""
    draw, mask = Draw(name), mask_of(LENGTHS, T)
    return {n: torch.where(mask, draw.numbers(3, T, scale=2.0), GARBAGE) for n in names} \
        | {"mask": mask}


def fill(lengths: tuple[int, ...], value: Callable[[int, int], float], width: int = T) -> Tensor:
    """[B, width] with value(b, t) on real tokens and 0 in the padding."""
    rows = [[float(value(b, t)) if t < length else 0.0 for t in range(width)]
            for b, length in enumerate(lengths)]
    return number(rows)


def standardised(x: Tensor, lengths: tuple[int, ...], how: str, eps: float) -> Tensor:
    """(x - mean) / (std + eps), or x / (rms + eps), over the real tokens of the whole batch."""
    real = [float(x[b, t]) for b, length in enumerate(lengths) for t in range(length)]
    mean = sum(real) / len(real) if how == "mean-std" else 0.0
    spread = (sum((value - mean) ** 2 for value in real) / len(real)) ** 0.5
    return fill(lengths, lambda b, t: (float(x[b, t]) - mean) / (spread + eps), x.shape[1])


def standardisation() -> list[Case]:
    formulas = {"rms": "y = x / (rms + eps), rms = sqrt(mean(x^2))",
                "mean-std": "y = (x - mean) / (std + eps), std of the population"}
    found = []
    for how, formula in formulas.items():
        for name, lengths in ((f"standardise-{how}", LENGTHS),
                              (f"standardise-{how}-one-token", (0, 1, 0))):
            mask = mask_of(lengths, T)
            x = torch.where(mask, batch(name, "x")["x"], GARBAGE)
            x[1, 0] = 1.5                                        # the token of the second variant
            found.append(Case(name, "2.2", "(6)",
                              f"{formula}. All means are over the real tokens of the whole batch. "
                              "y is 0 in the padding.", {"how": how, "eps": 1e-6},
                              {"x": x, "mask": mask}, {"y": standardised(x, lengths, how, 1e-6)}))
    return found


def kl_penalty() -> Case:
    given, beta = batch("advantages", "rewards", "logp_old", "logp_ref"), 0.125
    r, old, ref = given["rewards"], given["logp_old"], given["logp_ref"]
    penalised = fill(LENGTHS, lambda b, t: r[b, t] - beta * (old[b, t] - ref[b, t]))
    return Case("advantages", "2.2", "(5), (6)",
                "penalised [B, T] = rewards - beta (logp_old - logp_ref). advantages [B, T] = "
                "penalised / (rms + eps), rms of penalised over the real tokens of the whole "
                "batch. Both are 0 in the padding.", {"beta": beta, "eps": 1e-6}, given,
                {"penalised": penalised,
                 "advantages": standardised(penalised, LENGTHS, "rms", 1e-6)})


def reward_to_go() -> Case:
    given, gamma = batch("reward-to-go", "rewards"), 0.875
    r = given["rewards"]
    return Case("reward-to-go", "2.2", "G_t",
                "G [B, T]: G_t = sum_k>=t gamma^(k-t) r_k over the response, 0 in the padding. "
                "With gamma = 0 the return of a token is its own reward, as in the paper.",
                {"gamma": gamma}, given,
                {"G": fill(LENGTHS, lambda b, t: sum(gamma ** (k - t) * r[b, k]
                                                     for k in range(t, LENGTHS[b])))})


def gae() -> Case:
    given, gamma, lam = batch("gae", "rewards", "values"), 0.875, 0.75
    r, V = given["rewards"], given["values"]

    def delta(b, t):
        return r[b, t] + gamma * (V[b, t + 1] if t + 1 < LENGTHS[b] else 0.0) - V[b, t]

    advantages = fill(LENGTHS, lambda b, t: sum((gamma * lam) ** (k - t) * delta(b, k)
                                                for k in range(t, LENGTHS[b])))
    return Case("gae", "3.1", "GAE",
                "Generalised advantage estimation of the PPO-RLHF baseline. advantages [B, T] = "
                "sum_k>=t (gamma lam)^(k-t) delta_k, delta_t = r_t + gamma V_t+1 - V_t; the value "
                "after the last token is 0. returns [B, T] = advantages + values. Both are 0 in "
                "the padding and not standardised.", {"gamma": gamma, "lam": lam}, given,
                {"advantages": advantages,
                 "returns": fill(LENGTHS, lambda b, t: advantages[b, t] + V[b, t])})


def cases() -> list[Case]:
    return [kl_penalty(), *standardisation(), reward_to_go(), gae()]
