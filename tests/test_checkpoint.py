"""Checkpoints in and out: every layout, exact round trips, one clear line for a broken file."""

import json
import os
import pickle
import random
import struct
import subprocess
import sys

import pytest
import torch

from fgrlhf.checkpoint import (
    ExportConfig, export, load_adapted, load_model, load_tokenizer, save_model)
from fgrlhf.data.fields import UserError
from fgrlhf.engine.states import load_state, save_state
from fgrlhf.layouts import huggingface, meta
from fgrlhf.layouts.safetensors import SafeTensors
from fgrlhf.model import LLaMA, LLaMAConfig, RopeScaling, build
from fgrlhf.presets import PRESETS
from fgrlhf.tokenizer import Tokenizer, train

SMALL = LLaMAConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=272, ffn_dim=48,
                    norm_eps=1e-6, rope_theta=5e5, max_seq_len=64)


def variant(**changes) -> LLaMA:
    return build(SMALL, 1, **changes)


def same(a: LLaMA, b: LLaMA) -> bool:
    return a.config == b.config and all(
        (n, p.dtype) == (m, q.dtype) and torch.equal(p, q)
        for (n, p), (m, q) in zip(a.named_parameters(), b.named_parameters(), strict=True))


@pytest.fixture
def tokenizer(tmp_path):
    return train(["hello world, hello there"] * 3, 272, tmp_path / "some.model")


# ----- round trips --------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", ["meta", "hf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
def test_save_model_round_trips_bit_exactly(layout, dtype, tied, tmp_path, tokenizer):
    model = variant(tie_embeddings=tied).to(dtype)
    save_model(model, tmp_path / "m", layout, tokenizer)
    assert same(load_model(tmp_path / "m"), model)
    assert load_tokenizer(tmp_path / "m").sha256 == tokenizer.sha256


@pytest.mark.parametrize("ffn_dim", [1, 2, 47, 84, 85, 86, 300])              # 2/3 * 4 * 32 = 85.3
def test_save_model_keeps_any_ffn_dim_in_metas_keys(ffn_dim, tmp_path):
    save_model(variant(ffn_dim=ffn_dim), tmp_path)
    params = json.loads((tmp_path / "params.json").read_text())
    width = meta.ffn_width(32, params["multiple_of"], params.get("ffn_dim_multiplier"))
    assert load_model(tmp_path).config.ffn_dim == ffn_dim == width


LLAMA32 = RopeScaling("llama3", 32.0)


@pytest.mark.parametrize("layout", ["meta", "hf"])
@pytest.mark.parametrize("changes", [
    {"head_width": 10}, {"head_width": 6, "n_kv_heads": 1}, {"rope_scaling": LLAMA32},
    {"head_width": 20, "rope_scaling": RopeScaling("llama3", 7.5, 0.5, 3.0, 100)},
    {"rope_scaling": RopeScaling("linear", 2.0)}, {"dim": 30, "head_width": 8, "ffn_dim": 9}])
def test_save_model_keeps_head_width_and_rope_scaling(layout, changes, tmp_path):
    model = variant(**changes)
    save_model(model, tmp_path, layout)
    assert same(load_model(tmp_path), model)


def test_save_model_adds_no_key_for_a_model_that_needs_none(tmp_path):
    """Meta's own code knows neither of the two keys."""
    save_model(variant(), tmp_path)
    params = json.loads((tmp_path / "params.json").read_text())
    assert not {"head_dim", "rope_scaling"} & set(params)


def test_ffn_width_gives_the_published_sizes():
    assert meta.ffn_width(4096, 256, None) == 11008                     # 7B
    assert meta.ffn_width(8192, 4096, 1.3) == 28672                     # Llama-2-70B
    assert meta.ffn_width(4096, 1024, 1.3) == 14336                     # Llama-3-8B


