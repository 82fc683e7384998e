"""Hugging Face's layout: config.json with model.safetensors or pytorch_model.bin, or shards.

The numbers are those of Meta's layout under other names, except in q and k. Hugging Face rotates
component i of a head together with component i + K/2; Meta and this project rotate neighbours. The
rows of each head are therefore permuted. A Mistral whose attention has no sliding window computes
the same, so it is read, and written as a LLaMA. Settings that the project's LLaMA does not compute
(biases, other architectures, other kinds of scaled rope, quantised weights) are refused by name.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fgrlhf.data.fields import UserError, check, show, take
from fgrlhf.layouts.pickles import open_pickle
from fgrlhf.layouts.safetensors import Planned, SafeTensors
from fgrlhf.layouts.stored import Stored, Weights, damaged, in_a_line, make_config, read_settings
from fgrlhf.model import LLaMAConfig, RopeScaling
from fgrlhf.tokenizer import Tokenizer

HF_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
OUR_NAMES = {ours: theirs for theirs, ours in HF_NAMES.items()}


def from_hf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> layers.3.feed_forward.w3.weight. Others stay as is."""
    layer = re.fullmatch(r"model\.(layers\.\d+\.)(.*)", name)
    prefix, rest = (layer[1], layer[2]) if layer else ("", name)
    return prefix + HF_NAMES[rest] if rest in HF_NAMES else name


def to_hf_name(name: str) -> str:
    """The inverse of `from_hf_name`."""
    layer = re.fullmatch(r"(layers\.\d+\.)(.*)", name)
    return f"model.{layer[1]}{OUR_NAMES[layer[2]]}" if layer else OUR_NAMES[name]


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Makes the rotary pair of rows i and i + K/2 of each head the rows 2i and 2i + 1.

    weight: q or k, [heads * K, D].
    """
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def deinterleave(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `interleave`: from the project's order to Hugging Face's."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def rotary_heads(name: str, config: LLaMAConfig) -> int:
    """Returns the number of heads of a q or k matrix, and 0 for any other name."""
    if name.endswith("attention.wq.weight"):
        return config.n_heads
    return config.n_kv_heads if name.endswith("attention.wk.weight") else 0


def to_hf(parameters: Mapping[str, Tensor], config: LLaMAConfig) -> dict[str, Planned]:
    """Plans the parameters under Hugging Face's names. q and k are permuted when written."""
    def planned(name: str, parameter: Tensor) -> Planned:
        heads = rotary_heads(name, config)
        return Planned(parameter.dtype, tuple(parameter.shape),
                       lambda: deinterleave(parameter, heads) if heads else parameter)
    return {to_hf_name(name): planned(name, p) for name, p in parameters.items()}


def read(folder: Path) -> Weights:
    """Describes the sizes and tensors of a folder with config.json and weights."""
    config = _read_config(folder / "config.json")
    tensors = {}
    for file, opened in _open_files(folder).items():
        for name in opened:
            ours = from_hf_name(name)
            if name.endswith("rotary_emb.inv_freq") or (
                    ours == "output.weight" and config.tie_embeddings):
                continue                                # a table; a second copy of the embedding
            if ours in tensors:
                raise damaged(file, f"tensor {in_a_line(name)}: expected it in one file only, got "
                                    f"it in {tensors[ours].file.name} too")
            tensors[ours] = Stored(file, name, tuple(opened[name].shape), opened[name].dtype,
                                   _reader(opened, name, rotary_heads(ours, config)))
    return config, tensors


def _reader(opened: Mapping[str, Tensor], name: str, heads: int) -> Callable:
    def read(device) -> Tensor:
        if heads:
            return interleave(opened[name].to(device), heads)
        return opened[name].to(device, copy=True)
    return read


def _open_files(folder: Path) -> dict[Path, Mapping[str, Tensor]]:
    """Opens the weight files: one file, or all files that an index lists."""
    for name, open_file in (("model.safetensors", SafeTensors), ("pytorch_model.bin", open_pickle)):
        index = folder / f"{name}.index.json"
        if index.exists():
            return _open_index(index, open_file)
        if (folder / name).exists():
            return {folder / name: open_file(folder / name)}
    raise damaged(folder, "expected model.safetensors, pytorch_model.bin, or the index of their "
                          "shards (model.safetensors.index.json), got none")


def _open_index(index: Path, open_file: Callable) -> dict[Path, Mapping[str, Tensor]]:
    place_of = read_settings(index).get("weight_map")
    if not isinstance(place_of, dict) or not place_of or not all(
            isinstance(file, str) and re.fullmatch(r"\w[\w.-]{0,200}", file)
            for file in place_of.values()):
        raise damaged(index, "weight_map: expected tensor names with files of this folder, got "
                             f"{show(place_of)}")
    opened = {}
    for file in sorted(set(place_of.values())):
        path = index.parent / file
        if not path.is_file():
            raise damaged(path, f"this shard is missing, but {index.name} lists it")
        opened[path] = open_file(path)
    for name, file in place_of.items():
        if name not in opened[index.parent / file]:
            raise damaged(index.parent / file, f"tensor {in_a_line(name)} is missing, but "
                                               f"{index.name} lists it")
    return opened


