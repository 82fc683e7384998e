"""Mutated checkpoints, configurations and tokenizers: each loads, or gives a UserError of one line.

    python -m tests.test_fuzz_checkpoints 2000 [first]

makes 2000 mutations, from number `first` (default 0) on, in one process, and prints a table. The
number is the seed of a mutation, so a failure can be repeated. The suite makes 60 mutations, or
FGRLHF_FUZZ_CHECKPOINTS. Each may take 10 seconds, and the process 1 GiB of memory.
"""

import contextlib
import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from fgrlhf.checkpoint import load_adapted, load_model, load_tokenizer, save_model
from fgrlhf.data.fields import UserError
from fgrlhf.generate import continue_batch
from fgrlhf.tokenizer import Tokenizer
from tests.test_fuzz import peak_memory

COUNT = int(os.environ.get("FGRLHF_FUZZ_CHECKPOINTS", 60))
SECONDS, MEBIBYTES = 10, 1024
JUNK = [None, True, 0, -1, 1, 2, 0.5, 10**7, 2**31, 2**63, 10**400, 1e308, float("nan"),
        float("inf"), "", "x", "x" * 10**5, "\ud800\n", [], {}, [None], [[[]]] * 99, {"": 0},
        {"type": "linear"}, {"type": "linear", "factor": 2}, {"kind": "llama3", "factor": 8.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192}, {"rope_theta": []}, ["LlamaForCausalLM"],
        "../x", [2**40, 2**40]]
TEXT = "hello  ▁ world </s> é😀\n"


# ----- the good folders that are mutated ----------------------------------------------------------

def make_seeds(folder: Path) -> list[Path]:
    """Writes one folder of each kind: layouts, formats, shards, added rows, tokenizers."""
    from tests.test_checkpoint import variant, write_index, write_llama2c, write_shards
    from tests.test_export import trained
    bpe = trained(folder / "bpe")
    V = bpe.vocab_size
    model = variant(vocab_size=V + 4, norm_eps=1e-5, rope_theta=10000.0)
    for layout in ("meta", "hf"):
        save_model(model, folder / layout, layout, bpe)
    shutil.copytree(folder / "meta", folder / "legacy")
    torch.save({n: p.detach() for n, p in model.named_parameters()},
               folder / "legacy" / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    make_gguf(folder / "gguf", bpe)
    make_byte_level(folder)
    for name in ("index", "index-bin", "shards", "llama2c"):
        (folder / name).mkdir()
        shutil.copy(bpe.path, folder / name / "tokenizer.model")
    write_index(folder / "index", model, pickled=False)
    write_index(folder / "index-bin", model, pickled=True)
    write_shards(folder / "shards", model, 2)
    write_llama2c(folder / "llama2c" / "model.bin", variant(
        vocab_size=V, norm_eps=1e-5, rope_theta=10000.0, tie_embeddings=True))
    save_model(load_adapted(folder / "meta", rank=2), folder / "adapters", tokenizer=bpe)
    for name, options in (("unigram", {"model_type": "unigram", "vocab_size": 290}),
                          ("lossy", {"normalization_rule_name": "nmt_nfkc"})):
        tokenizer = trained(folder / name, **options)
        save_model(variant(vocab_size=tokenizer.vocab_size), folder / ("of-" + name),
                   tokenizer=tokenizer)
    return sorted(path for path in folder.iterdir() if path.is_dir())


def make_gguf(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes a folder with a GGUF file that has three types and a sentencepiece tokenizer.

    A folder next to it gets one with a byte-level BPE.
    """
    from tests.gguf_files import F16, Q8_0, bpe, describe, sentencepiece, weights, write
    from tests.test_checkpoint import variant
    from tests.test_gguf import MERGES, TOKENS
    model = variant(vocab_size=tokenizer.vocab_size, ffn_dim=64)
    tensors = weights(model, F16)
    tensors["blk.0.ffn_up.weight"] = (Q8_0, (64, 32), b"\1\2" * 17 * 64)
    folder.mkdir()
    write(folder / "model.gguf", describe(model) | sentencepiece(tokenizer), tensors)
    model = variant(vocab_size=len(TOKENS))
    folder.with_name("gguf-bpe").mkdir()
    write(folder.with_name("gguf-bpe") / "bpe.gguf", describe(model) | bpe(TOKENS, MERGES, 3),
          weights(model))


def make_byte_level(folder: Path) -> None:
    """Writes model folders with a byte-level BPE in each form of its files."""
    from tests.test_bpe import TEMPLATE, small, tiktoken_lines
    from tests.test_checkpoint import variant
    for layout, pretokeniser in (("meta", "llama3"), ("hf", "smollm")):
        tokenizer = small(pretokeniser)
        save_model(variant(vocab_size=tokenizer.vocab_size), folder / f"bpe-{layout}", layout,
                   tokenizer)
    tokenizer = small()
    for name in ("bpe-vocab", "bpe-tiktoken"):
        rows = 512 if name == "bpe-tiktoken" else tokenizer.vocab_size
        save_model(variant(vocab_size=rows), folder / name)
    (folder / "bpe-tiktoken" / "tokenizer.model").write_bytes(
        tiktoken_lines([bytes([byte]) for byte in range(256)]))
    for name, values in (
            ("vocab", {token: id for id, token in enumerate(tokenizer.tokens)}),
            ("special_tokens_map", {"bos_token": {"content": tokenizer.tokens[1]}}),
            ("added_tokens", tokenizer.control),
            ("generation_config", {"eos_token_id": [2, 0]}),
            ("tokenizer_config", {"add_bos_token": True, "chat_template": TEMPLATE})):
        (folder / "bpe-vocab" / f"{name}.json").write_text(json.dumps(values))
    (folder / "bpe-vocab" / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(tokenizer.merges) + "\n")


# ----- mutations ----------------------------------------------------------------------------------

def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Overwrites, removes, inserts or cuts, most often near the beginning or the end."""
    data = bytearray(data or b"x")
    if rng.random() < .3:                                   # anywhere, and of the same length
        data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 50])):
        place, size = rng.random(), max(len(data), 1)
        near = rng.randrange(min(size, 600))
        at = near if place < .4 else size - 1 - near if place < .7 else rng.randrange(size)
        kind = rng.random()
        if kind < .6:
            data[at:at + 1] = rng.choice([rng.randbytes(1), b"\0", b"\xff", b"\x80"])
        elif kind < .7:
            data[at:at + rng.randrange(1, 40)] = b""
        elif kind < .8:
            data[at:at] = rng.randbytes(rng.randrange(1, 40))
        elif kind < .9:
            data[at:at + 8] = rng.choice([b"\xff" * 8, struct.pack("<q", 2**40), bytes(8)])
        elif kind < .95:
            del data[at:]
        else:
            data += rng.randbytes(rng.randrange(1, 5000))
    return bytes(data)