def test_save_model_overwrites_its_own_folder(tmp_path):
    save_model(variant(), tmp_path)
    model = variant(n_layers=1)
    save_model(model, tmp_path)
    assert same(load_model(tmp_path), model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["consolidated.00.pth", "params.json"]


def test_save_model_refuses_a_folder_with_another_checkpoint(tmp_path):
    save_model(variant(), tmp_path, "meta")
    with pytest.raises(UserError, match="already holds consolidated.00.pth"):
        save_model(variant(), tmp_path, "hf")


def test_save_model_refuses_a_folder_of_adapters(tmp_path):
    """A reader of the folder would take the adapters, not the weights."""
    save_model(variant(), tmp_path / "trunk")
    save_model(load_adapted(tmp_path / "trunk", "cpu", None, 2, 0), tmp_path / "adapted")
    with pytest.raises(UserError, match="already holds adapters.json; choose an empty folder"):
        save_model(variant(), tmp_path / "adapted")
    with pytest.raises(UserError, match="already holds adapters.json; choose an empty folder"):
        export(ExportConfig(model=str(tmp_path / "trunk"), out=str(tmp_path / "adapted")))
    save_model(load_adapted(tmp_path / "trunk", "cpu", None, 2, 1), tmp_path / "adapted")


def test_load_model_converts_dtype_and_gives_memory_of_its_own(tmp_path):
    model = variant()
    for layout in ("meta", "hf"):
        save_model(model, tmp_path / layout, layout)
        loaded = load_model(tmp_path / layout, dtype=torch.float64)
        assert torch.equal(loaded.norm.weight, model.norm.weight.double())
        assert loaded.layers[0].attention.wq.weight.dtype == torch.float64
        loaded = load_model(tmp_path / layout)
        before = {p.name: p.read_bytes() for p in (tmp_path / layout).iterdir()}
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.zero_()
        assert {p.name: p.read_bytes() for p in (tmp_path / layout).iterdir()} == before
        assert all(p.requires_grad for p in loaded.parameters())


def test_load_model_on_meta_describes_a_model_without_memory(tmp_path):
    save_model(variant(), tmp_path)
    model = load_model(tmp_path, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def slow_bpe(text: str, tokenizer_json: dict) -> list[int]:
    """Encodes as Hugging Face's BPE does: join the pair that is first in the list, repeatedly."""
    if tokenizer_json["normalizer"] and text:
        text = tokenizer_json["normalizer"]["prepend"] + text
    model = tokenizer_json["model"]
    rank = {tuple(pair): n for n, pair in enumerate(model["merges"])}
    parts = list(text)
    while found := [(rank[pair], i) for i, pair in enumerate(zip(parts, parts[1:]))
                    if pair in rank]:
        _, i = min(found)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    ids = []
    for part in parts:
        names = [part] if part in model["vocab"] else [f"<0x{b:02X}>" for b in part.encode()]
        ids += [model["vocab"][name] for name in names]
    return ids


def check_tokenizer_json(folder, tokenizer, texts) -> None:
    written = json.loads((folder / "tokenizer.json").read_text())
    for text in texts:
        assert slow_bpe(text, written) == tokenizer.encode(text), text


TEXTS = ["", "a", " a", "  a ", "x  y   z", "hello world", "\n\nhello\tthere", "é 😀 e\u0301",
         "12 345", "<s>", "</s>hello<unk>", "<0x41>", "▁", "a▁b ▁▁", " " * 40, "aaaaaaa"]


def test_save_model_writes_a_tokenizer_that_gives_our_ids(tmp_path, tokenizer):
    save_model(variant(), tmp_path / "m", "hf", tokenizer)
    check_tokenizer_json(tmp_path / "m", tokenizer, TEXTS)
    written = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    special = [written[f"{name}_token"] for name in ("unk", "bos", "eos", "pad")]
    assert special == ["<unk>", "<s>", "</s>", "<unk>"]


def test_save_model_writes_llamas_tokenizer(data_dir, tmp_path):
    tokenizer = Tokenizer(data_dir / "llama_tokenizer" / "tokenizer.model")
    save_model(variant(vocab_size=32000), tmp_path, "hf", tokenizer)
    records = (data_dir / "qa_feedback" / "edits.jsonl").read_text().splitlines()[:20]
    check_tokenizer_json(tmp_path, tokenizer, TEXTS + [json.loads(r)["original"] for r in records])


def test_interleave_by_hand():
    weight = torch.arange(8.0)[:, None]                                 # two heads of K = 4
    assert huggingface.interleave(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert huggingface.deinterleave(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    weight = torch.arange(6.0)[:, None]                                 # one head of K = 6
    assert huggingface.interleave(weight, 1)[:, 0].tolist() == [0, 3, 1, 4, 2, 5]
    assert huggingface.deinterleave(weight, 1)[:, 0].tolist() == [0, 2, 4, 1, 3, 5]


# ----- Meta's model-parallel shards ---------------------------------------------------------------

def write_shards(folder, model: LLaMA, count: int, embedding_rows: bool = False, vocab_size=-1):
    """Cuts a model as Meta's model parallelism does, independently of the code under test."""
    folder.mkdir(exist_ok=True)
    for rank in range(count):
        shard = {"rope.freqs": torch.zeros(3)}
        for name, p in model.named_parameters():
            kind = name.split(".")[-2]
            if kind in ("wq", "wk", "wv", "w1", "w3", "output"):
                p = p.chunk(count, dim=0)[rank]
            elif kind in ("wo", "w2"):
                p = p.chunk(count, dim=1)[rank]
            elif kind == "tok_embeddings":
                p = p.chunk(count, dim=0 if embedding_rows else 1)[rank]
            shard[name] = p.detach().clone()
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    config = model.config
    (folder / "params.json").write_text(json.dumps({
        "dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads, "multiple_of": 48, "ffn_dim_multiplier": 0.5,
        "norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "vocab_size": vocab_size,
        "max_seq_len": config.max_seq_len}))
    return folder


def as_llama3(folder, tied: bool, **changes) -> None:
    """Gives a folder of shards what Meta's files of Llama 3.1 and 3.2 have."""
    params = json.loads((folder / "params.json").read_text()) | {"use_scaled_rope": True} | changes
    del params["max_seq_len"]
    (folder / "params.json").write_text(json.dumps(params))
    for path in folder.glob("*.pth") if tied else ():
        shard = torch.load(path)
        torch.save(shard | {"output.weight": shard["tok_embeddings.weight"].clone()}, path)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("changes, factor", [
    ({}, 32.0), ({"rope_scaling_factor": 8.0}, 8.0), ({"rope_scaling_factor": 16}, 16)])
@pytest.mark.parametrize("tied", [False, True])
def test_load_model_reads_metas_files_of_llama_3(count, changes, factor, tied, tmp_path):
    """Llama 3.2 stores its embedding twice, and Llama 3.1 an output matrix of its own."""
    model = variant(tie_embeddings=tied, max_seq_len=131072,
                    rope_scaling=RopeScaling("llama3", factor))
    write_shards(tmp_path, model, count, embedding_rows=True)
    as_llama3(tmp_path, tied, **changes)
    assert same(load_model(tmp_path), model)
    again = tmp_path / "again"
    save_model(load_model(tmp_path), again)
    assert same(load_model(again), model)


def test_load_model_takes_factor_8_for_the_widths_of_llama_3_1():
    params = dict(n_layers=32, n_heads=32, use_scaled_rope=True)
    assert meta._rope_scaling(meta.Params(dim=4096, **params)) == RopeScaling("llama3", 8.0)
    assert meta._rope_scaling(meta.Params(dim=3072, **params)) == LLAMA32


def test_load_model_reads_shards_of_another_head_width(tmp_path):
    model = variant(head_width=12)
    write_shards(tmp_path, model, 2)
    path = tmp_path / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"head_dim": 12}))
    assert same(load_model(tmp_path), model)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(UserError, match="consolidated.01.pth: this shard is missing.*only 1/2"):
        load_model(tmp_path)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("embedding_rows", [False, True])
@pytest.mark.parametrize("vocab_size", [-1, 272])
def test_load_model_merges_shards(count, embedding_rows, vocab_size, tmp_path):
    model = variant()
    write_shards(tmp_path, model, count, embedding_rows, vocab_size)
    assert same(load_model(tmp_path), model)


def test_load_model_names_a_missing_shard(tmp_path):
    write_shards(tmp_path, variant(), 2)
    (tmp_path / "consolidated.01.pth").rename(tmp_path / "saved")
    with pytest.raises(UserError, match="consolidated.01.pth: this shard.* missing.*only 1/2"):
        load_model(tmp_path)
    (tmp_path / "saved").rename(tmp_path / "consolidated.01.pth")
    (tmp_path / "consolidated.00.pth").unlink()
    with pytest.raises(UserError, match="consolidated.00.pth: this shard is missing"):
        load_model(tmp_path)


def test_load_model_names_a_tensor_that_one_shard_lacks_or_cuts_differently(tmp_path):
    write_shards(tmp_path, variant(), 2)
    path = tmp_path / "consolidated.01.pth"
    shard = torch.load(path)
    full = shard.pop("layers.1.attention.wv.weight")
    torch.save(shard, path)
    with pytest.raises(UserError, match="01.pth: tensor layers.1.attention.wv.weight is missing"):
        load_model(tmp_path)
    torch.save(shard | {"layers.1.attention.wv.weight": full[:-1]}, path)
    with pytest.raises(UserError, match=r"wv.weight: expected .* \(8, 32\) .*, got .* \(7, 32\)"):
        load_model(tmp_path)


# ----- Hugging Face: shards, pickles, refusals ----------------------------------------------------

def write_index(folder, model: LLaMA, pickled: bool) -> None:
    """Writes a sharded Hugging Face folder; layer 1 is in the second shard."""
    save_model(model, folder, "hf")
    whole = SafeTensors(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in whole.items()}
    (folder / "model.safetensors").unlink()
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    place_of = {name: files[".1." in name] for name in tensors}
    for file in files:
        part = {name: tensors[name] for name in tensors if place_of[name] == file}
        if pickled:
            torch.save(part, folder / file)
        else:
            write_raw(folder / file, {name: ("F32", list(t.shape), t.numpy().tobytes())
                                      for name, t in part.items()})
    (folder / f"{stem}.{suffix}.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": place_of}))


