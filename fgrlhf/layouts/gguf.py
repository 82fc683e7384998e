"""GGUF, llama.cpp's file: the model in it. `gguf_tokenizer.py` reads the tokenizer in it.

Numbers are dequantised to float32, one tensor at a time (`ggml.py`). A file of BF16 gives a model
in bfloat16. A file with any other embedding gives float32 (F16 has too small a range to train in),
and `load_model(path, dtype=...)` any dtype. llama.cpp's converter writes q and k in Meta's order,
so their rows stay as they are. Linear scaling of RoPE is a key, and Llama 3's is a tensor.
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fgrlhf.data.fields import UserError, show
from fgrlhf.layouts.ggml import dequantise
from fgrlhf.layouts.gguf_file import Entry, GGUFFile, open_gguf
from fgrlhf.layouts.stored import Stored, Weights, damaged, make_config
from fgrlhf.model import LLaMAConfig, RopeScaling

NAMES = {
    "token_embd.weight": "tok_embeddings.weight", "output_norm.weight": "norm.weight",
    "output.weight": "output.weight", "attn_q.weight": "attention.wq.weight",
    "attn_k.weight": "attention.wk.weight", "attn_v.weight": "attention.wv.weight",
    "attn_output.weight": "attention.wo.weight", "attn_norm.weight": "attention_norm.weight",
    "ffn_gate.weight": "feed_forward.w1.weight", "ffn_down.weight": "feed_forward.w2.weight",
    "ffn_up.weight": "feed_forward.w3.weight", "ffn_norm.weight": "ffn_norm.weight",
}
SIZES = {                                   # key behind "llama.": field of LLaMAConfig
    "embedding_length": "dim", "block_count": "n_layers", "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads", "feed_forward_length": "ffn_dim",
    "attention.layer_norm_rms_epsilon": "norm_eps", "rope.freq_base": "rope_theta",
    "context_length": "max_seq_len", "vocab_size": "vocab_size",
    "attention.key_length": "head_width",
}
NO_EFFECT = ("tensor_data_layout",)         # says that q and k are in Meta's order


def read(path: Path) -> Weights:
    """Describes the sizes and tensors of one file."""
    file = open_gguf(path)
    config = _read_config(file)
    return config, {_our_name(name): _stored(path, name, entry)
                    for name, entry in file.tensors.items() if name != "rope_freqs.weight"}


def _our_name(name: str) -> str:
    """blk.3.ffn_up.weight -> layers.3.feed_forward.w3.weight. Others stay as they are."""
    layer = re.fullmatch(r"blk\.(\d+)\.(.*)", name)
    prefix, rest = (f"layers.{layer[1]}.", layer[2]) if layer else ("", name)
    return prefix + NAMES[rest] if rest in NAMES else name


def _stored(path: Path, name: str, entry: Entry) -> Stored:
    dtype = torch.bfloat16 if entry.kind.name == "BF16" else torch.float32

    def read(device) -> torch.Tensor:
        if torch.device(device).type == "meta":
            return torch.empty(entry.shape, dtype=dtype, device=device)
        return _read_numbers(path, entry).to(device, dtype)
    return Stored(path, name, entry.shape, dtype, read)


def _read_numbers(path: Path, entry: Entry) -> torch.Tensor:
    """Returns a tensor in float32. The file is mapped only while the tensor is read."""
    data = np.memmap(path, np.uint8, "r", entry.start, entry.size)
    return torch.from_numpy(dequantise(entry.kind, data)).view(entry.shape)


# ----- the sizes ----------------------------------------------------------------------------------

def _read_config(file: GGUFFile) -> LLaMAConfig:
    """Translates the metadata. A key that may change the model and is not known is refused."""
    values = {key.removeprefix("llama."): value for key, value in file.metadata.items()
              if key.startswith("llama.")}
    expected = {"general.architecture": ("llama",), "general.type": ("model", None),
                "split.count": (0, 1, None)}
    for key, choices in expected.items():
        if (got := file.metadata.get(key)) not in choices:
            more = "; join the parts with llama-gguf-split --merge" if key == "split.count" else (
                ", which is not supported; choose another model")
            raise UserError(f"{file.path}: {key}: expected {show(choices[0])}, got "
                            f"{show(got)}{more}")
    sizes = {field: _number(file, f"llama.{key}", values.pop(key))
             for key, field in SIZES.items() if key in values}
    if (embedding := file.tensors.get("token_embd.weight")) is None:
        raise damaged(file.path, "tensor token_embd.weight is missing")
    sizes = {"vocab_size": embedding.shape[0], "n_kv_heads": sizes.get("n_heads")} | sizes
    for key, field in SIZES.items():
        if field not in sizes and field not in ("rope_theta", "head_width"):
            raise damaged(file.path, f"llama.{key}: expected a number, got nothing")
    config = make_config(file.path, "output.weight" not in file.tensors, **sizes,
                         rope_scaling=_linear_scaling(file, values))
    _check_rest(file, values, config)
    return _with_rope_freqs(file, config)


def _number(file: GGUFFile, key: str, value: object) -> int | float:
    kind = float if key.endswith(("epsilon", "freq_base", "factor", "linear")) else int
    if type(value) not in (kind, int):
        what = "a number" if kind is float else "an integer"
        raise UserError(f"{file.path}: {key}: expected {what}, the same for every layer, got "
                        f"{show(value)}; choose another model")
    return value


def _check_rest(file: GGUFFile, values: dict[str, object], config: LLaMAConfig) -> None:
    """Raises UserError for what is left of the keys of "llama.", unless it changes nothing."""
    harmless = {"attention.value_length": config.head_dim, "rope.dimension_count": config.head_dim,
                "rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scale_linear": 1.0}
    for key, value in values.items():
        if key in NO_EFFECT or (
                np.isscalar(value) and (value == harmless.get(key) or not value)):
            continue
        expected = harmless.get(key)
        raise UserError(
            f"{file.path}: llama.{key}: expected {'no such key' if expected is None else expected},"
            f" got {show(value)}, which is not supported; choose another model")


def _linear_scaling(file: GGUFFile, values: dict[str, object]) -> RopeScaling | None:
    """Returns linear scaling when the keys say so, and takes these keys out of `values`."""
    kind, old = values.get("rope.scaling.type"), values.get("rope.scale_linear")
    if kind != "linear" and old in (None, 1.0):
        return None
    key = "rope.scaling.factor" if kind == "linear" else "rope.scale_linear"
    factor = _number(file, f"llama.{key}", values.get(key))
    for name in ("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"):
        values.pop(name, None)
    return RopeScaling("linear", factor)


def _with_rope_freqs(file: GGUFFile, config: LLaMAConfig) -> LLaMAConfig:
    """Returns the config with Llama 3's scaling when the file has the tensor rope_freqs.weight.

    The tensor [K/2] holds what each frequency is divided by. The file has no other number of the
    scaling, so the published ones are tried with the largest divisor as the factor.
    """
    if (entry := file.tensors.get("rope_freqs.weight")) is None:
        return config
    pairs = config.head_dim // 2
    place = f"{file.path}: tensor rope_freqs.weight"
    if entry.shape != (pairs,) or config.rope_scaling is not None:
        raise damaged(place, f"expected {pairs} numbers and no other scaling, got {entry.shape}")
    found = _read_numbers(file.path, entry).double()
    if (found == 1).all():
        return config
    scaling = RopeScaling("llama3", float(found.max()))
    plain = config.rope_theta ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    if scaling.fault() or not torch.allclose(plain / scaling.scale(plain), found, rtol=1e-4):
        raise UserError(f"{place}: expected the divisors of Llama 3's RoPE (low_freq_factor 1, "
                        "high_freq_factor 4, original context 8192), got others, which are not "
                        "supported; choose another model")
    return replace(config, rope_scaling=scaling)
