"""LLaMA in one file: RMSNorm, rotary embedding, grouped-query attention with a KV cache, SwiGLU.

Touvron et al. 2023 (arXiv 2302.13971), Llama 2 (2307.09288), Llama 3 (2407.21783). Parameter names
and the interleaved rotary pairs are those of Meta's checkpoints: a real 7B and the laptop's 0.4M
run the same lines. presets.py lists the sizes of both.

    h_0     = E[tokens]
    h'_l    = h_l  + Wo softmax(q k^T / sqrt(K) + mask) v    q, k, v from RMSNorm(h_l); q, k rotated
    h_{l+1} = h'_l + W2 (silu(W1 u) * W3 u)                  u = RMSNorm(h'_l)
    logits  = RMSNorm(h_L) head^T                            head = E when the embedding is tied

Shape letters: B batch, T time, S cache slots, D width, H query heads, G key/value heads, K head
width, F inner width, V vocabulary.

Padding on the right needs no mask: attention is causal, so no real token sees it. With `lengths`
only attention computes padding; matmuls, norms and gates run on the real tokens (`Padding`). Pass
`positions` and `key_mask` where padding stands elsewhere: on the left, or in the KV cache between a
short prompt and the response, because the responses of all rows start at the same slot.
"""

import copy
import math
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


# The largest values that are taken for sizes. A damaged file claims more.
MOST = {"dim": 2**20, "n_layers": 1000, "n_heads": 2**20, "n_kv_heads": 2**20, "vocab_size": 2**24,
        "ffn_dim": 2**24, "norm_eps": 1.0, "rope_theta": 1e15, "max_seq_len": 2**31,
        "head_width": 2**16}


@dataclass(frozen=True)
class RopeScaling:
    """Slower rotations of q and k, for texts that are longer than those of the first training.

    A pair that turns by f radians per token has the wavelength w = 2 pi / f, in tokens. In place of
    f, with L = original_context (only `kind` "llama3" uses the last three fields):

        linear    f / factor                    every pair (Chen et al. 2023, arXiv 2306.15595)
        llama3    f                             w < L / high_freq_factor: it turns often within L
                  f / factor                    w > L / low_freq_factor
                  (1 - s) f / factor + s f      between the two (Llama 3.1)
                  s = (L / w - low_freq_factor) / (high_freq_factor - low_freq_factor)
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def fault(self) -> str:
        """Says which field is wrong, and "" when all are right."""
        low, high = self.low_freq_factor, self.high_freq_factor
        for name, right, expected in (
                ("kind", self.kind in ("linear", "llama3"), '"linear" or "llama3"'),
                ("factor", 1 <= self.factor <= 1e6, "a number from 1 to 1e6"),
                ("low_freq_factor", 0 < low <= 1e6, "a positive number of at most 1e6"),
                ("high_freq_factor", low < high <= 1e6, f"more than low_freq_factor = {low}"),
                ("original_context", 0 < self.original_context <= MOST["max_seq_len"],
                 f"a positive number of at most {MOST['max_seq_len']}")):
            if not right:
                return f"{name}: expected {expected}, got {str(getattr(self, name))[:20]}"
        return ""

    def scale(self, frequencies: Tensor) -> Tensor:
        """Returns the slower frequencies, in radians per token, of the same shape and dtype."""
        if self.kind == "linear":
            return frequencies / self.factor
        turns = self.original_context * frequencies / (2 * math.pi)              # L / w
        low, high = self.low_freq_factor, self.high_freq_factor
        s = ((turns - low) / (high - low)).clamp(0, 1)      # 0 and 1 give the first two cases
        return (1 - s) * frequencies / self.factor + s * frequencies


@dataclass(frozen=True)
class LLaMAConfig:
    """The sizes of a LLaMA. `ffn_dim` is F; `max_seq_len` is the context it was trained with.

    head_width: K, when it is not dim / n_heads; a width that is equal to it becomes None.
    rope_scaling: None rotates by the frequencies as they are.

    Raises ValueError for sizes that are not positive, beyond MOST, or do not divide one another,
    for an odd K, and for a wrong `rope_scaling`.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    ffn_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 2048
    tie_embeddings: bool = False
    head_width: int | None = None
    rope_scaling: RopeScaling | None = None

    def __post_init__(self):
        for name, most in MOST.items():
            value = getattr(self, name)
            if value is None and name == "head_width":
                continue
            if not 0 < value <= most:                       # refuses NaN as well
                raise ValueError(f"{name}: expected a positive number of at most {most}, "
                                 f"got {str(value)[:20]}")
        if self.head_width is None and self.dim % (2 * self.n_heads):
            raise ValueError(f"dim: expected a multiple of 2 * n_heads = {2 * self.n_heads}, "
                             f"got {self.dim}")
        if self.head_dim % 2:
            raise ValueError(f"head_width: expected an even number, got {self.head_width}")
        if self.head_dim * self.n_heads == self.dim:        # one config for one model
            object.__setattr__(self, "head_width", None)
        if self.rope_scaling and (fault := self.rope_scaling.fault()):
            raise ValueError(f"rope_scaling.{fault}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads: expected a multiple of n_kv_heads = {self.n_kv_heads}, "
                             f"got {self.n_heads}")

    @property
    def head_dim(self) -> int:
        """The width K of one head."""
        return self.head_width or self.dim // self.n_heads


