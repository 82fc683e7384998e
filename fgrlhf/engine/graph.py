"""Decoding in steps of fixed shape, which a GPU replays as one CUDA graph.

A decoding step of LLaMA-7B launches more than a thousand small kernels. Launched one by one, they
keep the host as busy as the GPU. A CUDA graph records the kernels once, with the addresses of their
tensors, and launches them together. A step may therefore take no value from the host, and may not
change the shape or the address of a tensor:

    step, slot     the index of the token, and its slot in the cache, are tensors on the device
    cache          keys and values are written into their slot by index; attention reads all S slots
    mask           0 or -inf per slot, [b, 1, 1, S]; each step sets its own slot to 0 in place
    rows           stay until the end; what a row draws after its EOS is removed afterwards

Keeping ended rows is cheap: a step reads all weights for any number of rows. Removing rows would
need a new graph for every number of rows. Every LOOK steps the host checks whether all have ended.

The same step also runs without a graph, on any device. On a CPU `rollout.sample_by_step` is faster:
it reads only the filled slots, and only the rows that have not ended.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fgrlhf.model import KVCache, LLaMA
from fgrlhf.rollout import Rollout, choose, prefill
from fgrlhf.sequences import Sequences

LOOK = 16                       # steps between two checks whether every row has ended
WARM_UP = 3                     # steps before the capture, in which libraries allocate memory


class FixedCache(KVCache):
    """A prefilled KVCache that is written at `slot`, [1] int64, and read whole under a mask."""

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
    """Responses in the order of the rows of the cache, 0 after their ends."""

    tokens: Tensor              # [b, T] int64
    logp: Tensor                # [b, T]
    lengths: Tensor             # [b] int64, EOS counted; T when there is no EOS
    truncated: Tensor           # [b] bool, True when there is no EOS


class Decoder:
    """The tensors that a step reads and writes. They are made once and keep their addresses."""

    def __init__(self, policy: LLaMA, filled: KVCache, lengths: Tensor, uniform: Tensor,
                 draw: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]):
        """Starts from a cache filled with prompts.

        lengths [b] of the prompts; uniform [b, T] float64 in [0, 1); draw(logits [b, V], u [b])
        returns (token [b], logp [b]) and must not read a result from the device.
        """
        (b, T), device = uniform.shape, lengths.device
        slots = torch.arange(filled.keys.shape[3], device=device)
        self.policy, self.uniform, self.draw = policy, uniform, draw
        self.cache = FixedCache(filled, slots < lengths[:, None])
        self.position = lengths.clone()                                 # [b] of the last token
        self.t = torch.zeros(1, dtype=torch.long, device=device)        # [1] index of the next
        self.token = torch.zeros(b, dtype=torch.long, device=device)    # [b] the last token drawn
        self.wide = torch.promote_types(policy.head.dtype, torch.float32)
        self.drawn = torch.zeros(b, T, dtype=torch.long, device=device)
        self.logp = torch.zeros(b, T, device=device, dtype=self.wide)

    def put(self, hidden: Tensor) -> None:
        """Draws token t of every row from the hidden state [b, D] one position before it."""
        logits = (hidden @ self.policy.head.T).to(self.wide)                             # [b, V]
        token, logp = self.draw(logits, self.uniform.index_select(1, self.t)[:, 0])
        self.drawn.index_copy_(1, self.t, token[:, None])
        self.logp.index_copy_(1, self.t, logp[:, None])
        self.token.copy_(token)
        self.t.add_(1)

    def step(self) -> None:
        """Passes the last tokens through the policy and draws the next tokens."""
        self.cache.open.index_fill_(3, self.cache.slot, 0.0)
        hidden = self.policy.hidden(self.token[:, None], self.position[:, None], cache=self.cache)
        self.position.add_(1)
        self.cache.slot.add_(1)
        self.put(hidden[:, 0])

    def state(self) -> list[Tensor]:
        """Returns the tensors to restore when a step is to be repeated.

        The others that a step changes (cache, drawn, logp) are overwritten when it is repeated.
        """
        return [self.cache.open, self.cache.slot, self.position, self.t, self.token]

    def captured(self) -> Callable[[], None]:
        """Returns the replay of `step` as a CUDA graph. The state stays as it was."""
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
        with torch.cuda.graph(graph):                                   # records without running
            self.step()
        return graph.replay

    @torch.no_grad()
    def run(self, hidden: Tensor, eos_id: int) -> Drawn:
        """Draws T tokens per row, or fewer when every row has ended.

        hidden [b, D]: the hidden state of the last token of each prompt.
        """
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


@torch.no_grad()
def sample_by_graph(policy: LLaMA, tokens: Tensor, lengths: Tensor, uniform: Tensor, eos_id: int,
                    temperature: float) -> Rollout:
    """The loop of `rollout.sample` in steps of fixed shape. It draws the same responses."""
    B, T = uniform.shape
    order = lengths.argsort(stable=True)                         # [b] batch row of each cache row
    cache = KVCache(policy.config, B, tokens.shape[1], tokens.device, policy.head.dtype)
    hidden = prefill(policy, tokens, lengths, order, cache)                                 # [B, D]
    decoder = Decoder(policy, cache, lengths[order], uniform[order],
                      lambda logits, u: choose(logits, u, temperature))
    drawn = Drawn(*(part[order.argsort()] for part in decoder.run(hidden, eos_id)))
    tokens.scatter_(1, lengths[:, None] + torch.arange(T, device=tokens.device), drawn.tokens)
    sequences = Sequences(tokens, lengths, drawn.lengths).rows(slice(None))
    return Rollout(sequences, drawn.logp[:, :int(drawn.lengths.max())], drawn.truncated)