def mutate_value(value: object, rng: random.Random) -> object:
    """Replaces, leaves out or adds something at a random depth of a JSON value."""
    if isinstance(value, (dict, list)) and value and rng.random() < .9:
        value = value.copy()
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < .2:
            del value[key]
        elif rng.random() < .2 and isinstance(value, dict):
            value[rng.choice(["?\n", "use_scaled_rope", "quantization_config", "bias",
                              "rope_scaling", "head_dim"])] = 1
        else:
            value[key] = mutate_value(value[key], rng)
        return value
    return rng.choice(JUNK)


def mutate_json(text: bytes, rng: random.Random) -> bytes:
    values = json.loads(text)
    for _ in range(rng.choice([1, 1, 2, 4])):
        values = mutate_value(values, rng)
    text = json.dumps(values)
    if rng.random() < .1:                                   # a key twice
        text = text.replace("{", '{"vocab_size": 7, "a": 1, "a": 2, ', 1)
    return text.encode()


def mutate_tensors(path: Path, rng: random.Random) -> None:
    """Saves a torch file again with one tensor that is something else."""
    tensors = dict(torch.load(path, weights_only=True))
    name = rng.choice(list(tensors))
    one = tensors[name]
    tensors[name] = rng.choice([
        lambda: one * float("nan"), lambda: one.to_sparse(), lambda: one[:1].expand(10**6, -1)
        if one.dim() == 2 else one[:1].expand(10**9), lambda: one.long(), lambda: one[..., :-1],
        lambda: [one], lambda: None, lambda: torch.zeros(1).expand(one.shape), lambda: one.double(),
        lambda: torch.nested.nested_tensor([one, one]), lambda: one.to(torch.complex64),
        lambda: bytearray(10), lambda: one.T, lambda: one.new_zeros(0), lambda: one[None]])()
    if rng.random() < .2:
        tensors[rng.choice(["x", 3, "x\n" * 99, "layers.7.norm.weight"])] = one
    torch.save(tensors, path, _use_new_zipfile_serialization=rng.random() < .7)


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """Overwrites a number near the beginning of a GGUF file, in its header or anywhere."""
    at = rng.randrange(rng.choice([24, 800, 20_000, len(data) - 8]))
    number = rng.choice([0, 1, 2, 3, 8, 9, 255, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1])
    size = rng.choice([1, 4, 8])
    return data[:at] + struct.pack("<Q", number)[:size] + data[at + size:]


def compress(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)


