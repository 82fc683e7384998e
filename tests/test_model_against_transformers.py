"""Logits and greedy texts against those of transformers, stored in fixtures/transformers.json."""

import json
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
