"""LLaMA in one file: RMSNorm, rotary embedding, grouped-query attention with a KV cache, SwiGLU.

Touvron et al. 2023 (arXiv 2302.13971), Llama 2 (2307.09288). Parameter names and the interleaved
rotary pairs are those of Meta's checkpoints: a real 7B and the laptop's 0.4M run the same lines.

    h_0     = E[tokens]
    h'_l    = h_l  + Wo softmax(q k^T / sqrt(K) + mask) v    q, k, v from RMSNorm(h_l); q, k rotated
    h_{l+1} = h'_l + W2 (silu(W1 u) * W3 u)                  u = RMSNorm(h'_l)
    logits  = RMSNorm(h_L) head^T                            head = E when the embedding is tied

Shape letters: B batch, T time, S cache slots, D width, H query heads, G key/value heads, K head
width, F inner width, V vocabulary.

Padding needs no mask when it is on the right: attention is causal, so no real token sees it. With
left padding pass `positions` and `key_mask`. Slot s of the KV cache holds the token at position s,
whatever the row's prompt length, and a query at position p sees slots 0..p: batches of unequal
prompts decode without padding tokens inside the sequence.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class LLaMAConfig:
    """Sizes of a LLaMA. `ffn_dim` is F itself, `max_seq_len` the context of its training."""

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

    def __post_init__(self):
        if self.dim % self.n_heads or (self.dim // self.n_heads) % 2:
            raise ValueError(f"dim: expected a multiple of 2 * n_heads = {2 * self.n_heads}, "
                             f"got {self.dim}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads: expected a multiple of n_kv_heads = {self.n_kv_heads}, "
                             f"got {self.n_heads}")

    @property
    def head_dim(self) -> int:
        """K, the width of one head."""
        return self.dim // self.n_heads


def _llama(dim, n_layers, n_heads, ffn_dim, n_kv_heads=None, **more) -> LLaMAConfig:
    return LLaMAConfig(dim, n_layers, n_heads, n_kv_heads or n_heads, more.pop("vocab_size", 32000),
                       ffn_dim, **more)


_SHORT = {"max_seq_len": 256, "tie_embeddings": True}
_STORIES = {"max_seq_len": 1024, "tie_embeddings": True}
PRESETS = {
    #                        D     layers  H    F
    "tiny":           _llama(96,    3,  6,  256, vocab_size=512, **_SHORT),
    "stories15M":     _llama(288,   6,  6,  768, **_SHORT),
    "stories42M":     _llama(512,   8,  8,  1376, **_STORIES),
    "stories110M":    _llama(768,  12, 12,  2048, **_STORIES),
    "TinyLlama-1.1B": _llama(2048, 22, 32,  5632, n_kv_heads=4),
    "OpenLLaMA-3B":   _llama(3200, 26, 32,  8640, norm_eps=1e-6),
    "7B":             _llama(4096, 32, 32, 11008, norm_eps=1e-6),
    "13B":            _llama(5120, 40, 40, 13824, norm_eps=1e-6),
    "30B":            _llama(6656, 60, 52, 17920, norm_eps=1e-6),
    "65B":            _llama(8192, 80, 64, 22016),
    "Llama-2-7B":     _llama(4096, 32, 32, 11008, max_seq_len=4096),
    "Llama-2-13B":    _llama(5120, 40, 40, 13824, max_seq_len=4096),
    "Llama-2-70B":    _llama(8192, 80, 64, 28672, n_kv_heads=8, max_seq_len=4096),
}


DTYPES = ("float32", "bfloat16")           # of weights and activations, as the flag --dtype has it


class KVCache:
    """Keys and values, `[layers, B, S, G, K]`, allocated once; slot s is position s."""

    def __init__(self, config: LLaMAConfig, batch: int, slots: int, device=None, dtype=None):
        shape = (config.n_layers, batch, slots, config.n_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v `[B, T, G, K]` of one layer at slots `positions [B or 1, T]`."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.keys[layer, rows, positions] = k
        self.values[layer, rows, positions] = v

    def keep(self, rows: Tensor) -> None:
        """Drop the batch rows that are not in `rows` (batch compaction as responses end)."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), mean in float32 at least (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


