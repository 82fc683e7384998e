"""Logits and greedy texts against those of transformers, stored in fixtures/transformers.json.

Where transformers is installed, random Llama-3-style models are compared with it, both ways.
"""

import json
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fgrlhf.checkpoint import load_model, save_model
from fgrlhf.generate import continue_batch

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "transformers.json").read_text())
CASES = range(len(FIXTURE["cases"]))


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Computes a weight by the formula in make_transformers_fixture.txt."""
    n = np.arange(np.prod(shape), dtype=np.float64) + zlib.crc32(name.encode()) % 1000
    numbers = 0.5 * np.sin(n * n * 0.7 + n)
    return (numbers + (len(shape) == 1)).reshape(shape).astype(np.float32)


def write_hf_folder(folder: Path, case: dict) -> Path:
    """Writes config.json and model.safetensors, without the writer that is tested."""
    header, data = {}, b""
    for name, shape in case["names"].items():
        raw = weight(name, tuple(shape)).tobytes()
        header[name] = {"dtype": "F32", "shape": shape,
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "config.json").write_text(json.dumps(case["config"]))
    return folder


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("number", CASES)
def test_logits_equal_transformers(number, side, tmp_path):
    case = FIXTURE["cases"][number]
    model = load_model(write_hf_folder(tmp_path, case))
    tokens, lengths = torch.tensor(case["tokens"]), torch.tensor(FIXTURE["lengths"])[:, None]
    steps, T = torch.arange(tokens.shape[1]), tokens.shape[1]
    mask = steps < lengths if side == "right" else steps >= T - lengths
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(tokens, positions=positions, key_mask=mask)[mask]
        expected = torch.tensor(case[side])
        assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()
        if side == "right":                                     # causality is enough
            assert (model(tokens)[mask] - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("number", CASES)
def test_greedy_continuation_equals_transformers(number, tmp_path):
    case = FIXTURE["cases"][number]
    model = load_model(write_hf_folder(tmp_path, case))
    prompt = case["tokens"][0]
    steps = continue_batch(model, [prompt], (), len(case["greedy"]), temperature=0.0)
    assert [id for id, in steps] == case["greedy"]
    assert len(case["greedy"]) == 64


@pytest.mark.parametrize("number", CASES)
def test_save_model_gives_back_transformers_own_tensors(number, tmp_path):
    case = FIXTURE["cases"][number]
    model = load_model(write_hf_folder(tmp_path / "theirs", case))
    save_model(model, tmp_path / "ours", "hf")
    raw = (tmp_path / "ours" / "model.safetensors").read_bytes()
    length, = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8:8 + length]), raw[8 + length:]
    assert header.pop("__metadata__") == {"format": "pt"}
    assert set(header) == set(case["names"])
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        assert data[start:end] == weight(name, tuple(case["names"][name])).tobytes(), name


# ----- Llama 3 and Mistral, where transformers is installed ---------------------------------------

def random_llama3(transformers, number: int):
    """A model of transformers: scaled RoPE, grouped heads of odd widths, Llama or Mistral."""
    draw = random.Random(number)
    heads, groups = draw.choice([(6, 2), (6, 3), (4, 4), (8, 2), (6, 1)])
    rope = draw.choice([
        {"rope_type": "default"}, {"rope_type": "linear", "factor": draw.choice([2.0, 8.0])},
        {"rope_type": "llama3", "factor": draw.choice([8.0, 32.0]), "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": draw.choice([32, 128])}])
    theta, kind = draw.choice([1e4, 5e5]), draw.choice(["Llama", "Llama", "Mistral"])
    rope = ({"rope_parameters": rope | {"rope_theta": theta}} if transformers.__version__ >= "5"
            else {"rope_scaling": rope, "rope_theta": theta})
    window = {"sliding_window": draw.choice([None, 512])} if kind == "Mistral" else {}
    config = getattr(transformers, kind + "Config")(
        vocab_size=60, hidden_size=96, intermediate_size=100, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=groups,
        head_dim=draw.choice([20, 6, 12, 32]), tie_word_embeddings=draw.random() < 0.5,
        rms_norm_eps=1e-5, max_position_embeddings=512, initializer_range=0.2, **rope, **window)
    torch.manual_seed(number)
    return getattr(transformers, kind + "ForCausalLM")(config).eval()


@pytest.mark.parametrize("number", range(20))
def test_random_llama_3_models_equal_transformers_both_ways(number, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    theirs = random_llama3(transformers, number)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    save_model(ours, tmp_path / "ours", "hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = torch.randint(0, 60, (3, 150), generator=torch.Generator().manual_seed(number))
    with torch.no_grad():
        expected, logits = theirs(tokens).logits, ours(tokens)
        assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()
        assert torch.equal(back(tokens).logits, expected)