@dataclass(frozen=True)
class Sizes:
    """The sizes in config.json. An absent field has the default of transformers."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False


ARCHITECTURES = {"llama": ["LlamaForCausalLM"], "mistral": ["MistralForCausalLM"]}
# The defaults of transformers for a Mistral, where they differ from those of Sizes.
MISTRAL = {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072}


def _read_config(path: Path) -> LLaMAConfig:
    values = read_settings(path)
    kind = values.get("model_type")
    if kind not in list(ARCHITECTURES):
        raise _unsupported(path, "model_type", '"llama" or "mistral"', kind)
    if kind == "mistral":
        values = MISTRAL | values
    if values.get("architectures") in (None, [], ["LLaMAForCausalLM"]):     # the name of early 2023
        values["architectures"] = ARCHITECTURES[kind]
    scaling = _rope_scaling(path, values)
    for key, expected, got in (
            ("architectures", ARCHITECTURES[kind], values["architectures"]),
            ("hidden_act", "silu", values.get("hidden_act", "silu")),
            ("attention_bias", False, values.get("attention_bias", False)),
            ("mlp_bias", False, values.get("mlp_bias", False)),
            ("partial_rotary_factor", 1, values.get("partial_rotary_factor", 1)),
            ("quantization_config", None, values.get("quantization_config"))):
        if got not in (expected, None):                     # null is the same as no setting
            raise _unsupported(path, key, json.dumps(expected), got)
    sizes = check(Sizes, values, str(path), also=values)
    if kind == "mistral" and values["sliding_window"] is not None:
        window = take(values, "sliding_window", int, str(path))
        if window < sizes.max_position_embeddings:
            raise _unsupported(path, "sliding_window", "null, or at least max_position_embeddings "
                               f"= {sizes.max_position_embeddings}", window)
    return make_config(
        path, sizes.tie_word_embeddings, dim=sizes.hidden_size,
        n_layers=sizes.num_hidden_layers, n_heads=sizes.num_attention_heads,
        n_kv_heads=(sizes.num_attention_heads if sizes.num_key_value_heads is None else
                    sizes.num_key_value_heads),
        vocab_size=sizes.vocab_size, ffn_dim=sizes.intermediate_size, norm_eps=sizes.rms_norm_eps,
        rope_theta=sizes.rope_theta, max_seq_len=sizes.max_position_embeddings,
        head_width=sizes.head_dim, rope_scaling=scaling)


def _unsupported(path: Path, key: str, expected: str, got: object) -> UserError:
    return UserError(f"{path}: {key}: expected {expected}, got {json.dumps(got)[:100]}, which is "
                     "not supported; choose another model")


def _rope_scaling(path: Path, values: dict) -> RopeScaling | None:
    """Reads `rope_scaling` of transformers 4 or `rope_parameters` of 5. Moves rope_theta out.

    The type is under "rope_type", or under "type" in older files.
    """
    found = []
    for name in ("rope_scaling", "rope_parameters"):
        rope = values.get(name) or {}
        if not isinstance(rope, dict):
            raise damaged(path, f"{name}: expected an object, got {show(rope)}")
        key = "rope_type" if "rope_type" in rope else "type"
        kind = rope.get(key, "default")
        if kind not in ("default", "linear", "llama3"):
            raise _unsupported(path, f"{name}.{key}", '"default", "linear" or "llama3"', kind)
        if rope.get("partial_rotary_factor", 1) != 1:
            raise _unsupported(path, f"{name}.partial_rotary_factor", "1",
                               rope["partial_rotary_factor"])
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        number = lambda field, kind=float: take(rope, field, kind, str(path), f"{name}.")
        if kind == "linear":
            found.append(RopeScaling(kind, number("factor")))
        elif kind == "llama3":
            found.append(RopeScaling(
                kind, number("factor"), number("low_freq_factor"), number("high_freq_factor"),
                number("original_max_position_embeddings", int)))
        elif rope:
            found.append(None)
    if len(set(found)) > 1:
        raise damaged(path, "rope_scaling: expected the same as in rope_parameters, got another")
    return found[0] if found else None


def _write_rope(scaling: RopeScaling | None) -> dict | None:
    """Returns `rope_scaling` of config.json, the inverse of `_rope_scaling`."""
    if scaling is None:
        return None
    written = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        written |= {"low_freq_factor": scaling.low_freq_factor,
                    "high_freq_factor": scaling.high_freq_factor,
                    "original_max_position_embeddings": scaling.original_context}
    return written


def write_config(config: LLaMAConfig, dtype: torch.dtype, tokenizer: Tokenizer | None) -> dict:
    """Returns config.json, as transformers 4 and 5, vLLM and llama.cpp's converter read it."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": config.dim, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim, "vocab_size": config.vocab_size,
        "intermediate_size": config.ffn_dim, "hidden_act": "silu", "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta, "rope_scaling": _write_rope(config.rope_scaling),
        "max_position_embeddings": config.max_seq_len, "attention_bias": False, "mlp_bias": False,
        "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": tokenizer.bos_id if tokenizer else 1,
        "eos_token_id": tokenizer.eos_id if tokenizer else 2,
        "torch_dtype": str(dtype).removeprefix("torch.")}
