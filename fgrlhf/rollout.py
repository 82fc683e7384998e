"""Sampling responses with the KV cache: step 1 of PPO.

    u_t uniform in [0, 1)     token t = the first token whose cumulative probability exceeds u_t

`sample` samples one batch, `sample_on_ranks` a share of it on each rank. `sample_by_step` is the
loop; a GPU replays its own form of the loop as one graph (engine/graph.py).

The distribution is softmax(logits / temperature), without top-k or top-p: those would make sampling
and scoring two different distributions (rule 2). sequences.py states the index convention.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fgrlhf.engine import distributed
from fgrlhf.model import KVCache, LLaMA
from fgrlhf.prompts import same_prompts
from fgrlhf.sequences import Sequences
from kernels.three_matmuls import LN2

PREFILL = 16                    # prompts per forward pass: enough for the matmuls, little padding
LARGE, COLUMNS = 8192, 1024     # see `logits_of`


class Rollout(NamedTuple):
    """One sampled response per prompt. `logp_old[:, t]` is 0 where response_mask is False."""

    sequences: Sequences
    logp_old: Tensor            # [B, T] log pi_old(token t | before) at `temperature`
    truncated: Tensor           # [B] bool, True where the token limit came before EOS

    def to(self, device) -> "Rollout":
        return Rollout(*(part.to(device) for part in self))


@torch.no_grad()
def sample(policy: LLaMA, prompts: list[list[int]], eos_id: int, max_new_tokens: int,
           temperature: float = 1.0, generator: torch.Generator | None = None) -> Rollout:
    """Samples one response to each prompt, by inverse CDF from one uniform number per (row, step).

    The uniforms are drawn up front for the whole batch. A response therefore depends on its prompt
    and its row number, not on the other rows or on when they end, as long as the longest prompt
    leaves room for `max_new_tokens` in the context. Temperature 0 is greedy; its logp is that of
    temperature 1.

    prompts: B lists of at least one id. T is the longest response: `max_new_tokens`, or for all
    rows what the longest prompt leaves. A response without EOS by then is `truncated`.
    """
    device = policy.head.device
    tokens, lengths = lay_out(prompts, max_new_tokens, policy.config.max_seq_len, device)
    T = tokens.shape[1] - int(lengths.max())
    uniform = torch.rand(len(prompts), max_new_tokens, generator=generator, dtype=torch.float64)
    if device.type == "cuda" and distributed.size() == 1:   # a graph cannot hold sharded weights
        from fgrlhf.engine.graph import sample_by_graph as decode
    else:
        decode = sample_by_step
    return decode(policy, tokens, lengths, uniform[:, :T].to(device), eos_id, temperature)


@torch.no_grad()
def sample_on_ranks(policy: LLaMA, prompts: list[list[int]], eos_id: int, max_new_tokens: int,
                    temperature: float, generator: torch.Generator, at_once: int = 0) -> Rollout:
    """Like `sample`, but each rank samples its own prompts, `at_once` of them at a time (0: all).

    Every rank returns all responses. They are the same for any number of ranks and any `at_once`,
    as long as all prompts leave room for `max_new_tokens` in the context.
    """
    start, stop = distributed.rank_range(len(prompts))
    at_once = at_once or max(1, stop - start)
    # Skip the numbers that lower ranks use.
    torch.rand(start, max_new_tokens, generator=generator, dtype=torch.float64)
    with distributed.gathered(policy):
        parts = [sample(policy, prompts[i:min(i + at_once, stop)], eos_id, max_new_tokens,
                        temperature, generator) for i in range(start, stop, at_once)]
    if distributed.size() > 1:
        everyone = distributed.from_all_ranks([part.to("cpu") for part in parts])
        parts = [part.to(policy.head.device) for part in everyone]
    return join(parts)


def join(rollouts: list[Rollout]) -> Rollout:
    """Puts rollouts below one another in one batch, padded to the longest row and response."""
    if len(rollouts) == 1:
        return rollouts[0]

    def stack(parts: list[Tensor]) -> Tensor:
        width = max(part.shape[1] for part in parts)
        return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])
    tokens, prompt_lengths, response_lengths = zip(*(r.sequences for r in rollouts))
    sequences = Sequences(stack(tokens), torch.cat(prompt_lengths), torch.cat(response_lengths))
    return Rollout(sequences, stack([r.logp_old for r in rollouts]),
                   torch.cat([r.truncated for r in rollouts]))


def lay_out(prompts: list[list[int]], max_new_tokens: int, context: int,
            device) -> tuple[Tensor, Tensor]:
    """Returns (tokens, lengths [B]): the prompts right-padded, with T free columns behind them.

    T is `max_new_tokens`, or what the longest prompt leaves of the context if that is less. Raises
    ValueError when a prompt fills the context.
    """
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = int(lengths.max())
    if longest >= context:
        raise ValueError(f"prompts: expected fewer than max_seq_len = {context} tokens, "
                         f"got {longest}")
    width = min(longest + max_new_tokens, context)
    tokens = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = torch.tensor(prompt)
    return tokens, lengths


@torch.inference_mode()
def sample_by_step(policy: LLaMA, tokens: Tensor, lengths: Tensor, uniform: Tensor, eos_id: int,
                   temperature: float) -> Rollout:
    """The loop of `sample`. Rows leave the batch when their response ends.

    tokens [B, S] and lengths [B] are those of `lay_out`; uniform [B, T] float64 in [0, 1).
    """
    (B, T), longest, device = uniform.shape, int(lengths.max()), tokens.device
    wide = torch.promote_types(policy.head.dtype, torch.float32)
    with torch.inference_mode(False):       # these results are used later, in backward passes
        logp_old = torch.zeros(B, T, device=device, dtype=wide)
        response_lengths = torch.full((B,), T, device=device)
        truncated = torch.ones(B, dtype=torch.bool, device=device)

    alive = lengths.argsort(stable=True)                         # [b] batch row of each cache row
    cache = KVCache(policy.config, B, tokens.shape[1], device, policy.head.dtype)
    hidden = prefill(policy, tokens, lengths, alive, cache)                                 # [B, D]
    ragged = longest != int(lengths.min())
    for t in range(T):
        logits = logits_of(hidden, policy.head).to(wide)                                    # [b, V]
        token, logp = choose(logits, uniform[alive, t], temperature)                        # [b]
        position = lengths[alive] + t
        tokens[alive, position] = token
        logp_old[alive, t] = logp
        ended = token == eos_id
        if ended.any():
            response_lengths[alive[ended]] = t + 1
            truncated[alive[ended]] = False
            left = compact(~ended)
            alive, token, position = alive[left], token[left], position[left]
            cache.keep(left)
        if len(alive) == 0 or t == T - 1:
            break
        real = real_slots(lengths[alive], longest, longest + t + 1) if ragged else None
        hidden = policy.hidden(token[:, None], position[:, None], real, cache)[:, 0]
    sequences = Sequences(tokens, lengths, response_lengths).rows(slice(None))
    return Rollout(sequences, logp_old[:, :int(response_lengths.max())], truncated)


def prefill(policy: LLaMA, tokens: Tensor, lengths: Tensor, order: Tensor,
            cache: KVCache) -> Tensor:
    """Fills the cache with the prompts in the given `order` [B].

    Returns [B, D], the hidden state of each prompt's last token. A few rows of similar length go
    through the model at a time, so that little of the work is padding. Rows with the same prompt
    copy the keys and values of the first of them (see `same_prompts`).
    """
    tokens, lengths, last = tokens[order], lengths[order], []
    rows = copies = torch.arange(len(order), device=order.device)
    first = same_prompts(tokens, lengths, tokens.numel())
    if first is not None:
        rows, copies = first.unique(return_inverse=True)
    for start in range(0, len(rows), PREFILL):
        some = rows[start:start + PREFILL]
        longest = int(lengths[some].max())
        part = cache.part(slice(start, start + len(some)))
        hidden = policy.hidden(tokens[some, :longest], cache=part)               # [b, P, D]
        last.append(hidden[torch.arange(len(some)), lengths[some] - 1])
    cache.length = int(lengths.max())
    if first is not None:
        cache.spread(copies)
    return torch.cat(last)[copies]


def logits_of(hidden: Tensor, head: Tensor) -> Tensor:
    """Returns hidden head^T, [b, V], for hidden [b, D] and head [V, D], without gradient.

    A CPU computes the columns of a large vocabulary in parts. For 2 to 64 rows in float32 this
    took 0.6 to 0.8 of the time (bench/README.md), and every number was the same.
    """
    parts = head.device.type == "cpu" and head.dtype == torch.float32 and len(head) >= LARGE
    if not parts or len(hidden) == 1:
        return hidden @ head.T
    logits = hidden.new_empty(len(hidden), len(head))
    for part, words in zip(logits.split(COLUMNS, 1), head.split(COLUMNS)):
        torch.mm(hidden, words.T, out=part)
    return logits


def real_slots(lengths: Tensor, longest: int, slots: int) -> Tensor:
    """[b, slots] bool: False for the padding between a prompt's end and slot `longest`.

    The responses of all rows start at slot `longest` of the cache, whatever the prompts' lengths.
    """
    slot = torch.arange(slots, device=lengths.device)
    return (slot < lengths[:, None]) | (slot >= longest)


def compact(going: Tensor) -> Tensor:
    """The rows where going [b] is True, reordered so that few of them move: the last fill gaps."""
    n = int(going.sum())
    rows = torch.arange(n, device=going.device)
    rows[~going[:n]] = n + going[n:].nonzero()[:, 0]
    return rows


def choose(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Chooses a token and its logp, [b] each. Temperature 0 is greedy, with logp at temperature 1.

    logits [b, V], uniform [b] in [0, 1).
    """
    if temperature:
        return inverse_cdf(logits / temperature, uniform)
    token = logits.argmax(-1)
    return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]


def inverse_cdf(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the first token whose cumulative probability exceeds u, and its logp, [b] each.

    logits [b, V], uniform [b]: u, float64 in [0, 1). One power per logit gives both results. The
    base is 2, because 2^x costs a third of e^x on a CPU.
    """
    bits = logits / LN2
    bits -= bits.amax(-1, keepdim=True)
    cdf = bits.exp2().cumsum(-1, dtype=torch.float64)                            # [b, V]
    total = cdf[:, -1:]
    token = torch.searchsorted(cdf, uniform[:, None] * total, right=True)
    token = token.clamp(max=logits.shape[1] - 1)
    logp = LN2 * (bits.gather(1, token) - total.log2().to(bits.dtype))
    return token[:, 0], logp[:, 0]
