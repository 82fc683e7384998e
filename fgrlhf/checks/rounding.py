"""How far two computations of one log-probability may differ: the rounding of the user's own model.

In float32 the bound is fixed. In bfloat16 the log-probability of a token that was sampled through
the KV cache differs from the scored one by the model's rounding. With SmolLM2-135M the difference
is .06 nats in the root mean square, and .3 nats at most. The rounding is therefore measured, with a
float32 copy of the policy:

    exact      the copy samples two responses, and scores them. This compares the two functions
               without the rounding, so the bound is that of float32.
    rounding   the policy and the copy score the sampled responses:
               r = rms(logp in bfloat16 - logp in float32), over all tokens

Two bfloat16 computations may differ by 3 (1 + 4 / sqrt(n)) r in the root mean square. Rounding
errors that are independent give 1.4 r. The term with n, the number of tokens, is four standard
errors of a root mean square: the answers of a chat model may be a few words. Sampling at
temperature 1 and scoring at 1/0.9 gives 5 r for SmolLM2, and is caught by the exact comparison in
any case.

The copy takes 4 bytes per parameter. When they are not free, only the fixed bound COARSE is left.
"""

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fgrlhf.model import LLaMA
from fgrlhf.rollout import Rollout, sample
from fgrlhf.sequences import score

FINE = 1e-3                     # nats, largest difference in float32
COARSE = 0.1                    # nats, root mean square in bfloat16 when nothing was measured
MARGIN, ERRORS = 3, 4           # times the measured rounding; standard errors of it
TOKENS = 32                     # longest response of the copy


class Rounding(NamedTuple):
    """The measured rounding. `exact` is the largest |log ratio| of the copy, in nats."""

    wide: bool                  # the policy itself is in float32 or wider
    nats: float | None = None   # r, or None when there was no memory for the copy
    exact: float = 0.0
    tokens: int = 1             # over which r was measured

    @property
    def bound(self) -> float:
        """The nats that two computations of log-probabilities may differ, see `apart`."""
        if self.wide:
            return FINE
        return COARSE if self.nats is None else self.margin * self.nats

    @property
    def margin(self) -> float:
        """How many times r `bound` is."""
        return MARGIN * (1 + ERRORS / math.sqrt(self.tokens))

    def apart(self, a: Tensor, b: Tensor) -> float:
        """The difference that `bound` limits: the largest in float32, else the root mean square.

        a, b [N] in nats. It is infinite when a number is not finite.
        """
        difference = (a - b).abs()
        worst = (difference.max() if self.wide else difference.square().mean().sqrt()).item()
        return worst if worst == worst else float("inf")

    def __str__(self) -> str:
        if self.wide:
            return f"at most {self.bound:g}"
        if self.nats is None:
            return f"rms, at most {self.bound:g} (no memory free to measure the rounding)"
        return f"rms, at most {self.bound:.1e}: {self.margin:.1f} times the rounding of bfloat16"


def measure(policy: LLaMA, prompts: list[list[int]], rollout: Rollout, eos_id: int,
            temperature: float, generator: torch.Generator, free: int | None) -> Rounding:
    """Measures the rounding on a sampled batch. A policy in float32 needs no measurement.

    free: the bytes that are free on the policy's device, or None when they are not known. The
    shortest and the longest of the prompts get a response of the float32 copy.
    """
    if policy.head.itemsize >= 4:
        return Rounding(True)
    needed = 4 * sum(p.numel() for p in policy.parameters())
    if free is not None and needed > 0.8 * free:            # the rest is for the passes
        return Rounding(False)
    wide = copy.deepcopy(policy).float()                    # a shared trunk is copied too
    ends = [min(prompts, key=len), max(prompts, key=len)]
    with torch.no_grad():
        own = sample(wide, ends, eos_id, TOKENS, temperature, generator)
        again = score(wide, own.sequences, temperature)
        exact = Rounding(True).apart(again, own.logp_old)
        mask = rollout.sequences.response_mask
        scored, close = (score(model, rollout.sequences, temperature)[mask]
                         for model in (policy, wide))
    return Rounding(False, Rounding(False).apart(scored, close), exact, len(scored))