class KVCache:
    """The keys and values of the tokens so far, [layers, B, G, S, K], allocated once.

    New tokens take the next free slots, the same slots in every row. `length` slots are filled.
    """

    def __init__(self, config: LLaMAConfig, batch: int, slots: int, device=None, dtype=None):
        shape = (config.n_layers, batch, config.n_kv_heads, slots, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's k and v, [B, G, T, K], in the next slots; returns all of them so far.

        `LLaMA.hidden` increases `length` once every layer has stored its part.
        """
        start, stop = self.length, self.length + k.shape[2]
        self.keys[layer, :, :, start:stop] = k
        self.values[layer, :, :, start:stop] = v
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def mask(self, T: int, key_mask: Tensor | None, like: Tensor) -> Tensor | None:
        """Returns the `attention_mask` for T more tokens. engine/graph.py has another form."""
        return attention_mask(self.length, T, key_mask, like)

    def part(self, rows: slice) -> "KVCache":
        """Returns an empty cache for some rows, in the memory of this cache, to prefill them."""
        part = copy.copy(self)
        part.keys, part.values, part.length = self.keys[:, rows], self.values[:, rows], 0
        return part

    def spread(self, rows: Tensor) -> None:
        """Copies row rows[i] into row i, for rows [B], one layer at a time."""
        for part in (*self.keys, *self.values):                                  # [B, G, S, K]
            part[:, :, :self.length] = part[rows, :, :self.length]

    def keep(self, rows: Tensor) -> None:
        """Replaces row i by row rows[i] and drops the other rows. Copies only rows that move."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for name in ("keys", "values"):
            before = getattr(self, name)
            kept = before[:, :len(rows)]
            kept[:, moved, :, :self.length] = before[:, rows[moved], :, :self.length]
            setattr(self, name, kept)


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), with the mean in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


def rotary_table(positions: Tensor, config: LLaMAConfig, dtype: torch.dtype) -> Tensor:
    """exp(i position f_j), f_j = theta^(-2j/K), of each pair j: [B or 1, T, 1, K/2], complex64.

    positions [B or 1, T] int64. The table is complex128 for float64. `config.rope_scaling` changes
    the frequencies f_j. Each pass computes the table, so a model on the meta device needs none.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    K = config.head_dim
    exponents = torch.arange(0, K, 2, device=positions.device, dtype=wide) / K
    frequencies = config.rope_theta ** -exponents                                # [K/2]
    if config.rope_scaling is not None:
        frequencies = config.rope_scaling.scale(frequencies)
    angles = positions[:, :, None, None].to(wide) * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates each pair (x_2j, x_2j+1) of x [B, T, heads, K] by its angle (Su et al. 2021).

    Each pair is one complex number, so the rotation is one multiplication.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.reshape(*x.shape[:-1], -1, 2))            # [.., K/2]
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def attention_to_cache(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(K) + mask) v for a few new queries against a long cache (decoding).

    q [B, H, T, K], k and v [B, G, S, K], mask [B or 1, 1, T, S] or None -> [B, H, T, K]. The H/G
    queries of a group are the rows of one matmul, so keys and values are read once, without a copy.
    """
    B, H, T, K = q.shape
    k, v = k.flatten(0, 1), v.flatten(0, 1)                                      # [B G, S, K]
    scores = torch.bmm((q * K ** -0.5).reshape(len(k), -1, K), k.transpose(1, 2))
    scores = scores.view(B, H, T, -1)
    weights = (scores if mask is None else scores + mask).softmax(-1)            # [B, H, T, S]
    return torch.bmm(weights.view(len(k), -1, k.shape[1]), v).view(B, H, T, K)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K) + mask) v by PyTorch's kernel, for about as many queries as keys.

    Shapes as in `attention_to_cache`. A mask of dtype bool is True where a query sees a key. None
    is the causal rule, with T = S.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                          enable_gqa=k.shape[1] != q.shape[1])


