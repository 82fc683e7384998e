"""Writes GGUF files for the tests, by the format's description and not by the code under test."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fgrlhf.model import LLaMA
from fgrlhf.tokenizer import Tokenizer

F32, F16, Q8_0, BF16 = 0, 1, 8, 30
OUR_NAMES = {"attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
             "attention.wo": "attn_output", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
             "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
             "feed_forward.w3": "ffn_up"}


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def typed(value) -> tuple[int, bytes]:
    """The type and the bytes of a value. A pair (type, bytes) stays as it is."""
    if isinstance(value, tuple):
        return value
    if isinstance(value, str):
        return 8, text(value)
    if isinstance(value, bool):
        return 7, bytes([value])
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    kind = typed(value[0])[0]
    return 9, struct.pack("<IQ", kind, len(value)) + b"".join(typed(item)[1] for item in value)


def entry(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def write(path: Path, metadata: dict, tensors: dict[str, tuple[int, tuple, bytes]],
          version: int = 3, change: Callable[[dict], None] = lambda parts: None) -> Path:
    """Writes {name: (type, shape, bytes)}. `change` may alter the parts of the file before."""
    alignment = metadata.get("general.alignment", 32)
    table, data = {}, b""
    for name, (kind, shape, raw) in tensors.items():
        table[name] = entry(name, shape, kind, len(data))
        data += raw + bytes(-len(raw) % alignment)
    parts = {"magic": b"GGUF", "version": version, "tensors": len(tensors), "keys": len(metadata),
             "metadata": {key: text(key) + struct.pack("<I", typed(value)[0]) + typed(value)[1]
                          for key, value in metadata.items()},
             "table": table, "data": data}
    change(parts)
    head = parts["magic"] + struct.pack("<IQQ", parts["version"], parts["tensors"], parts["keys"])
    head += b"".join(parts["metadata"].values()) + b"".join(parts["table"].values())
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(head + bytes(-len(head) % alignment) + parts["data"])
    return path


def describe(model: LLaMA) -> dict:
    """The metadata of a model, without a tokenizer."""
    config = model.config
    return {"general.architecture": "llama", "llama.block_count": config.n_layers,
            "llama.context_length": config.max_seq_len, "llama.embedding_length": config.dim,
            "llama.feed_forward_length": config.ffn_dim,
            "llama.attention.head_count": config.n_heads,
            "llama.attention.head_count_kv": config.n_kv_heads,
            "llama.rope.freq_base": config.rope_theta,
            "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
            "llama.rope.dimension_count": config.head_dim,
            "llama.attention.key_length": config.head_dim,
            "llama.attention.value_length": config.head_dim}


def their_name(name: str) -> str:
    """layers.3.attention.wq.weight -> blk.3.attn_q.weight"""
    for ours, theirs in {"tok_embeddings.weight": "token_embd.weight",
                         "norm.weight": "output_norm.weight"}.items():
        if name == ours:
            return theirs
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        return f"blk.{layer}.{OUR_NAMES[rest.removesuffix('.weight')]}.weight"
    return name


def pack(tensor: torch.Tensor, kind: int) -> bytes:
    if kind == BF16:
        return tensor.bfloat16().view(torch.int16).numpy().tobytes()
    return tensor.numpy().astype({F32: "<f4", F16: "<f2"}[kind]).tobytes()


def weights(model: LLaMA, kind: int = F32) -> dict[str, tuple[int, tuple, bytes]]:
    """The tensors of a model: norms in F32, matrices in F32, F16 or BF16."""
    found = {}
    for name, parameter in model.named_parameters():
        one = F32 if parameter.dim() == 1 else kind
        found[their_name(name)] = (one, tuple(parameter.shape), pack(parameter.detach(), one))
    return found


def integers(values: list[int]) -> tuple[int, bytes]:
    """An array of int32, which the converter uses for types."""
    return 9, struct.pack("<IQ", 5, len(values)) + np.array(values, "<i4").tobytes()


def bpe(tokens: list[str], merges: list[str], control: int) -> dict:
    """The metadata of a byte-level BPE. The first `control` tokens are control tokens."""
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.token_type": integers([3] * control + [1] * (len(tokens) - control)),
            "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}


def sentencepiece(tokenizer: Tokenizer) -> dict:
    """The metadata that llama.cpp's converter makes of a sentencepiece model."""
    sp, ids = tokenizer._sp, range(tokenizer.vocab_size)
    types = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
             for i in ids]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": [piece.text for piece in tokenizer.pieces],
            "tokenizer.ggml.scores": [float(piece.score) for piece in tokenizer.pieces],
            "tokenizer.ggml.token_type": integers(types),
            "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
            "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
            "tokenizer.ggml.add_space_prefix": tokenizer.adds_blank}