def write_raw(path, tensors: dict, pad: int = 0) -> None:
    """Writes a safetensors file from (dtype, shape, bytes); `pad` breaks the alignment."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape,
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    write_header(path, header, data, pad)


def write_header(path, header, data: bytes = b"", pad: int = 0) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("pickled", [False, True])
def test_load_model_reads_indexed_shards(pickled, tmp_path):
    model = variant()
    write_index(tmp_path, model, pickled)
    assert same(load_model(tmp_path), model)
    file = sorted(tmp_path.glob("*-00002-of-*"))[0]
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name}: this shard is missing"):
        load_model(tmp_path)


def test_load_model_names_a_tensor_that_only_the_index_lists(tmp_path):
    write_index(tmp_path, variant(), pickled=False)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="00002.safetensors: tensor model.norm.weight is missing"):
        load_model(tmp_path)
    content["weight_map"]["model.norm.weight"] = "../model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="index.json: weight_map"):
        load_model(tmp_path)


def test_load_model_reads_one_pickle_with_buffers_and_a_tied_copy(tmp_path):
    model = variant(tie_embeddings=True)
    save_model(model, tmp_path, "hf")
    tensors = {n: t.clone() for n, t in SafeTensors(tmp_path / "model.safetensors").items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert same(load_model(tmp_path), model)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "gemma"}, 'model_type: expected "llama" or "mistral", got "gemma"'),
    ({"model_type": "mistral"}, 'architectures: expected ["MistralForCausalLM"], got'),
    ({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 63},
     "sliding_window: expected null, or at least max_position_embeddings = 64, got 63"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures: expected"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}},
     'rope_scaling.type: expected "default", "linear" or "llama3", got "yarn"'),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 'got "dynamic"'),
    ({"rope_parameters": {"rope_type": "longrope"}}, 'rope_parameters.rope_type: expected "defau'),
    ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.factor: expected this field"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor: expected a number"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor: expected a number"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0},
      "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "the same as in rope_parameters"),
    ({"rope_scaling": 7}, "rope_scaling: expected an object, got 7"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1, got 0.5"),
    ({"attention_bias": True}, "attention_bias: expected false, got true"),
    ({"mlp_bias": True}, "mlp_bias: expected false"),
    ({"hidden_act": "gelu"}, 'hidden_act: expected "silu"'),
    ({"quantization_config": {"bits": 4}}, "quantization_config: expected null"),
    ({"head_dim": 16}, "q_proj.weight: expected (64, 32), got (32, 32)"),
    ({"head_dim": 7}, "head_width: expected an even number, got 7"),
    ({"hidden_size": "32"}, "hidden_size: expected an integer, got '32'"),
    ({"num_hidden_layers": None}, "num_hidden_layers: expected an integer, got None"),
    ({"num_attention_heads": 0}, "n_heads: expected a positive number"),
    ({"num_attention_heads": 5}, "n_heads: expected a multiple of n_kv_heads"),
    ({"num_attention_heads": 6, "head_dim": None}, "dim: expected a multiple"),
])
def test_load_model_refuses_an_unsupported_hf_config_by_name(change, message, tmp_path):
    save_model(variant(), tmp_path, "hf")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="config.json: |model.safetensors: tensor ") as error:
        load_model(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("window", [{"sliding_window": None}, {"sliding_window": 64}, {}])
def test_load_model_reads_a_mistral_without_a_window_and_saves_a_llama(window, tmp_path):
    """transformers takes a window of 4096 where the field is absent."""
    save_model(variant(), tmp_path, "hf")
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | window | {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"]}))
    assert same(load_model(tmp_path), variant())
    save_model(load_model(tmp_path), tmp_path, "hf")
    assert json.loads(path.read_text()) == values
    path.write_text(json.dumps(values | {"model_type": "mistral", "architectures": None,
                                         "max_position_embeddings": 4097}))
    with pytest.raises(UserError, match="sliding_window: .* = 4097, got 4096"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_load_model_reads_the_scaled_rope_of_transformers_4_and_5(name, tmp_path):
    save_model(variant(), tmp_path, "hf")
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}
    for given, expected in ((rope, RopeScaling("llama3", 8.0)),
                            ({"type": "linear", "factor": 2}, RopeScaling("linear", 2))):
        path.write_text(json.dumps(values | {name: given}))
        assert load_model(tmp_path).config.rope_scaling == expected


def test_load_model_reads_the_rope_base_of_transformers_4_and_5(tmp_path):
    save_model(variant(), tmp_path, "hf")
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    assert values.pop("rope_theta") == 5e5
    rope = {"rope_type": "default", "rope_theta": 7.0}
    path.write_text(json.dumps(values | {"rope_parameters": rope}))
    assert load_model(tmp_path).config.rope_theta == 7.0
    path.write_text(json.dumps(values))
    assert load_model(tmp_path).config.rope_theta == 10000.0


@pytest.mark.parametrize("change, message", [
    ({"dim": None}, "dim: expected an integer, got None"),
    ({"dim": 30}, "dim: expected a multiple"),
    ({"colour": 1}, "'colour': unknown field"),
    ({"use_scaled_rope": 1}, "use_scaled_rope: expected true or false"),
    ({"use_scaled_rope": True, "rope_scaling_factor": 0.5}, "rope_scaling.factor: expected a num"),
    ({"rope_scaling": {"kind": "ntk", "factor": 2.0}}, 'rope_scaling.kind: expected "linear" or'),
    ({"rope_scaling": {"kind": "linear"}}, "rope_scaling.factor: expected this field"),
    ({"head_dim": -2}, "head_width: expected a positive number"),
    ({"multiple_of": 0}, "multiple_of: expected a positive number"),
    ({"norm_eps": "small"}, "norm_eps: expected a number"),
])
def test_load_model_refuses_a_bad_params_json(change, message, tmp_path):
    save_model(variant(), tmp_path)
    path = tmp_path / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="params.json: ") as error:
        load_model(tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 100000])
def test_load_model_refuses_a_file_that_is_not_one_json_object(text, tmp_path):
    save_model(variant(), tmp_path)
    (tmp_path / "params.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="params.json: expected one JSON object, got"):
        load_model(tmp_path)


# ----- llama2.c -----------------------------------------------------------------------------------

def write_llama2c(path, model: LLaMA) -> None:
    """Writes the legacy version in the order of llama2.c's export.py."""
    c = model.config
    vocabulary = c.vocab_size if c.tie_embeddings else -c.vocab_size
    data = struct.pack("<7i", c.dim, c.ffn_dim, c.n_layers, c.n_heads, c.n_kv_heads, vocabulary,
                       c.max_seq_len)
    blocks = [l for l in model.layers]
    parts = [model.tok_embeddings.weight]
    parts += [b.attention_norm.weight for b in blocks]
    for name in ("wq", "wk", "wv", "wo"):
        parts += [getattr(b.attention, name).weight for b in blocks]
    parts += [b.ffn_norm.weight for b in blocks]
    for name in ("w1", "w2", "w3"):
        parts += [getattr(b.feed_forward, name).weight for b in blocks]
    parts += [model.norm.weight, torch.full((c.max_seq_len * c.head_dim,), 9.0)]
    parts += [] if c.tie_embeddings else [model.output.weight]
    path.write_bytes(data + b"".join(p.detach().numpy().tobytes() for p in parts))