def rotary_table(positions: Tensor, config: LLaMAConfig,
                 dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/K), each [B or 1, T, 1, K/2]; at least float32.

    `positions` [B or 1, T] int64. Nothing is stored: a model on the meta device needs no table.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    K = config.head_dim
    exponents = torch.arange(0, K, 2, device=positions.device, dtype=wide) / K
    angles = positions[:, :, None, None].to(wide) * config.rope_theta ** -exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_2i, x_2i+1) of x [B, T, heads, K] by its angle (Su et al. 2021)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: LLaMAConfig):
        super().__init__()
        self.config = config
        D, kv_width = config.dim, config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(D, D, bias=False)
        self.wk = nn.Linear(D, kv_width, bias=False)
        self.wv = nn.Linear(D, kv_width, bias=False)
        self.wo = nn.Linear(D, D, bias=False)

    def forward(self, x, rotary, mask, cache, layer, positions) -> Tensor:
        B, T, D = x.shape
        H, G, K = self.config.n_heads, self.config.n_kv_heads, self.config.head_dim
        q = rotate(self.wq(x).view(B, T, H, K), *rotary)
        k = rotate(self.wk(x).view(B, T, G, K), *rotary)
        v = self.wv(x).view(B, T, G, K)
        if cache is not None:
            cache.write(layer, positions, k, v)
            if mask is not None:                        # decoding: attend to the filled slots
                S = mask.shape[-1]
                k, v = cache.keys[layer, :, :S], cache.values[layer, :, :S]      # [B, S, G, K]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            attn_mask=mask, is_causal=mask is None, enable_gqa=G != H)           # [B, H, T, K]
        return self.wo(y.transpose(1, 2).reshape(B, T, D))


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

    def forward(self, h, rotary, mask, cache, layer, positions) -> Tensor:
        h = h + self.attention(self.attention_norm(h), rotary, mask, cache, layer, positions)
        return h + self.feed_forward(self.ffn_norm(h))


class LLaMA(nn.Module):
    """The transformer. No dropout: training and scoring compute the same function (rule 2)."""

    def __init__(self, config: LLaMAConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tie_embeddings:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The output matrix [V, D]; the embedding itself when tied."""
        return self.tok_embeddings.weight if self.config.tie_embeddings else self.output.weight

    def init_weights(self, generator: torch.Generator | None = None) -> "LLaMA":
        """Normal(0, 0.02); projections into the residual stream over sqrt(2 layers), as GPT-2."""
        residual_std = 0.02 / (2 * self.config.n_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = residual_std if name.endswith(("wo.weight", "w2.weight")) else 0.02
                nn.init.normal_(parameter, 0.0, std, generator=generator)
        return self

    def hidden(self, tokens: Tensor, positions: Tensor | None = None,
               key_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Final hidden states [B, T, D], after the last norm; `hidden @ head.T` are the logits.

        tokens [B, T] int64. positions [B, T] int64, default 0..T-1 in each row. key_mask [B, T]
        bool, True where a token is real, needed for left padding alone. With a `cache`, keys and
        values are stored at `positions`; without `positions` that is the prefill, with them each
        query at position p attends to slots 0..p.
        """
        B, T = tokens.shape
        prefill = positions is None
        if prefill:
            positions = torch.arange(T, device=tokens.device)[None]              # [1, T]
        if cache is not None and not prefill:
            slots = torch.arange(int(positions.max()) + 1, device=tokens.device)
            mask = (slots <= positions[:, :, None])[:, None]                     # [B, 1, T, S]
        elif key_mask is not None:
            causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
            itself = torch.eye(T, dtype=torch.bool, device=tokens.device)        # no empty row
            mask = (causal & (key_mask[:, None, None, :] | itself))              # [B, 1, T, T]
        else:
            mask = None                                                          # plain causal
        h = self.tok_embeddings(tokens)                                          # [B, T, D]
        rotary = rotary_table(positions, self.config, h.dtype)
        for layer, block in enumerate(self.layers):
            if self.activation_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, rotary, mask, cache, layer, positions, use_reentrant=False)
            else:
                h = block(h, rotary, mask, cache, layer, positions)
        return self.norm(h)

    def forward(self, tokens: Tensor, positions: Tensor | None = None,
                key_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits [B, T, V] in the model's dtype; arguments as `hidden`."""
        return F.linear(self.hidden(tokens, positions, key_mask, cache), self.head)


def build(config: LLaMAConfig, seed: int = 0, **overrides) -> LLaMA:
    """A freshly initialised model, a function of the seed; `overrides` replace config fields."""
    model = LLaMA(replace(config, **overrides))
    return model.init_weights(torch.Generator().manual_seed(seed))


def parameter_count(config: LLaMAConfig) -> int:
    """The number of parameters, a tied embedding counted once; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in LLaMA(config).parameters())
