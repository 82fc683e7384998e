"""llama2.c's legacy .bin: seven int32, then every tensor in float32, stacked over the layers.

    dim, ffn_dim, n_layers, n_heads, n_kv_heads, +-vocab_size, max_seq_len

A negative vocabulary size means that the output matrix is stored, as the last tensor. With a
positive size it is the embedding. run.c fixes the epsilon of the norms at 1e-5 and the rope base at
10000.
"""

import struct
from pathlib import Path

import torch

from fgrlhf.data.fields import UserError
from fgrlhf.layouts.kinds import check_kind
from fgrlhf.layouts.stored import Stored, Weights, damaged, make_config


def read(path: Path) -> Weights:
    """Describes the sizes and tensors of one file."""
    header, size = check_kind(path, "a llama2.c file")[:28], path.stat().st_size
    if len(header) < 28:
        raise damaged(path, f"expected a llama2.c file of at least 28 bytes, got {size}")
    dim, ffn_dim, layers, heads, kv_heads, vocabulary, length = struct.unpack("<7i", header)
    if header[:4] == b"24ka":                           # the magic number of version 1 and later
        raise UserError(f"{path}: expected llama2.c's legacy version 0, got version 1 or 2; export "
                        "the model with export.py --version 0")
    config = make_config(
        f"{path}: read as llama2.c's", vocabulary > 0, dim=dim, n_layers=layers, n_heads=heads,
        n_kv_heads=kv_heads, vocab_size=abs(vocabulary), ffn_dim=ffn_dim, norm_eps=1e-5,
        max_seq_len=length)
    kv_width = kv_heads * config.head_dim
    blocks = [                              # (name, layers or 0, shape)
        ("tok_embeddings.weight", 0, (config.vocab_size, dim)),
        ("attention_norm.weight", layers, (dim,)), ("attention.wq.weight", layers, (dim, dim)),
        ("attention.wk.weight", layers, (kv_width, dim)),
        ("attention.wv.weight", layers, (kv_width, dim)),
        ("attention.wo.weight", layers, (dim, dim)), ("ffn_norm.weight", layers, (dim,)),
        ("feed_forward.w1.weight", layers, (ffn_dim, dim)),
        ("feed_forward.w2.weight", layers, (dim, ffn_dim)),
        ("feed_forward.w3.weight", layers, (ffn_dim, dim)),
        ("norm.weight", 0, (dim,)),
        ("rope.freqs", 0, (2, length, config.head_dim // 2)),           # tables of cos and sin
    ] + [("output.weight", 0, (config.vocab_size, dim))] * (vocabulary < 0)
    count = sum(max(n, 1) * torch.Size(shape).numel() for _, n, shape in blocks)
    if size != 28 + 4 * count:
        raise damaged(path, f"expected {28 + 4 * count} bytes for the sizes in it, got {size}: it "
                            "is truncated, or not a llama2.c file")
    numbers = torch.from_file(str(path), shared=False, size=7 + count, dtype=torch.float32)[7:]
    tensors, offset = {}, 0
    for name, n, shape in blocks:
        for name in [f"layers.{i}.{name}" for i in range(n)] or [name]:
            tensor = numbers[offset:offset + torch.Size(shape).numel()].view(shape)
            offset += tensor.numel()
            if name != "rope.freqs":
                tensors[name] = Stored(path, name, shape, tensor.dtype,
                                       lambda device, t=tensor: t.to(device, copy=True))
    return config, tensors