@pytest.mark.parametrize("tied", [False, True])
def test_load_model_reads_llama2c_files(tied, tmp_path):
    model = variant(tie_embeddings=tied, norm_eps=1e-5, rope_theta=10000.0)
    write_llama2c(tmp_path / "model.bin", model)
    assert same(load_model(tmp_path / "model.bin"), model)
    assert same(load_model(tmp_path), model)


def test_load_model_refuses_broken_llama2c_files(tmp_path):
    path = tmp_path / "model.bin"
    write_llama2c(path, variant())
    content = path.read_bytes()
    for broken, message in ((content[:-4], "truncated"), (content + b"\0", "truncated"),
                            (content[:20], "at least 28"), (b"\0" * 100, "dim: expected a pos"),
                            (b"24ka" + content[4:], "got version 1 or 2")):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=f"model.bin: .*{message}"):
            load_model(path)


def test_stories260k_is_the_same_model_in_both_layouts(data_dir):
    folder = data_dir / "stories260K"
    a, b = load_model(folder), load_model(folder / "stories260K.bin")
    assert sum(p.numel() for p in b.parameters()) == 260032
    tied = dict(b.named_parameters())
    for name, parameter in a.named_parameters():
        assert torch.equal(parameter, tied.get(name, b.tok_embeddings.weight))


