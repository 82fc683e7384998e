"""Prompts that several rows share are computed once: their keys and values serve every response.

Both sides of an edit answer one prompt, and so do the responses of a group. On human edits the
prompt is 3 to 15 times longer than a response. With B responses y to P prompts x, a pass computes

    x_1 .. x_P, y_1 .. y_B      in place of      x y_1 .. x y_B, with a prompt per response

Matmuls, norms and gates see these N tokens once each. Attention takes two calls: the prompts by
themselves, and the responses, whose queries see the keys of their own prompt and their own earlier
tokens. The gradients of a shared prompt add up. Only the rounding differs from whole rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fgrlhf.model import Padding, attention


def same_prompts(tokens: Tensor, lengths: Tensor, total: int) -> Tensor | None:
    """Returns the first row with the same prompt, [B] int64, for each row of a batch.

    tokens [B, S] start with prompts of `lengths` [B]. `total` counts all tokens, with responses.
    Returns None, which keeps rows whole, unless

        all prompts > 2 x all responses     in tokens, so the prompts are where the time goes
        tokens saved > total / 8            when each prompt is computed once

    The built-in world has short prompts. Its rows stay whole, so no result changes its last bit.
    """
    if 3 * int(lengths.sum()) <= 2 * total:
        return None
    seen: dict[bytes, int] = {}
    prompts = zip(tokens.cpu().numpy(), lengths.tolist())
    first = torch.tensor([seen.setdefault(ids[:length].tobytes(), row)
                          for row, (ids, length) in enumerate(prompts)], device=tokens.device)
    again = first != torch.arange(len(first), device=first.device)
    return first if 8 * int(lengths[again].sum()) > total else None


class SharedPrompts(Padding):
    """Converts rows [B, T, ..] to their N different tokens [1, N, ..] and back.

    The N tokens are those of the P prompts, then those of the B responses, without padding.

    prompts, responses: lengths [B], each at least 1. first [B]: see `same_prompts`. T: the columns.
    """

    def __init__(self, prompts: Tensor, responses: Tensor, first: Tensor, T: int):
        B, device = len(first), first.device
        rows, self.prompt = first.unique(return_inverse=True)                # [P], [B]
        self.prompts = Padding(prompts[rows], int(prompts.max()))
        self.responses = Padding(responses, int(responses.max()))
        P, R = self.prompts.shape[1], self.responses.shape[1]                # the longest of each
        place, row = self.prompts.index, self.responses.index // R
        self.shape, self.split = (B, T), len(place)
        self.index = torch.cat([rows[place // P] * T + place % P,
                                row * T + prompts[row] + self.responses.index % R])      # [N]
        # Where each slot of [B, T] finds its token among the N. The padding finds a 0 behind them.
        N, column = len(self.index), torch.arange(T, device=device)
        start = (prompts[rows].cumsum(0) - prompts[rows])[self.prompt, None]             # [B, 1]
        source = torch.where(column < prompts[:, None], start + column, N).flatten()
        source[self.index[self.split:]] = torch.arange(self.split, N, device=device)
        self.source = source
        own = torch.ones(R, P + R, dtype=torch.bool, device=device).tril(P)
        real = F.pad(torch.arange(P, device=device) < prompts[:, None], (0, R), value=True)
        self.visible = (own & real[:, None])[:, None]                        # [B, 1, R, P + R]

    def strip(self, x: Tensor) -> Tensor:
        """[B, T, ..] -> [1, N, ..]: each prompt from the first row that has it."""
        return x.flatten(0, 1)[self.index][None]

    def restore(self, x: Tensor) -> Tensor:
        """[1, N, D] -> [B, T, D]: whole rows, with 0 in the padding."""
        return F.pad(x[0], (0, 0, 0, 1))[self.source].unflatten(0, self.shape)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attends within each row: [1, N, heads, K] -> [1, N, H, K]. Rows share their prompts."""
        at = self.split
        q_prompt, k_prompt, v_prompt = (self.prompts.restore(x[:, :at]).transpose(1, 2)
                                        for x in (q, k, v))                  # [P, heads, .., K]
        q_own, k_own, v_own = (self.responses.restore(x[:, at:]).transpose(1, 2)
                               for x in (q, k, v))                           # [B, heads, .., K]
        keys = torch.cat([k_prompt[self.prompt], k_own], 2)
        values = torch.cat([v_prompt[self.prompt], v_own], 2)
        y_prompt = attention(q_prompt, k_prompt, v_prompt)
        y_own = attention(q_own, keys, values, self.visible)
        return torch.cat([self.prompts.strip(y_prompt.transpose(1, 2)),
                          self.responses.strip(y_own.transpose(1, 2))], 1)
