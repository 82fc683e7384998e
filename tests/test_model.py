"""LLaMA against a slow loop, against itself (cache, padding, checkpointing), published sizes."""

import math
from dataclasses import replace

import pytest
import torch

from fgrlhf.model import (
    KVCache, LLaMA, LLaMAConfig, RMSNorm, RopeScaling, build, parameter_count, rotary_table,
    rotate)
from fgrlhf.presets import PRESETS

SMALL = LLaMAConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=50, ffn_dim=48,
                    norm_eps=1e-6, rope_theta=100.0, max_seq_len=64)
GROUPS = pytest.mark.parametrize("kv_heads", [1, 2, 4])
TIGHT = 1e-10


def model_of(kv_heads: int = 2, **changes) -> LLaMA:
    """A float64 model whose logits are of order 1."""
    model = build(replace(SMALL, n_kv_heads=kv_heads), 0, **changes).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8) if p.dim() == 2 else p.add_(
                torch.rand(p.shape, generator=generator) - 0.5)
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(1))


def slow_scaling(scaling: RopeScaling | None, frequency: float) -> float:
    """The cases of RopeScaling's docstring, for one pair."""
    if scaling is None or scaling.kind == "linear":
        return frequency / (scaling.factor if scaling else 1)
    wavelength, L = 2 * math.pi / frequency, scaling.original_context
    if wavelength < L / scaling.high_freq_factor:
        return frequency
    if wavelength > L / scaling.low_freq_factor:
        return frequency / scaling.factor
    s = (L / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - s) * frequency / scaling.factor + s * frequency


LLAMA3 = RopeScaling("llama3", 4.0, original_context=100)          # SMALL: w = 6.3, 20, 63, 199
SCALED = [{"rope_scaling": RopeScaling("linear", 3.0)}, {"rope_scaling": LLAMA3},
          {"head_width": 10, "rope_scaling": replace(LLAMA3, low_freq_factor=0.5)},
          {"head_width": 6}]