def attention_mask(start: int, T: int, key_mask: Tensor | None, like: Tensor) -> Tensor | None:
    """0 where query t may see slot s, else -inf: [B or 1, 1, T, S = start + T], in like's dtype.

    Query t sees slot s when s <= start + t and key_mask [B, S] is True there. It always sees
    itself, so that no row is empty. Returns None when the kernel's own causal rule, or no rule for
    a single query, gives the same result.
    """
    if key_mask is None and (start == 0 or T == 1):
        return None
    blocked = torch.ones(T, start + T, dtype=torch.bool, device=like.device)
    if key_mask is None:
        blocked = blocked.triu(start + 1)[None]                                  # [1, T, S]
    else:
        itself = blocked.tril(start).triu(start)
        blocked = blocked.triu(start + 1) | ~(key_mask[:, None] | itself)        # [B, T, S]
    return like.new_zeros(blocked.shape).masked_fill_(blocked, float("-inf"))[:, None]


class Padding:
    """Converts a right-padded batch [B, T, ..] to its N real tokens [1, N, ..] and back.

    Matmuls, norms and gates treat each token separately, so they run on [1, N] and compute no
    padding. Attention needs rows and gets them back around its kernel. strip and restore are each
    other's gradient. The results are those of the padded batch; only the rounding differs, because
    the matmuls have another height.
    """

    def __init__(self, lengths: Tensor, T: int):
        real = torch.arange(T, device=lengths.device) < lengths[:, None]             # [B, T]
        self.shape, self.index = real.shape, real.flatten().nonzero()[:, 0]          # [N]

    @property
    def positions(self) -> Tensor:
        """[1, N]: the position of each real token in its row."""
        return (self.index % self.shape[1])[None]

    def strip(self, x: Tensor) -> Tensor:
        """[B, T, ..] -> [1, N, ..]: the real tokens, row after row."""
        return _Move.apply(x, self._strip, self._restore)

    def restore(self, x: Tensor) -> Tensor:
        """[1, N, ..] -> [B, T, ..]: the rows again, with 0 in the padding."""
        return _Move.apply(x, self._restore, self._strip)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attends within each row: [1, N, heads, K] -> [1, N, H, K]."""
        q, k, v = (self.restore(x).transpose(1, 2) for x in (q, k, v))           # [B, heads, T, K]
        return self.strip(attention(q, k, v).transpose(1, 2))

    def _strip(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.index)[None]

    def _restore(self, x: Tensor) -> Tensor:
        B, T = self.shape
        padded = x.new_zeros(B * T, *x.shape[2:])
        return padded.index_copy_(0, self.index, x[0]).unflatten(0, (B, T))


class _Move(torch.autograd.Function):
    """Applies one of two functions that are each other's gradient."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.back(grad), None, None


class Attention(nn.Module):
    def __init__(self, config: LLaMAConfig):
        super().__init__()
        self.config = config
        D, kv_width = config.dim, config.n_kv_heads * config.head_dim
        width = config.n_heads * config.head_dim                                 # H K, often D
        self.wq = nn.Linear(D, width, bias=False)
        self.wk = nn.Linear(D, kv_width, bias=False)
        self.wv = nn.Linear(D, kv_width, bias=False)
        self.wo = nn.Linear(width, D, bias=False)

    def forward(self, x, rotary, mask, padding, cache, layer) -> Tensor:
        """x [B, T, D], or [1, N, D] with `padding` -> the same shape.

        rotary [B or 1, T, 1, K/2]: see `rotary_table`. mask [B or 1, 1, T, S] or None: see
        `attention_mask`. layer: the number of this block, its place in the cache.
        """
        H, G, K = self.config.n_heads, self.config.n_kv_heads, self.config.head_dim
        B, T, _ = x.shape                                                        # 1, N if stripped
        q = rotate(self.wq(x).view(B, T, H, K), rotary)
        k = rotate(self.wk(x).view(B, T, G, K), rotary)
        v = self.wv(x).view(B, T, G, K)
        if padding is not None:
            return self.wo(padding.attention(q, k, v).flatten(2))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)        # [B, H, T, K]
        if cache is not None:
            k, v = cache.append(layer, k, v)                                     # [B, G, S, K]
        if k.shape[2] > q.shape[2]:
            y = attention_to_cache(q, k, v, mask)
        else:
            y = attention(q, k, v, mask)
        return self.wo(y.transpose(1, 2).flatten(2))                             # [B, T, D]


