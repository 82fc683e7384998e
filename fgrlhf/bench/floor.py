"""The floor of the benchmarks: the bare matmuls of training, generation and a PPO iteration.

Layers and heads multiply the real tokens, without padding: one product forward, two backward.
Attention multiplies its full T x T (a kernel that skips the masked half does less). Generation
takes one token at a time, and includes the products with the KV cache. Norms, rotation, softmax,
activations, sampling, loss and optimizer are not included.
"""

from collections import Counter

import torch
from torch import Tensor

from fgrlhf.model import KVCache, LLaMA
from fgrlhf.sequences import Sequences


class Floor:
    """The matmuls of a piece of work. Calling it runs them, into buffers that exist already."""

    def __init__(self, model: LLaMA):
        self.model, self.products, self.buffers, self.shapes = model, [], {}, Counter()

    def __call__(self) -> None:
        for product, a, b, out in self.products:
            product(a, b, out=out)

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Returns the buffer of this name and shape. It is made at the first call."""
        head = self.model.head
        if (name, shape) not in self.buffers:
            self.buffers[name, shape] = torch.randn(shape, device=head.device, dtype=head.dtype)
        return self.buffers[name, shape]

    def product(self, a: Tensor, b: Tensor) -> None:
        """Adds one matmul, a @ b."""
        out = self.buffer("out", *a.shape[:-1], b.shape[-1])
        self.products.append((torch.bmm if a.ndim == 3 else torch.mm, a, b, out))
        self.shapes[tuple(a.shape), tuple(b.shape)] += 1

    def linear(self, n: int, weight: Tensor, gradient: bool) -> None:
        """Adds y = x W^T, [n, out]; with gradient also dx = dy W and dW = dy^T x."""
        x, y = self.buffer("in", n, weight.shape[1]), self.buffer("in", n, weight.shape[0])
        self.product(x, weight.detach().T)
        if gradient:
            self.product(y, weight.detach())
            self.product(y.T, x)

    def attention(self, B: int, T: int, gradient: bool) -> None:
        """Adds q k^T and P v for B rows of T tokens; with gradient also dP, dV, dQ and dK."""
        c = self.model.config
        x = self.buffer("in", B * c.n_heads, T, c.head_dim)
        P = self.buffer("in", B * c.n_heads, T, T)
        for _ in range(2 if gradient else 1):
            self.product(x, x.mT)                                                # scores, dP
        for left in (P, P.mT, P, P.mT) if gradient else (P,):
            self.product(left, x)                                                # y, dV, dQ, dK

    def trunk(self, lengths: list[int], gradient: bool = False) -> None:
        """Adds one pass of all blocks over rows of these lengths."""
        for block in self.model.layers:
            for weight in (p for p in block.parameters() if p.ndim == 2):
                self.linear(sum(lengths), weight, gradient)
            for T, B in Counter(lengths).items():
                self.attention(B, T, gradient)

    def head(self, n: int, gradient: bool = False) -> None:
        """Adds the logits of n tokens."""
        self.linear(n, self.model.head, gradient)

    def generation(self, prompt: int, responses: list[int]) -> None:
        """Adds a prefill, then one token at a time for the rows that have not ended.

        prompt: the length of every prompt; responses: the length of each response.
        """
        c, B = self.model.config, len(responses)
        cache = KVCache(c, B, prompt + max(responses), self.model.head.device,
                        self.model.head.dtype)
        keys, values = cache.keys.flatten(1, 2), cache.values.flatten(1, 2)  # [layers, B G, S, K]
        self.trunk([prompt] * B)
        self.head(B)
        for t in range(1, max(responses)):
            b, S = sum(n > t for n in responses), prompt + t
            for layer, block in enumerate(self.model.layers):
                for weight in (p for p in block.parameters() if p.ndim == 2):
                    self.linear(b, weight, gradient=False)
                rows, group = b * c.n_kv_heads, c.n_heads // c.n_kv_heads
                self.product(self.buffer("in", rows, group, c.head_dim), keys[layer, :rows, :S].mT)
                self.product(self.buffer("in", rows, group, S), values[layer, :rows, :S])
            self.head(b)


def iteration_floor(policy: LLaMA, sequences: Sequences, scoring: list[Tensor],
                    updates: list[Tensor], critic: bool) -> Floor:
    """Returns the floor of one PPO iteration.

    The policy generates. Reference, reward model (and critic) pass over each group of rows in
    `scoring`. The policy (and the critic) is updated on each group in `updates`. Log-probabilities
    and values do not need the last token of a row; rewards do.
    """
    floor, responses = Floor(policy), sequences.response_lengths
    floor.generation(int(sequences.prompt_lengths[0]), responses.tolist())
    total = sequences.lengths
    for rows in scoring:
        floor.trunk((total[rows] - 1).tolist())                                  # reference
        floor.head(int(responses[rows].sum()))
        floor.trunk(total[rows].tolist())                                        # reward
        if critic:
            floor.trunk((total[rows] - 1).tolist())
    for rows in updates:
        floor.trunk((total[rows] - 1).tolist(), gradient=True)
        floor.head(int(responses[rows].sum()), gradient=True)
        if critic:
            floor.trunk((total[rows] - 1).tolist(), gradient=True)
    return floor