def slow_logits(model: LLaMA, ids: list[int]) -> torch.Tensor:
    """Computes the equations of model.py for one position and one head at a time."""
    c, K = model.config, model.config.head_dim
    p = dict(model.named_parameters())

    def norm(x, weight):
        return weight * x / (x.square().mean() + c.norm_eps).sqrt()

    def turned(x, position):                            # neighbours are one complex number
        pairs = torch.view_as_complex(x.view(K // 2, 2))
        angles = torch.tensor(
            [position * slow_scaling(c.rope_scaling, c.rope_theta ** (-2 * i / K))
             for i in range(K // 2)], dtype=torch.float64)
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten()

    h = [p["tok_embeddings.weight"][i] for i in ids]
    for n in range(c.n_layers):
        w = {name.removeprefix(f"layers.{n}."): v for name, v in p.items()}
        u = [norm(x, w["attention_norm.weight"]) for x in h]
        q = [[turned(head, t) for head in (w["attention.wq.weight"] @ x).view(-1, K)]
             for t, x in enumerate(u)]
        k = [[turned(head, t) for head in (w["attention.wk.weight"] @ x).view(-1, K)]
             for t, x in enumerate(u)]
        v = [list((w["attention.wv.weight"] @ x).view(-1, K)) for x in u]
        for t in range(len(ids)):
            heads = []
            for head in range(c.n_heads):
                group = head // (c.n_heads // c.n_kv_heads)
                scores = torch.stack([q[t][head] @ k[s][group] for s in range(t + 1)]) / K ** 0.5
                weights = scores.exp() / scores.exp().sum()
                heads.append(sum(weights[s] * v[s][group] for s in range(t + 1)))
            h[t] = h[t] + w["attention.wo.weight"] @ torch.cat(heads)
            x = norm(h[t], w["ffn_norm.weight"])
            gate = w["feed_forward.w1.weight"] @ x
            h[t] = h[t] + w["feed_forward.w2.weight"] @ (
                gate / (1 + (-gate).exp()) * (w["feed_forward.w3.weight"] @ x))
    head = p["tok_embeddings.weight"] if c.tie_embeddings else p["output.weight"]
    return torch.stack([head @ norm(x, p["norm.weight"]) for x in h])


@GROUPS
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_forward_equals_the_slow_loop(kv_heads, tied):
    model = model_of(kv_heads, tie_embeddings=tied)
    ids = [3, 14, 15, 9, 2, 6]
    expected = slow_logits(model, ids)
    assert expected.abs().max() > 0.5
    assert (model(torch.tensor([ids]))[0] - expected).abs().max() < TIGHT


@pytest.mark.parametrize("changes", SCALED)
@torch.no_grad()
def test_forward_with_scaled_rope_or_another_head_width_equals_the_slow_loop(changes):
    model, plain = model_of(**changes), model_of()
    H, K = 4, changes.get("head_width", 8)
    shapes = [tuple(w.weight.shape) for w in model.layers[0].attention.children()]
    assert shapes == [(H * K, 32), (2 * K, 32), (2 * K, 32), (32, H * K)]
    ids = [3, 14, 15, 9, 2, 6]
    logits = model(torch.tensor([ids]))[0]
    assert (logits - slow_logits(model, ids)).abs().max() < TIGHT
    assert (logits - plain(torch.tensor([ids]))[0]).abs().max() > 1e-3


@pytest.mark.parametrize("changes", SCALED)
@torch.no_grad()
def test_cache_and_padding_with_scaled_rope_or_another_head_width(changes, tokens):
    """Decodes one token at a time, and strips the padding of rows of 12, 5 and 8 tokens."""
    model = model_of(**changes)
    expected, cache = model(tokens), KVCache(model.config, 3, 12, dtype=torch.float64)
    parts = [model(tokens[:, :4], cache=cache)]
    parts += [model(tokens[:, t:t + 1], cache=cache) for t in range(4, 12)]
    assert (torch.cat(parts, 1) - expected).abs().max() < TIGHT
    lengths = torch.tensor([12, 5, 8])
    real = torch.arange(12) < lengths[:, None]
    hidden = model.hidden(tokens, lengths=lengths) @ model.head.T
    assert (hidden - expected)[real].abs().max() < TIGHT


def test_rope_scaling_by_hand():
    """Llama 3.1: factor 8 and a context of 8192. Wavelengths of 2048 and less stay as they are."""
    scale = lambda kind, w: 2 * math.pi / RopeScaling(kind, 8.0).scale(
        torch.tensor(2 * math.pi / w, dtype=torch.float64)).item()      # wavelengths in and out
    for kind, before, after in (("linear", 100, 800), ("llama3", 100, 100), ("llama3", 2048, 2048),
                                ("llama3", 8192, 65536), ("llama3", 20000, 160000),
                                ("llama3", 4096, 4096 / (2 / 3 / 8 + 1 / 3))):     # s = 1/3
        assert scale(kind, before) == pytest.approx(after, rel=1e-12)


@GROUPS
@torch.no_grad()
def test_forward_is_the_same_with_a_cache(kv_heads, tokens):
    """Prefills 1, 5 or 11 tokens, then decodes one or three tokens at a time."""
    model = model_of(kv_heads)
    expected = model(tokens)
    for start in (1, 5, 11):
        for stride in (1, 3):
            cache = KVCache(model.config, 3, 12, dtype=torch.float64)
            parts = [model(tokens[:, :start], cache=cache)]
            for t in range(start, 12, stride):
                positions = torch.arange(t, min(t + stride, 12))[None]
                parts.append(model(tokens[:, t:t + stride], positions, cache=cache))
            assert (torch.cat(parts, 1) - expected).abs().max() < TIGHT


@GROUPS
@torch.no_grad()
def test_forward_with_a_cache_decodes_prompts_of_unequal_length(kv_heads, tokens):
    """key_mask hides the padding between a prompt and slot 7, where all rows continue."""
    model = model_of(kv_heads)
    lengths = torch.tensor([7, 3, 5])
    cache = KVCache(model.config, 3, 12, dtype=torch.float64)
    first = model(tokens[:, :7], cache=cache)               # rows 1 and 2 have garbage on the right
    for row, length in enumerate(lengths):
        alone = model(tokens[row:row + 1, :length])
        assert (first[row, :length] - alone[0]).abs().max() < TIGHT
    slots, positions = torch.arange(12), lengths.clone()
    real = (slots < lengths[:, None]) | (slots >= 7)
    for step in range(5):
        logits = model(tokens[torch.arange(3), positions][:, None], positions[:, None],
                       real[:, :8 + step], cache)
        for row in range(3):
            alone = model(tokens[row:row + 1, :positions[row] + 1])[0, -1]
            assert (logits[row, 0] - alone).abs().max() < TIGHT
        positions += 1


@GROUPS
@torch.no_grad()
def test_forward_with_a_cache_takes_left_padding(kv_heads, tokens):
    """The mask covers all slots, in the prefill and in every later step."""
    model = model_of(kv_heads)
    real = torch.arange(12) >= torch.tensor([4, 0, 7])[:, None]
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    expected = model(tokens, positions, real)
    cache = KVCache(model.config, 3, 12, dtype=torch.float64)
    for start, stop in ((0, 5), (5, 6), (6, 8), (8, 12)):
        logits = model(tokens[:, start:stop], positions[:, start:stop], real[:, :stop], cache)
        assert (logits - expected[:, start:stop])[real[:, start:stop]].abs().max() < TIGHT


@torch.no_grad()
@pytest.mark.parametrize("rows", [[2, 0], [0, 2], [0, 1], [1], [2, 1, 0]])
def test_keep_reorders_and_drops_rows_of_the_cache(rows, tokens):
    model = model_of()
    cache = KVCache(model.config, 3, 12, dtype=torch.float64)
    model(tokens[:, :6], cache=cache)
    cache.keep(torch.tensor(rows))
    logits = model(tokens[rows, 6:7], cache=cache)[:, 0]
    assert (logits - model(tokens[rows, :7])[:, -1]).abs().max() < TIGHT


@torch.no_grad()
def test_part_fills_some_rows_of_the_cache(tokens):
    model = model_of()
    cache = KVCache(model.config, 3, 12, dtype=torch.float64)
    for rows in (slice(0, 1), slice(1, 3)):
        model(tokens[rows, :6], cache=cache.part(rows))
    assert cache.length == 0
    cache.length = 6
    logits = model(tokens[:, 6:7], cache=cache)[:, 0]
    assert (logits - model(tokens[:, :7])[:, -1]).abs().max() < TIGHT


@GROUPS
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_forward_is_the_same_padded_and_unpadded(kv_heads, side, tokens):
    model = model_of(kv_heads)
    for length in (1, 4, 12):
        alone = model(tokens[:1, :length])[0]
        padded, mask = torch.full((1, 15), 49), torch.zeros(1, 15, dtype=torch.bool)
        where = slice(0, length) if side == "right" else slice(15 - length, 15)
        padded[0, where], mask[0, where] = tokens[0, :length], True
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        batch = model(padded, positions, mask)
        assert batch.isfinite().all()
        assert (batch[0, where] - alone).abs().max() < TIGHT
        if side == "right":
            assert (model(padded)[0, where] - alone).abs().max() < TIGHT


def test_padding_gets_no_gradient(tokens):
    """Other ids in left padding change no gradient of a loss on real tokens."""
    model = model_of()
    mask = torch.arange(12)[None] >= torch.tensor([4, 0, 7])[:, None]
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    gradients = []
    for filler in (0, 49):
        model.zero_grad()
        model(tokens.where(mask, filler), positions, mask)[mask].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all((a - b).abs().max() < TIGHT for a, b in zip(*gradients))


@torch.no_grad()
def test_forward_is_causal_and_rows_are_independent(tokens):
    model = model_of()
    before = model(tokens)
    changed = tokens.clone()
    changed[1, 6:] = (changed[1, 6:] + 1) % 50
    after = model(changed)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert (after[1, :6] - before[1, :6]).abs().max() < TIGHT
    assert (after[1, 6:] - before[1, 6:]).abs().max() > 1e-3


def test_activation_checkpointing_changes_no_gradient(tokens):
    gradients = []
    for switch in (False, True):
        model = model_of()
        model.activation_checkpointing = switch
        model(tokens).logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_activation_checkpointing_keeps_only_the_inputs_of_the_blocks(tokens):
    kept = []
    for switch in (False, True):
        model, sizes = model_of(), []
        model.activation_checkpointing = switch

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


def test_rotate_by_hand():
    config = LLaMAConfig(dim=4, n_layers=1, n_heads=1, n_kv_heads=1, vocab_size=1, ffn_dim=1,
                         rope_theta=10000.0)                    # angles: position, position / 100
    table = rotary_table(torch.tensor([[3]]), config, torch.float64)
    x = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64).view(1, 1, 1, 4)
    expected = torch.tensor([3.0, 0.03], dtype=torch.float64)
    expected = [expected[0].cos(), expected[0].sin(), -expected[1].sin(), expected[1].cos()]
    assert (rotate(x, table).flatten() - torch.stack(expected)).abs().max() < 1e-15


def test_rotate_makes_scores_depend_only_on_the_distance():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        a, b = (rotary_table(torch.tensor([[p]]), SMALL, torch.float64) for p in (i, j))
        return (rotate(q, a) * rotate(k, b)).sum()

    assert (score(5, 2) - score(43, 40)).abs() < 1e-12
    assert (score(5, 2) - score(5, 3)).abs() > 1e-3


def test_rmsnorm_by_hand():
    norm = RMSNorm(2, eps=0.5).double()
    norm.weight.data = torch.tensor([2.0, 3.0], dtype=torch.float64)
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)       # mean square 2.5, + 0.5, root 3 ** .5
    assert (norm(x) - torch.tensor([2.0, 6.0]).double() / 3 ** 0.5).abs().max() < 1e-15


@torch.no_grad()
def test_low_precision_stays_near_float64(tokens):
    exact = model_of()(tokens)
    scale = exact.abs().max()
    assert (model_of().float()(tokens) - exact).abs().max() < 1e-5 * scale
    assert (model_of().bfloat16()(tokens) - exact).abs().max() < 0.1 * scale


def test_build_is_a_function_of_the_seed():
    a, b, c = build(SMALL, 1), build(SMALL, 1), build(SMALL, 2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.tok_embeddings.weight, c.tok_embeddings.weight)
    assert build(SMALL, 1, vocab_size=9).config.vocab_size == 9


def test_init_weights_has_the_stated_scales():
    model = build(replace(SMALL, dim=256, ffn_dim=512, vocab_size=2000, n_layers=8), 0)
    block = model.layers[3]
    for weight, std in ((model.tok_embeddings.weight, 0.02), (block.attention.wq.weight, 0.02),
                        (block.feed_forward.w1.weight, 0.02), (block.attention.wo.weight, 0.005),
                        (block.feed_forward.w2.weight, 0.005)):
        assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert torch.equal(block.ffn_norm.weight, torch.ones(256))


def test_head_is_the_embedding_when_tied():
    tied, own = build(SMALL, 0, tie_embeddings=True), build(SMALL, 0)
    assert tied.head is tied.tok_embeddings.weight and "output.weight" not in tied.state_dict()
    assert own.head is own.output.weight


@pytest.mark.parametrize("changes, message", [
    ({"n_heads": 5}, "dim: expected a multiple of 2"), ({"dim": 36, "n_heads": 4}, "multiple of 2"),
    ({"n_kv_heads": 3}, "n_heads: expected a multiple of n_kv_heads = 3, got 4"),
    ({"head_width": 7}, "head_width: expected an even number, got 7"),
    ({"head_width": 0}, "head_width: expected a positive number of at most 65536, got 0"),
    ({"rope_scaling": RopeScaling("yarn", 2.0)}, 'kind: expected "linear" or "llama3", got yarn'),
    ({"rope_scaling": RopeScaling("linear", float("nan"))}, "rope_scaling.factor: expected a num"),
    ({"rope_scaling": RopeScaling("llama3", 8.0, 4.0, 4.0)}, "factor: expected more than low_freq"),
    ({"rope_scaling": RopeScaling("llama3", 8.0, original_context=0)}, "original_context: exp"),
])
def test_config_refuses_sizes_that_do_not_divide(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_a_head_width_of_dim_by_n_heads_is_the_same_config():
    assert replace(SMALL, head_width=8) == SMALL and replace(SMALL, head_width=8).head_dim == 8
    assert replace(SMALL, head_width=10).head_dim == 10 and replace(SMALL, n_heads=2).head_dim == 16
    assert replace(SMALL, dim=33, head_width=8).head_width == 8


# The published sizes ("6.7B 13.0B 32.5B 65.2B" in the LLaMA paper) to the last digit, by hand:
# V D (twice unless tied) + layers (2 D H K + 2 D G K + 3 D F + 2 D) + D.
PUBLISHED = {
    "stories15M": 15_191_712, "stories42M": 41_689_600, "stories110M": 109_529_856,
    "TinyLlama-1.1B": 1_100_048_384, "OpenLLaMA-3B": 3_426_473_600,
    "7B": 6_738_415_616, "13B": 13_015_864_320, "30B": 32_528_943_616, "65B": 65_285_660_672,
    "SmolLM2-135M": 134_515_008, "SmolLM2-360M": 361_821_120, "SmolLM2-1.7B": 1_711_376_384,
    "Llama-3-8B": 8_030_261_248, "Llama-3.2-1B": 1_235_814_400, "Llama-3.2-3B": 3_212_749_824,
    "Llama-2-7B": 6_738_415_616, "Llama-2-13B": 13_015_864_320, "Llama-2-70B": 68_976_648_192,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    assert parameter_count(PRESETS[name]) == PUBLISHED[name]


def test_every_preset_is_checked():
    own = {"tiny-48": 0.1, "tiny": 0.4, "tiny-192": 1.6, "tiny-384": 6.5}
    assert set(PRESETS) == set(PUBLISHED) | set(own)
    for name, millions in own.items():
        sizes = replace(PRESETS[name], vocab_size=640)          # the vocabulary of the world
        assert round(parameter_count(sizes) / 1e6, 1) == millions
