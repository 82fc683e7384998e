"""Batched sampling with the KV cache, and the one function that scores responses.

The index convention of the whole project: `logp[:, t]` scores response token t, from the hidden
state one position before it; what belongs to token t itself (its reward) is read at its own
position. Prompt and response ids are concatenated, never re-tokenised; padding is on the right, so
masks are lengths.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fgrlhf import distributed
from fgrlhf.graph import Decoder, Drawn
from fgrlhf.model import KVCache, LLaMA
from kernels import linear_logp
from kernels.three_matmuls import LN2

PREFILL = 16                    # prompts a forward pass: enough for the matmuls, little padding
SPARE = 2**17                   # pairs of tokens that cost less, as padding, than another pass


class Sequences(NamedTuple):
    """Prompts with their responses, right-padded. S is the longest row, T the longest response."""

    tokens: Tensor              # [B, S] int64, prompt ids, response ids (EOS included), padding
    prompt_lengths: Tensor      # [B] int64
    response_lengths: Tensor    # [B] int64, EOS counted

    @property
    def lengths(self) -> Tensor:
        """[B] int64, prompt and response together."""
        return self.prompt_lengths + self.response_lengths

    @property
    def response_mask(self) -> Tensor:
        """[B, T] bool, True where response token t exists."""
        steps = torch.arange(int(self.response_lengths.max()), device=self.tokens.device)
        return steps < self.response_lengths[:, None]

    def rows(self, index: Tensor | slice) -> "Sequences":
        """The chosen batch rows, padding cut to the longest of them."""
        chosen = Sequences(*(part[index] for part in self))
        return chosen._replace(tokens=chosen.tokens[:, :int(chosen.lengths.max())])


class Rollout(NamedTuple):
    """What sampling hands on. `logp_old[:, t]` is 0 where response_mask is False."""

    sequences: Sequences
    logp_old: Tensor            # [B, T] log pi_old(token t | before) at `temperature`; >= float32
    truncated: Tensor           # [B] bool, True where the token limit came before EOS


class Located(NamedTuple):
    """Where the N real response tokens of a batch are, row by row."""

    row: Tensor                 # [N] batch row
    step: Tensor                # [N] t, index within the response
    position: Tensor            # [N] position within `tokens`
    target: Tensor              # [N] the token's id


def by_length(sequences: Sequences, rows: list[int], size: int) -> list[Tensor]:
    """`rows` in the order of their lengths, in groups of at most `size` (0: any number).

    Attention alone works on padding: on n S^2 pairs of tokens for n rows in S columns. A group ends
    where more than SPARE of them would be padding.
    """
    lengths = sequences.lengths.tolist()
    groups, real = [], 0
    for row in sorted(rows, key=lambda row: lengths[row]):
        pairs = lengths[row] ** 2
        full = not groups or len(groups[-1]) == (size or len(rows))
        if full or (len(groups[-1]) + 1) * pairs > real + pairs + SPARE:
            groups.append([])
            real = 0
        groups[-1].append(row)
        real += pairs
    return [torch.tensor(group) for group in groups]


def locate(sequences: Sequences) -> Located:
    """Index vectors for the real response tokens; everything per token is gathered with them."""
    row, step = sequences.response_mask.nonzero(as_tuple=True)
    position = sequences.prompt_lengths[row] + step
    return Located(row, step, position, sequences.tokens[row, position])


def states_before(model: LLaMA, sequences: Sequences, at: Located) -> Tensor:
    """[N, D] the hidden state that each response token is chosen from, one position before it.

    The last token's own state is not needed: no pass is made over the last column.
    """
    hidden = model.hidden(sequences.tokens[:, :-1], lengths=sequences.lengths - 1)
    return hidden[at.row, at.position - 1]


def unflatten(values: Tensor, at: Located, sequences: Sequences) -> Tensor:
    """[N] per-token values -> [B, T], 0 in the padding."""
    shape = (len(sequences.tokens), int(sequences.response_lengths.max()))
    return values.new_zeros(shape).index_put((at.row, at.step), values)


def pack(prompts: list[list[int]], responses: list[list[int]], pad_id: int = 0,
         device=None) -> Sequences:
    """Concatenate ids row by row and pad on the right. `pad_id` is inert: no mask reads it."""
    if empty := [i for i, (p, r) in enumerate(zip(prompts, responses)) if not p or not r]:
        raise ValueError("pack: expected a prompt and a response of at least one token, "
                         f"row {empty[0]} has none")
    rows = [torch.tensor(p + r) for p, r in zip(prompts, responses)]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    return Sequences(tokens.to(device), torch.tensor([len(p) for p in prompts], device=device),
                     torch.tensor([len(r) for r in responses], device=device))


def score(model: LLaMA, sequences: Sequences, temperature: float = 1.0) -> Tensor:
    """logp [B, T] of every response token, 0 in the padding. Differentiable.

    The policy's update, the reference and every control call this one function, at the temperature
    of sampling; logits exist for response positions only, a chunk at a time.
    """
    at = locate(sequences)
    hidden = states_before(model, sequences, at)                                 # [N, D]
    logp = linear_logp.fused(hidden, model.head, at.target, temperature).logp    # [N]
    return unflatten(logp, at, sequences)


def in_groups(function: Callable[[Sequences], Tensor], sequences: Sequences,
              groups: list[Tensor]) -> Tensor:
    """function(sequences) -> [B, T] without gradient, computed a group of rows at a time; 0 in rows
    of no group."""
    B, T = len(sequences.tokens), int(sequences.response_lengths.max())
    with torch.inference_mode():
        parts = [function(sequences.rows(rows)) for rows in groups]
    dtype = parts[0].dtype if parts else torch.float32
    result = torch.zeros(B, T, device=sequences.tokens.device, dtype=dtype)
    for rows, part in zip(groups, parts):
        result[rows, :part.shape[1]] = part
    return result


def lay_out(prompts: list[list[int]], max_new_tokens: int, context: int,
            device) -> tuple[Tensor, Tensor]:
    """(tokens, lengths [B]): the prompts right-padded, with T more columns behind the longest.

    T is `max_new_tokens`, or what the longest prompt leaves of the context where that is less.
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