def mutate(folder: Path, seeds: list[Path], rng: random.Random) -> str:
    """Changes one file of `folder`. Returns the name of the file, for the table."""
    path = rng.choice(sorted(folder.iterdir()))
    data, kind = path.read_bytes(), rng.random()
    if kind < .05:
        path.unlink()
    elif kind < .1:
        other = rng.choice([file for seed in seeds for file in seed.iterdir()])
        path.write_bytes(other.read_bytes())
    elif kind < .13:
        path.write_bytes(rng.choice([
            b"", b"\0" * 9000, b"[" * 10**5, b"IQ== 0\n", b"\x80\x02.", rng.randbytes(99),
            b"version https://git-lfs.github.com/spec/v1\n"]))
    elif path.suffix == ".json" and kind < .8:
        path.write_bytes(mutate_json(data, rng))
    elif path.suffix == ".safetensors" and kind < .6:
        length, = struct.unpack("<Q", data[:8])
        header = mutate_json(data[8:8 + length], rng)
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length:])
    elif path.suffix in (".pth", ".pt") and kind < .4:
        mutate_tensors(path, rng)
    elif path.suffix in (".pth", ".pt") and kind < .43 and data[:2] == b"PK":
        compress(path)
    elif path.suffix == ".gguf" and kind < .7:
        path.write_bytes(mutate_header(data, rng))
    elif path.name == "model.bin" and kind < .6:
        at = 4 * rng.randrange(7)
        number = struct.pack("<i", rng.choice([0, -1, 1, 10**7, 2**31 - 1, -2**31, 64, 272]))
        path.write_bytes(data[:at] + number + data[at + 4:])
    else:
        path.write_bytes(mutate_bytes(data, rng))
    return path.name


# ----- the run ------------------------------------------------------------------------------------

def use(folder: Path) -> None:
    """Loads a folder, encodes a text, samples two tokens and writes the model in both layouts."""
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    ids = tokenizer.encode(TEXT, bos=True, eos=True)
    tokenizer.decode(ids), tokenizer.spans(ids), tokenizer.offsets(TEXT)
    for step in continue_batch(model, [ids[:1]], (), 2, temperature=0):
        assert 0 <= step[0] < tokenizer.vocab_size
    for layout in ("meta", "hf"):
        save_model(model, folder / layout, layout, tokenizer)


def attempt(number: int, seeds: list[Path], folder: Path) -> tuple[str, str, float]:
    """Runs one mutation. Returns the file, "used", "refused" or what is wrong, and the seconds."""
    rng = random.Random(number)
    shutil.copytree(rng.choice(seeds), folder)
    name = mutate(folder, seeds, rng)
    started = time.process_time()
    try:
        with contextlib.redirect_stderr(io.StringIO()):     # the line about rows of the embedding
            use(folder)
        result = "used"
    except (UserError, FloatingPointError) as error:        # huge weights: logits are not finite
        message = str(error)
        result = "refused" if "\n" not in message and len(message) < 1000 else f"long: {message}"
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    seconds = time.process_time() - started
    shutil.rmtree(folder)
    return name, f"{seconds:.1f} s" if seconds > SECONDS else result, seconds


def main(count: int, first: int) -> int:
    results, wrong, slowest = Counter(), 0, 0.0
    with tempfile.TemporaryDirectory() as at:
        (Path(at) / "seeds").mkdir()
        seeds = make_seeds(Path(at) / "seeds")
        for seed in seeds:                                  # every seed itself is good
            shutil.copytree(seed, Path(at) / "try")
            load_model(Path(at) / "try", device="meta"), load_tokenizer(Path(at) / "try")
            shutil.rmtree(Path(at) / "try")
        for number in range(first, first + count):
            name, result, seconds = attempt(number, seeds, Path(at) / "try")
            slowest = max(slowest, seconds)
            results[name, result if result in ("used", "refused") else "WRONG"] += 1
            if result not in ("used", "refused"):
                wrong += 1
                print(f"mutation {number} of {name}: {ascii(result)[:300]}")
    for name in sorted({name for name, _ in results}):
        print(f"{name:36}" + "".join(f"{kind} {results[name, kind]:<6}" for kind in (
            "used", "refused", "WRONG")))
    peak = peak_memory()
    print(f"{count} mutations: {wrong} wrong, the slowest {slowest:.2f} s, peak {peak} MiB")
    return int(wrong > 0 or peak > MEBIBYTES)


@pytest.mark.filterwarnings("ignore")
def test_mutated_checkpoints_are_used_or_refused():
    """A process of its own: its peak memory is that of the mutations, and it may crash."""
    done = subprocess.run([sys.executable, "-m", "tests.test_fuzz_checkpoints", str(COUNT)],
                          capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0 and f"{COUNT} mutations: 0 wrong" in done.stdout, (
        done.stdout[-3000:] + done.stderr[-3000:])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
