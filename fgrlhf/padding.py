"""Right-padded batches without their padding: all that works token by token runs on real tokens.

A batch [B, T] of rows of unequal lengths holds N <= B T real tokens. Matmuls, norms and gates treat
each token alone, so they run on [1, N]; attention alone needs rows, and gets them back around its
kernel. Results are those of the padded batch; only matmuls of another height round differently.

    strip    [B, T, ..] -> [1, N, ..]     the real tokens, row after row
    restore  [1, N, ..] -> [B, T, ..]     0 in the padding

Each is the other's gradient.
"""

import torch
from torch import Tensor


class Padding:
    """Of rows of these `lengths` [B] int64, on the right, in a batch of T columns."""

    def __init__(self, lengths: Tensor, T: int):
        real = torch.arange(T, device=lengths.device) < lengths[:, None]             # [B, T]
        self.shape, self.index = real.shape, real.flatten().nonzero()[:, 0]          # [N]

    @property
    def positions(self) -> Tensor:
        """[1, N] each real token's place in its row."""
        return (self.index % self.shape[1])[None]

    def strip(self, x: Tensor) -> Tensor:
        return _Move.apply(x, self._strip, self._restore)

    def restore(self, x: Tensor) -> Tensor:
        return _Move.apply(x, self._restore, self._strip)

    def _strip(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.index)[None]

    def _restore(self, x: Tensor) -> Tensor:
        B, T = self.shape
        padded = x.new_zeros(B * T, *x.shape[2:])
        return padded.index_copy_(0, self.index, x[0]).unflatten(0, (B, T))


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.back(grad), None, None