@torch.no_grad()
def sample(policy: LLaMA, prompts: list[list[int]], eos_id: int, max_new_tokens: int,
           temperature: float = 1.0, generator: torch.Generator | None = None) -> Rollout:
    """Sample one response to each prompt, by inverse CDF from one uniform number per (row, step).

    The uniforms are drawn up front for the whole batch, so a response does not depend on which rows
    share its batch or when they end. temperature 0 is greedy, its logp those of temperature 1. No
    top-k and no top-p: they would make sampling and scoring two distributions (rule 2).

    prompts: B lists of at least one id. Returns a Rollout whose T is the longest response, at most
    `max_new_tokens`; a response without EOS by then, or at the context's end, is `truncated`.
    """
    device = policy.head.device
    tokens, lengths = lay_out(prompts, max_new_tokens, policy.config.max_seq_len, device)
    T = tokens.shape[1] - int(lengths.max())
    uniform = torch.rand(len(prompts), max_new_tokens, generator=generator, dtype=torch.float64)
    by_graph = device.type == "cuda" and distributed.size() == 1    # sharded: FSDP's own streams
    return (sample_by_graph if by_graph else sample_by_step)(
        policy, tokens, lengths, uniform[:, :T].to(device), eos_id, temperature)


@torch.inference_mode()
def sample_by_step(policy: LLaMA, tokens: Tensor, lengths: Tensor, uniform: Tensor, eos_id: int,
                   temperature: float) -> Rollout:
    """The loop of `sample`, in a batch that shrinks as responses end."""
    (B, T), longest, device = uniform.shape, int(lengths.max()), tokens.device
    wide = torch.promote_types(policy.head.dtype, torch.float32)
    with torch.inference_mode(False):           # these are handed on, to where gradients are made
        logp_old = torch.zeros(B, T, device=device, dtype=wide)
        response_lengths = torch.full((B,), T, device=device)
        truncated = torch.ones(B, dtype=torch.bool, device=device)

    alive = lengths.argsort(stable=True)                         # batch row of each cache row
    cache = KVCache(policy.config, B, tokens.shape[1], device, policy.head.dtype)
    hidden = prefill(policy, tokens, lengths, alive, cache)                                 # [B, D]
    ragged = longest != int(lengths.min())
    for t in range(T):
        logits = (hidden @ policy.head.T).to(wide)                                          # [b, V]
        token, logp = choose(logits, uniform[alive, t], temperature)                        # [b]
        at = lengths[alive] + t
        tokens[alive, at] = token
        logp_old[alive, t] = logp
        ended = token == eos_id
        if ended.any():
            response_lengths[alive[ended]] = t + 1
            truncated[alive[ended]] = False
            left = compact(~ended)
            alive, token, at = alive[left], token[left], at[left]
            cache.keep(left)
        if len(alive) == 0 or t == T - 1:
            break
        real = real_slots(lengths[alive], longest, longest + t + 1) if ragged else None
        hidden = policy.hidden(token[:, None], at[:, None], real, cache)[:, 0]
    sequences = Sequences(tokens, lengths, response_lengths).rows(slice(None))
    return Rollout(sequences, logp_old[:, :int(response_lengths.max())], truncated)


