"""Sizes of published LLaMAs by name, and of the small models of this project.

The vocabulary is the published one. `fgrlhf/sft.py --init` replaces it by that of its tokenizer.
"""

from fgrlhf.model import LLaMAConfig, RopeScaling


def _llama(dim, n_layers, n_heads, ffn_dim, n_kv_heads=None, **more) -> LLaMAConfig:
    return LLaMAConfig(dim, n_layers, n_heads, n_kv_heads or n_heads, more.pop("vocab_size", 32000),
                       ffn_dim, **more)


_SHORT = {"max_seq_len": 256, "tie_embeddings": True}
_STORIES = {"max_seq_len": 1024, "tie_embeddings": True}
_SMOL = {"vocab_size": 49152, "rope_theta": 1e5, "max_seq_len": 8192, "tie_embeddings": True}
_LLAMA3 = {"n_kv_heads": 8, "vocab_size": 128256, "rope_theta": 5e5, "max_seq_len": 8192}
_LLAMA32 = _LLAMA3 | {"max_seq_len": 131072, "tie_embeddings": True,
                      "rope_scaling": RopeScaling("llama3", 32.0)}
PRESETS = {
    #                        D     layers  H    F
    "tiny":           _llama(96,    3,  6,  256, vocab_size=512, **_SHORT),
    "tiny-48":        _llama(48,    3,  3,  128, vocab_size=512, **_SHORT),      # 0.1M
    "tiny-192":       _llama(192,   3, 12,  576, vocab_size=512, **_SHORT),      # 1.6M
    "tiny-384":       _llama(384,   3, 24, 1296, vocab_size=512, **_SHORT),      # 6.5M
    "stories15M":     _llama(288,   6,  6,  768, **_SHORT),
    "stories42M":     _llama(512,   8,  8,  1376, **_STORIES),
    "stories110M":    _llama(768,  12, 12,  2048, **_STORIES),
    "SmolLM2-135M":   _llama(576,  30,  9,  1536, n_kv_heads=3, **_SMOL),
    "SmolLM2-360M":   _llama(960,  32, 15,  2560, n_kv_heads=5, **_SMOL),
    "SmolLM2-1.7B":   _llama(2048, 24, 32,  8192, **_SMOL | {"rope_theta": 130000.0}),
    "TinyLlama-1.1B": _llama(2048, 22, 32,  5632, n_kv_heads=4),
    "OpenLLaMA-3B":   _llama(3200, 26, 32,  8640, norm_eps=1e-6),
    "7B":             _llama(4096, 32, 32, 11008, norm_eps=1e-6),
    "13B":            _llama(5120, 40, 40, 13824, norm_eps=1e-6),
    "30B":            _llama(6656, 60, 52, 17920, norm_eps=1e-6),
    "65B":            _llama(8192, 80, 64, 22016),
    "Llama-2-7B":     _llama(4096, 32, 32, 11008, max_seq_len=4096),
    "Llama-2-13B":    _llama(5120, 40, 40, 13824, max_seq_len=4096),
    "Llama-2-70B":    _llama(8192, 80, 64, 28672, n_kv_heads=8, max_seq_len=4096),
    "Llama-3-8B":     _llama(4096, 32, 32, 14336, **_LLAMA3),
    "Llama-3.2-1B":   _llama(2048, 16, 32,  8192, **_LLAMA32),
    "Llama-3.2-3B":   _llama(3072, 28, 24,  8192, **_LLAMA32),
}