# ----- files that are broken, or worse ------------------------------------------------------------

@pytest.mark.parametrize("layout, file", [("meta", "consolidated.00.pth"),
                                          ("hf", "model.safetensors")])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_load_model_refuses_a_truncated_file(layout, file, keep, tmp_path):
    save_model(variant(), tmp_path, layout)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:int(keep * len(content))])
    with pytest.raises(UserError, match=file) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


class Code:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("zipped", [True, False])
def test_load_model_executes_nothing_in_a_pickle(zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(variant(), tmp_path / "m")
    path = tmp_path / "m" / "consolidated.00.pth"
    torch.save({"norm.weight": Code()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="consolidated.00.pth: "):
        load_model(tmp_path / "m")
    path.write_bytes(pickle.dumps(Code()))
    with pytest.raises(UserError, match="consolidated.00.pth: "):
        load_model(tmp_path / "m")
    assert not (tmp_path / "executed").exists()


def test_load_model_refuses_pickles_that_hold_something_else(tmp_path):
    save_model(variant(), tmp_path)
    for content, message in (([1], "expected tensors by name, got list"),
                             ({"norm.weight": 3}, "norm.weight: expected a tensor, got int")):
        torch.save(content, tmp_path / "consolidated.00.pth")
        with pytest.raises(UserError, match=message):
            load_model(tmp_path)


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_load_model_names_file_and_tensor(layout, tmp_path):
    model = variant()
    name = "layers.1.feed_forward.w2.weight"
    shown = name if layout == "meta" else "model.layers.1.mlp.down_proj.weight"
    for number, (change, message) in enumerate([
            (lambda t: None, f"tensor {name} is missing"),
            (lambda t: t[:, :-1], f"tensor {shown}: expected .32, 48., got .32, 47."),
            (lambda t: t.long(), f"tensor {shown}: expected floating point, got torch.int64")]):
        broken = {n: p.detach() for n, p in model.named_parameters()}
        if (changed := change(broken.pop(name))) is not None:
            broken[name] = changed
        folder = tmp_path / str(number)
        save_model(model, folder, layout)
        overwrite(folder, layout, broken, model.config)
        with pytest.raises(UserError, match=message):
            load_model(folder)
    overwrite(folder, layout, dict(model.named_parameters()) | {"layers.2.ffn_norm.weight":
                                                                torch.ones(32)}, model.config)
    with pytest.raises(UserError, match=r"tensor .*layers\.2\..*norm.weight: unknown"):
        load_model(folder)


def overwrite(folder, layout: str, tensors: dict, config: LLaMAConfig) -> None:
    if layout == "meta":
        tensors = {n: t.detach().clone() for n, t in tensors.items()}
        torch.save(tensors, folder / "consolidated.00.pth")
    else:
        kinds = {torch.float32: "F32", torch.int64: "I64"}
        write_raw(folder / "model.safetensors", {
            huggingface.to_hf_name(n): (kinds[t.dtype], list(t.shape),
                                        t.detach().contiguous().numpy().tobytes())
            for n, t in tensors.items()})


def test_load_model_refuses_a_tokenizer_of_another_size(tmp_path, tokenizer):
    save_model(variant(), tmp_path / "m", tokenizer=tokenizer)
    texts = [f"{a}{b}{c} " * 3 for a in "abcd" for b in "efgh" for c in "ijkl"]
    train(texts, 300, tmp_path / "m" / "tokenizer.model")
    with pytest.raises(UserError, match="tokenizer.model: expected about 272 pieces.*got 300"):
        load_model(tmp_path / "m")
    with pytest.raises(UserError, match="expected about 400 pieces.*got 272"):
        save_model(variant(vocab_size=400), tmp_path / "n", tokenizer=tokenizer)
    assert not (tmp_path / "n").exists()


def test_load_model_refuses_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match="holds no model; expected params.json"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="nowhere: expected a model folder"):
        load_model(tmp_path / "nowhere")
    sizes = '{"dim": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 9}'
    (tmp_path / "params.json").write_text(sizes)
    with pytest.raises(UserError, match="consolidated.00.pth: this shard is missing"):
        load_model(tmp_path)
    (tmp_path / "params.json").rename(tmp_path / "config.json")
    with pytest.raises(UserError, match="config.json: model_type"):
        load_model(tmp_path)


def test_load_model_refuses_two_checkpoints_in_one_folder(tmp_path):
    save_model(variant(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="holds two checkpoints"):
        load_model(tmp_path)


# ----- safetensors --------------------------------------------------------------------------------

F = struct.pack("<4f", 1, 2, 3, 4)
GOOD = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize("pad", range(8))
def test_safetensors_reads_every_dtype_at_any_alignment(pad, tmp_path):
    path = tmp_path / "x.safetensors"
    write_raw(path, {
        "a": ("F32", [2, 2], F), "b": ("BF16", [2], struct.pack("<HH", 0x3F80, 0xC000)),
        "c": ("U8", [3], b"\x01\x02\xff"), "d": ("F64", [], struct.pack("<d", 0.5)),
        "e": ("I64", [1], struct.pack("<q", -7)), "f": ("BOOL", [2], b"\x00\x01"),
        "g": ("F16", [0, 5], b""), "h": ("I32", [1], struct.pack("<i", 9))}, pad)
    tensors = SafeTensors(path)
    assert {n: t.tolist() for n, t in tensors.items()} == {
        "a": [[1, 2], [3, 4]], "b": [1.0, -2.0], "c": [1, 2, 255], "d": 0.5, "e": [-7],
        "f": [False, True], "g": [], "h": [9]}
    assert tensors["g"].shape == (0, 5) and tensors["b"].dtype == torch.bfloat16


@pytest.mark.parametrize("header, data, message", [
    ({"x": GOOD | {"data_offsets": [0, 20]}}, F, "tensor x: expected 20 bytes of data, got 16"),
    ({"x": GOOD, "y": GOOD | {"data_offsets": [8, 24]}}, F + F[:8], "tensor y: .* an overlap"),
    ({"x": GOOD, "y": GOOD | {"data_offsets": [20, 36]}}, F + F + F[:4], "tensor y: .* a gap"),
    ({"x": GOOD}, F + b"\0", "expected 16 bytes of tensors, got 17 bytes of data"),
    ({"x": GOOD | {"shape": [5]}}, F, r"tensor x: expected 20 bytes for F32 \[5\], got 16"),
    ({"x": GOOD | {"shape": [-4]}}, F, "tensor x: expected a shape"),
    ({"x": GOOD | {"shape": [True, 4]}}, F, "tensor x: expected a shape"),
    ({"x": GOOD | {"shape": [2**40, 2**40]}}, F, "tensor x: expected 48357032784585[0-9]* bytes"),
    ({"x": GOOD | {"dtype": "I4"}}, F, "tensor x: dtype: expected one of F64, .*, got 'I4'"),
    ({"x": GOOD | {"dtype": ["F32"]}}, F, "tensor x: dtype: expected one of F64, "),
    ({"x": GOOD | {"data_offsets": [16, 0]}}, F, "tensor x: expected data_offsets"),
    ({"x": GOOD | {"data_offsets": [0]}}, F, "tensor x: expected data_offsets"),
    ({"x": {"dtype": "F32"}}, F, "tensor x: expected dtype, shape and data_offsets"),
    ({"x": 3}, F, "tensor x: expected dtype, shape and data_offsets"),
    ([], F, "header: expected a JSON object, got list"),
    (b"{nonsense", b"", "header: expected JSON"),
    (b'{"x": 1, "x": 2}', b"", "a name occurs twice"),
])
def test_safetensors_refuses_a_bad_header(header, data, message, tmp_path):
    path = tmp_path / "x.safetensors"
    write_header(path, header, data)
    with pytest.raises(UserError, match=f"x.safetensors: .*{message}|x.safetensors: {message}"):
        SafeTensors(path)


@pytest.mark.parametrize("content, message", [
    (b"", "expected a safetensors file, got an empty file"),
    (b"\x08\0\0\0\0\0\0", "at least 8 bytes, got 7"),
    (struct.pack("<Q", 100) + b"{}", "expected a header of 100 bytes, got a file of 10"),
    (b"\xff" * 16, "expected a header of 1844"),
])
def test_safetensors_refuses_a_header_longer_than_the_file(content, message, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        SafeTensors(path)


def test_load_model_survives_random_damage(tmp_path):
    """A flipped byte gives a model or a UserError, never another exception."""
    generator = random.Random(0)
    for layout, file in (("meta", "consolidated.00.pth"), ("hf", "model.safetensors"),
                         ("meta", "params.json"), ("hf", "config.json")):
        folder = tmp_path / file
        save_model(variant(n_layers=1), folder, layout)
        content = (folder / file).read_bytes()
        for _ in range(60):
            damaged = bytearray(content)
            where = generator.randrange(min(len(content), 4000) if generator.random() < .8
                                        else len(content))
            damaged[where] = generator.randrange(256)
            (folder / file).write_bytes(damaged)
            try:
                load_model(folder)
            except UserError as error:
                assert file in str(error) or "config" in str(error) or "pth" in str(error)


# ----- memory -------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_load_model_needs_no_second_model(layout, tmp_path):
    """Anonymous memory grows by the model and one tensor. Mapped files do not count."""
    model = variant(dim=256, n_layers=6, vocab_size=8000, ffn_dim=1024)
    save_model(model, tmp_path / "large", layout)
    save_model(variant(), tmp_path / "small", layout)
    size = sum(4 * p.numel() for p in model.parameters())
    largest = max(4 * p.numel() for p in model.parameters())
    script = f"""
import threading, torch
from fgrlhf.checkpoint import load_model
torch.set_num_threads(1)
def anonymous():
    lines = open("/proc/self/status").readlines()
    return next(int(line.split()[1]) * 1024 for line in lines if "RssAnon" in line)
peak, going = [0], [True]
def watch():
    while going[0]:
        peak[0] = max(peak[0], anonymous())
watcher = threading.Thread(target=watch)
load_model({str(tmp_path / "small")!r})                     # imports and allocates what stays
before = anonymous()
watcher.start()
model = load_model({str(tmp_path / "large")!r})
going[0] = False
watcher.join()
print(max(peak[0], anonymous()) - before)
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc/self/status")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          check=True, cwd=os.path.dirname(os.path.dirname(__file__)))
    extra = int(done.stdout)
    assert 0.9 * size < extra < size + largest + 2**20, (size, largest, extra)


def test_load_model_describes_a_large_checkpoint_without_reading_it(tmp_path):
    """TinyLlama-1.1B as a sparse file of 2.2 GB: names and shapes are checked, nothing is read."""
    config = PRESETS["TinyLlama-1.1B"]
    with torch.device("meta"):
        expected = LLaMA(config).bfloat16()
    header, size = {}, 0
    for name, p in expected.named_parameters():
        header[huggingface.to_hf_name(name)] = {"dtype": "BF16", "shape": list(p.shape),
                                                "data_offsets": [size, size + p.nbytes]}
        size += p.nbytes
    write_header(tmp_path / "model.safetensors", header)
    os.truncate(tmp_path / "model.safetensors",
                (tmp_path / "model.safetensors").stat().st_size + size)
    (tmp_path / "config.json").write_text(
        json.dumps(huggingface.write_config(config, torch.bfloat16, None)))
    model = load_model(tmp_path, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 1_100_048_384
    assert model.head.dtype == torch.bfloat16 and model.head.is_meta


# ----- training states ----------------------------------------------------------------------------

def nested_state() -> dict:
    generator = torch.Generator().manual_seed(3)
    return {"step": 7, "loss": 0.1 + 0.2, "name": "é", "none": None, "flag": True, "raw": b"\0",
            "rng": generator.get_state(), "betas": (0.9, 0.95), "empty": {}, "nan_free": [],
            "optimizer": {"state": {0: {"step": torch.tensor(3.0), "m": torch.randn(3, 2)}}},
            "half": [torch.randn(2).bfloat16(), torch.tensor([True]), torch.zeros(0)]}


def test_save_state_round_trips_bit_exactly(tmp_path):
    state = nested_state()
    save_state(tmp_path / "state.pt", state)
    loaded = load_state(tmp_path / "state.pt")
    assert list(loaded) == list(state)
    for key in ("step", "loss", "name", "none", "flag", "raw", "betas", "empty", "nan_free"):
        assert loaded[key] == state[key] and type(loaded[key]) is type(state[key])
    assert torch.equal(loaded["rng"], state["rng"])
    assert torch.equal(loaded["optimizer"]["state"][0]["m"], state["optimizer"]["state"][0]["m"])
    for a, b in zip(loaded["half"], state["half"]):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_save_state_resumes_a_generator_and_an_optimizer(tmp_path):
    model = variant()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2]])).sum().backward()
    optimizer.step()
    generator = torch.Generator().manual_seed(5)
    save_state(tmp_path / "s", {"model": model.state_dict(), "adam": optimizer.state_dict(),
                                "rng": generator.get_state()})
    state = load_state(tmp_path / "s")
    other = variant()
    other.load_state_dict(state["model"])
    fresh = torch.optim.AdamW(other.parameters())
    fresh.load_state_dict(state["adam"])
    again = torch.Generator()
    again.set_state(state["rng"])
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=again))
    for m, o in ((model, optimizer), (other, fresh)):
        o.zero_grad()
        m(torch.tensor([[3, 4]])).square().sum().backward()
        o.step()
    assert same(model, other)


def test_load_state_notices_any_flipped_byte(tmp_path):
    path = tmp_path / "state.pt"
    save_state(path, {"x": torch.arange(64.0), "n": 12345678})
    content = path.read_bytes()
    for where in range(len(content)):
        path.write_bytes(content[:where] + bytes([content[where] ^ 0x10]) + content[where + 1:])
        with pytest.raises(UserError, match="state.pt: damaged"):
            load_state(path)
    path.write_bytes(content)
    assert load_state(path)["n"] == 12345678


@pytest.mark.parametrize("keep", [0, 10, 500])
def test_load_state_refuses_a_truncated_or_missing_file(keep, tmp_path):
    path = tmp_path / "state.pt"
    save_state(path, nested_state())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="state.pt: damaged"):
        load_state(path)
    path.unlink()
    with pytest.raises(UserError, match="state.pt: no such training state"):
        load_state(path)


def test_load_state_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state": Code(), "sha256": ""}, "state.pt")
    with pytest.raises(UserError, match="state.pt"):
        load_state("state.pt")
    assert not (tmp_path / "executed").exists()


def test_save_state_names_what_it_cannot_hold(tmp_path):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\]: expected a tensor.*got set"):
        save_state(tmp_path / "s", {"a": [1, {2}]})
    assert not list(tmp_path.iterdir())


def test_save_state_leaves_the_old_state_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    save_state(path, {"n": 1})

    def stop(saved, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        save_state(path, {"n": 2})
    assert load_state(path) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