@torch.no_grad()
def sample_by_graph(policy: LLaMA, tokens: Tensor, lengths: Tensor, uniform: Tensor, eos_id: int,
                    temperature: float) -> Rollout:
    """The loop of `sample` in steps of fixed shape (graph.py): the same responses."""
    B, T = uniform.shape
    order = lengths.argsort(stable=True)                         # batch row of each cache row
    cache = KVCache(policy.config, B, tokens.shape[1], tokens.device, policy.head.dtype)
    hidden = prefill(policy, tokens, lengths, order, cache)                                 # [B, D]
    decoder = Decoder(policy, cache, lengths[order], uniform[order],
                      lambda logits, u: choose(logits, u, temperature))
    drawn = Drawn(*(part[order.argsort()] for part in decoder.run(hidden, eos_id)))
    tokens.scatter_(1, lengths[:, None] + torch.arange(T, device=tokens.device), drawn.tokens)
    sequences = Sequences(tokens, lengths, drawn.lengths).rows(slice(None))
    return Rollout(sequences, drawn.logp[:, :int(drawn.lengths.max())], drawn.truncated)


@torch.no_grad()
def sample_shared(policy: LLaMA, prompts: list[list[int]], eos_id: int, max_new_tokens: int,
                  temperature: float, generator: torch.Generator, at_once: int = 0) -> Rollout:
    """`sample`, each rank for its share of the prompts, `at_once` of them (0: all); the same
    responses for any number of ranks, and every rank has them all."""
    start, stop = distributed.span(len(prompts))
    at_once = at_once or max(1, stop - start)
    torch.rand(start, max_new_tokens, generator=generator, dtype=torch.float64)     # others' draws
    with distributed.gathered(policy):
        drawn = {i: sample(policy, prompts[i:min(i + at_once, stop)], eos_id, max_new_tokens,
                           temperature, generator) for i in range(start, stop, at_once)}
    if len(drawn.get(0, ((), (), ()))[2]) == len(prompts):
        return drawn[0]
    B = len(prompts)
    longest = lambda of: distributed.largest(max(map(of, drawn.values()), default=0))
    S, T = longest(lambda r: r.sequences.tokens.shape[1]), longest(lambda r: r.logp_old.shape[1])
    whole = {"tokens": torch.zeros(B, S, dtype=torch.long), "logp_old": torch.zeros(B, T),
             **{name: torch.zeros(B, dtype=torch.long)
                for name in ("prompt_lengths", "response_lengths", "truncated")}}
    for first, rollout in drawn.items():
        parts = rollout.sequences._asdict() | rollout._asdict()
        for name, all_rows in whole.items():
            rows, part = slice(first, first + len(rollout.truncated)), parts[name]
            all_rows[rows][tuple(slice(n) for n in part.shape)] = part.to(all_rows)
    whole = {name: distributed.total(x.to(policy.head.device)) for name, x in whole.items()}
    sequences = Sequences(*(whole[name] for name in Sequences._fields))
    return Rollout(sequences, whole["logp_old"], whole["truncated"].bool())


def prefill(policy: LLaMA, tokens: Tensor, lengths: Tensor, order: Tensor,
            cache: KVCache) -> Tensor:
    """Fill the cache with the prompts in `order` [B]; the hidden state of each one's last token.

    A few rows of similar length at a time, so that little of it is padding. -> [B, D].
    """
    last = []
    for start in range(0, len(order), PREFILL):
        rows = order[start:start + PREFILL]
        longest = int(lengths[rows].max())
        part = cache.part(slice(start, start + len(rows)))
        hidden = policy.hidden(tokens[rows, :longest], cache=part)               # [b, P, D]
        last.append(hidden[torch.arange(len(rows)), lengths[rows] - 1])
    cache.length = int(lengths.max())
    return torch.cat(last)


def real_slots(lengths: Tensor, longest: int, slots: int) -> Tensor:
    """[b, slots] bool: not the padding between a prompt of `lengths` and slot `longest`."""
    slot = torch.arange(slots, device=lengths.device)
    return (slot < lengths[:, None]) | (slot >= longest)


def compact(going: Tensor) -> Tensor:
    """The rows where going [b] is True, reordered so that few move: the last fill the gaps."""
    n = int(going.sum())
    rows = torch.arange(n, device=going.device)
    rows[~going[:n]] = n + going[n:].nonzero()[:, 0]
    return rows


def choose(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A token and its logp, [b] each; temperature 0 is greedy, with the logp of temperature 1."""
    if temperature:
        return inverse_cdf(logits / temperature, uniform)
    token = logits.argmax(-1)
    return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]


def inverse_cdf(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The first token of cumulative probability above u, and its log-probability, [b] each.

    logits [b, V], u [b] float64 in [0, 1). One power a logit serves both; of 2, because on a CPU
    2^x costs a third of e^x.
    """
    bits = logits / LN2
    bits -= bits.amax(-1, keepdim=True)
    cdf = bits.exp2().cumsum(-1, dtype=torch.float64)                            # [b, V]
    total = cdf[:, -1:]
    token = torch.searchsorted(cdf, uniform[:, None] * total, right=True)
    token = token.clamp(max=logits.shape[1] - 1)
    logp = LN2 * (bits.gather(1, token) - total.log2().to(bits.dtype))
    return token[:, 0], logp[:, 0]
