"""Decoding in steps of fixed shape, which a GPU replays as one captured graph.

A step of LLaMA-7B is a thousand small kernels and more: launched one by one they keep the host as
busy as the card. A CUDA graph records them once, with their addresses, and launches them together.
So nothing in a step may come from the host or change its shape or its place:

    step, slot     the number of the token and its place in the cache are tensors, counted up there
    cache          keys and values go into their slot by index, and all S slots are attended to
    mask           0 or -inf a slot, [b, 1, 1, S]; each step opens its own in place
    rows           stay to the end; one that has ended draws on, and what it draws is cut off after

A step reads all weights, however many rows there are: rows that stay cost their part of the cache,
rows that leave would cost a graph for every number of them. Every LOOK steps the host asks whether
any row is left.

The same step runs uncaptured on any device. On a CPU it is not used: it would read S slots where
the filled ones do, for rows that have ended (rollout.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fgrlhf.model import KVCache, LLaMA

LOOK = 16                       # steps between looks whether every row has ended
WARM_UP = 3                     # steps before the capture: libraries allocate what they keep


class FixedCache(KVCache):
    """A filled `KVCache` to be written at `slot` [1] int64, and read whole under `mask`."""

    def __init__(self, filled: KVCache, open_slots: Tensor):
        self.keys, self.values, self.length = filled.keys, filled.values, filled.length
        self.slot = torch.full((1,), filled.length, device=filled.keys.device)
        closed = torch.zeros(open_slots.shape, device=filled.keys.device, dtype=filled.keys.dtype)
        self.open = closed.masked_fill_(~open_slots, float("-inf"))[:, None, None]   # [b, 1, 1, S]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer], self.values[layer]
        return keys.index_copy_(2, self.slot, k), values.index_copy_(2, self.slot, v)

    def mask(self, T: int, key_mask: Tensor | None, like: Tensor) -> Tensor:
        return self.open


class Drawn(NamedTuple):
    """Responses in the order of the cache's rows; 0 behind their ends."""

    tokens: Tensor              # [b, T] int64
    logp: Tensor                # [b, T]
    lengths: Tensor             # [b] int64, EOS counted; T where there is none
    truncated: Tensor           # [b] bool, True where no EOS came


class Decoder:
    """What a step reads and writes: every tensor is made here and keeps its address."""

    def __init__(self, policy: LLaMA, filled: KVCache, lengths: Tensor, uniform: Tensor,
                 draw: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]):
        """lengths [b] of the prompts in the cache; uniform [b, T] float64; draw(logits [b, V], u
        [b]) -> token [b], logp [b], by operations that do not ask the device for a result."""
        (b, T), device = uniform.shape, lengths.device
        slots = torch.arange(filled.keys.shape[3], device=device)
        self.policy, self.uniform, self.draw = policy, uniform, draw
        self.cache = FixedCache(filled, slots < lengths[:, None])
        self.position = lengths.clone()                                 # [b] of the next token
        self.t = torch.zeros(1, dtype=torch.long, device=device)        # [1] its number
        self.token = torch.zeros(b, dtype=torch.long, device=device)    # [b] the last one drawn
        self.wide = torch.promote_types(policy.head.dtype, torch.float32)
        self.drawn = torch.zeros(b, T, dtype=torch.long, device=device)
        self.logp = torch.zeros(b, T, device=device, dtype=self.wide)

    def put(self, hidden: Tensor) -> None:
        """Draw token t of every row from the hidden state [b, D] before it."""
        logits = (hidden @ self.policy.head.T).to(self.wide)                             # [b, V]
        token, logp = self.draw(logits, self.uniform.index_select(1, self.t)[:, 0])
        self.drawn.index_copy_(1, self.t, token[:, None])
        self.logp.index_copy_(1, self.t, logp[:, None])
        self.token.copy_(token)
        self.t.add_(1)

    def step(self) -> None:
        """Pass the last tokens through the policy, then draw the next."""
        self.cache.open.index_fill_(3, self.cache.slot, 0.0)
        hidden = self.policy.hidden(self.token[:, None], self.position[:, None], cache=self.cache)
        self.position.add_(1)
        self.cache.slot.add_(1)
        self.put(hidden[:, 0])

    def state(self) -> list[Tensor]:
        """What a step changes, but for what the next one of the same number overwrites."""
        return [self.cache.open, self.cache.slot, self.position, self.t, self.token]

    def captured(self) -> Callable[[], None]:
        """`step` as a CUDA graph to replay. The state is left as it was."""
        before = [x.clone() for x in self.state()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.step()
                for x, was in zip(self.state(), before):
                    x.copy_(was)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):                                   # records, runs nothing
            self.step()
        return graph.replay

    @torch.no_grad()
    def run(self, hidden: Tensor, eos_id: int) -> Drawn:
        """T tokens a row, or until every row has ended, from the prefill's last states [b, D]."""
        self.put(hidden)
        T = self.drawn.shape[1]
        capture = T > 1 and hidden.device.type == "cuda"
        step = self.captured() if capture else self.step
        for t in range(1, T):
            if t % LOOK == 0 and (self.drawn[:, :t] == eos_id).any(1).all():
                break
            step()
        ended = self.drawn == eos_id
        truncated = ~ended.any(1)
        lengths = torch.where(truncated, T, ended.int().argmax(1) + 1)
        real = torch.arange(T, device=hidden.device) < lengths[:, None]
        return Drawn(self.drawn * real, self.logp * real, lengths, truncated)