class FeedForward(nn.Module):
    def __init__(self, config: LLaMAConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: LLaMAConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, h, rotary, mask, padding, cache, layer) -> Tensor:
        h = h + self.attention(self.attention_norm(h), rotary, mask, padding, cache, layer)
        return h + self.feed_forward(self.ffn_norm(h))


class LLaMA(nn.Module):
    """The transformer. It has no dropout: training and scoring compute one function (rule 2)."""

    def __init__(self, config: LLaMAConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.added_rows: dict[str, Tensor] = {}     # behind the tokenizer's, see checkpoint.py
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tie_embeddings:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The output matrix [V, D]. It is the embedding itself when the two are tied."""
        return self.tok_embeddings.weight if self.config.tie_embeddings else self.output.weight

    def init_weights(self, generator: torch.Generator | None = None) -> "LLaMA":
        """Draws Normal(0, 0.02); projections into the residual stream get 0.02 / sqrt(2 layers)."""
        residual_std = 0.02 / (2 * self.config.n_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = residual_std if name.endswith(("wo.weight", "w2.weight")) else 0.02
                nn.init.normal_(parameter, 0.0, std, generator=generator)
        return self

    def hidden(self, tokens: Tensor, positions: Tensor | None = None,
               key_mask: Tensor | None = None, cache: KVCache | None = None,
               lengths: Tensor | None = None, layers: int | None = None,
               padding: Padding | None = None) -> Tensor:
        """Returns the final hidden states [B, T, D], after the last norm. Logits: hidden @ head.T.

        tokens [B, T] int64. With a `cache` the tokens follow its `length` filled slots, and their
        keys and values are stored; S = length + T (without a cache S = T). positions [B or 1, T]
        int64, by default length..S-1 in each row. key_mask [B, S] bool is True where a slot holds a
        real token, by default everywhere.

        lengths [B] int64, given without the other three: tokens behind them are padding. Padding
        costs only attention, and its hidden states come back as 0. `padding` in place of `lengths`
        describes rows that share prompts (prompts.py).

        layers: compute only the first N blocks, and return h_N without the last norm.
        """
        others = (positions, key_mask, cache, padding)
        if lengths is not None and any(x is not None for x in others):
            raise ValueError("lengths: expected without positions, key_mask, cache and padding")
        start, T = cache.length if cache is not None else 0, tokens.shape[1]
        if lengths is not None and int(lengths.min()) < T:
            padding = Padding(lengths, T)
        if padding is not None:
            tokens, positions = padding.strip(tokens), padding.positions                # [1, N]
        if positions is None:
            positions = torch.arange(start, start + T, device=tokens.device)[None]      # [1, T]
        h = self.tok_embeddings(tokens)                                 # [B, T, D] or [1, N, D]
        rotary = rotary_table(positions, self.config, h.dtype)
        mask = (attention_mask(0, T, key_mask, h) if cache is None else
                cache.mask(T, key_mask, h))
        for layer, block in enumerate(islice(self.layers, layers)):
            if self.activation_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, rotary, mask, padding, cache, layer, use_reentrant=False)
            else:
                h = block(h, rotary, mask, padding, cache, layer)
        if cache is not None:
            cache.length += T
        if layers is None:
            h = self.norm(h)
        return h if padding is None else padding.restore(h)

    def forward(self, tokens: Tensor, positions: Tensor | None = None,
                key_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Returns the logits [B, T, V] in the model's dtype. See `hidden` for the arguments."""
        return F.linear(self.hidden(tokens, positions, key_mask, cache), self.head)


def build(config: LLaMAConfig, seed: int = 0, **overrides) -> LLaMA:
    """Builds a freshly initialised model from the seed. `overrides` replace config fields."""
    model = LLaMA(replace(config, **overrides))
    return model.init_weights(torch.Generator().manual_seed(seed))


def parameter_count(config: LLaMAConfig) -> int:
    """Counts the parameters, a tied embedding once. Nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in LLaMA(config).parameters())
