"""The planned bytes against the bytes that torch allocates, on small models."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fgrlhf.data.fields import UserError
from fgrlhf.engine import lora
from fgrlhf.engine.config import parse
from fgrlhf.model import KVCache, LLaMA, LLaMAConfig, build
from fgrlhf.plan.__main__ import Config, held, main, passing, peaks, verdict
from fgrlhf.plan.memory import activation_bytes, adapter_count, cache_bytes
from fgrlhf.presets import PRESETS
from tests import measure_memory
from tests.processes import ROOT

SMALL = LLaMAConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=100, ffn_dim=172)


def saved_bytes(config: LLaMAConfig, batch: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of all distinct storages that autograd keeps, without those of the parameters."""
    model = LLaMA(config).to(dtype)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage              # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(torch.zeros(batch, length, dtype=torch.long))
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 4}, {"n_layers": 1, "ffn_dim": 300},
                                     {"head_width": 20}, {"head_width": 6}])
def test_activation_bytes_are_what_autograd_keeps(dtype, changes):
    config = replace(SMALL, **changes)
    assert activation_bytes(config, 2, 50, dtype.itemsize) == saved_bytes(config, 2, 50, dtype)


def plan(*flags) -> Config:
    return parse(Config, argv=[str(flag) for flag in flags])


def test_held_is_what_torch_allocates():
    config = plan("--dtype", "float32")
    table, model = held(SMALL, config), LLaMA(SMALL)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2]])).sum().backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values()
               for name in ("exp_avg", "exp_avg_sq")]
    weights = sum(p.nbytes for p in model.parameters())
    assert table == {"policy weights": weights, "reference weights": weights,
                     "reward weights": weights, "moments": sum(t.nbytes for t in moments),
                     "master copy": 0}
    assert passing(SMALL, config)["update"]["gradients"] == weights


def test_cache_bytes_are_the_caches():
    for dtype in (torch.float32, torch.bfloat16):
        cache = KVCache(SMALL, 3, 17, dtype=dtype)
        assert cache_bytes(SMALL, 3, 17, dtype.itemsize) == cache.keys.nbytes + cache.values.nbytes


def test_adapter_count_is_that_of_an_adapted_model():
    for sizes in (SMALL, replace(SMALL, head_width=20)):
        model = lora.adapt(build(sizes), 5)
        assert adapter_count(sizes, 5) == sum(p.numel() for p in lora.adapters(model).values())


def test_held_of_llama_7b_by_hand():
    """All weights in bfloat16: 3 x 2 + 8 + 4 = 18 bytes per parameter, half of it on 2 ranks."""
    P = 6_738_415_616
    assert sum(held(PRESETS["7B"], plan()).values()) == 18 * P
    assert sum(held(PRESETS["7B"], plan("--world-size", 2)).values()) == 9 * P
    assert sum(held(PRESETS["7B"], plan("--method", "rlhf")).values()) == 32 * P
    adapted = held(PRESETS["7B"], plan("--lora-rank", 8))
    assert adapted["trunk, shared"] == 2 * P and sum(adapted.values()) < 2.1 * P


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured through /proc")
@pytest.mark.parametrize("sizes, options", [
    ({}, {}), ({"vocab_size": 30000}, {"lora_rank": 8, "checkpoint_activations": True}),
    ({"n_layers": 3}, {"dtype": "bfloat16"})])
def test_peaks_are_within_a_tenth_of_what_a_process_holds(sizes, options):
    """Compares with the resident size of a new process in each phase of a PPO iteration."""
    done = subprocess.run([sys.executable, "-m", "tests.measure_memory",
                           json.dumps({"sizes": sizes} | options)], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    sizes = LLaMAConfig(**measure_memory.SIZES | sizes)
    config = replace(plan("--dtype", "float32", "--device", "cpu", "--batch", 8, "--microbatch", 4,
                          "--prompt", measure_memory.PROMPT, "--response", measure_memory.RESPONSE,
                          "--no-checkpoint-activations"), **options)
    measured = json.loads(done.stdout)
    for phase, expected in peaks(sizes, config).items():
        assert measured[phase] == pytest.approx(expected, rel=0.1), (phase, measured, expected)


@pytest.mark.parametrize("flags, says", [
    (("--card", 141), "does not fit 141 GB: 7.7 GB too much; it fits with "
                      "--checkpoint-activations --offload (121.8 GB)"),
    (("--card", 141, "--offload"), "fits 141 GB"),
    (("--card", 24, "--lora-rank", 8), "fits 24 GB"),
    (("--card", 80, "--no-checkpoint-activations"), "it fits with --world-size 2 --batch 32 ("),
    (("--card", 24, "--lora-rank", 8, "--batch", 128), "it fits with --lora-rank 8 --batch 1 ("),
    (("--card", 8), "no option of this command makes it fit")])
def test_verdict_says_what_makes_it_fit(flags, says):
    assert says in verdict(PRESETS["7B"], plan(*flags))


def test_passing_of_a_tied_model_by_hand():
    """Llama 3.2 1B on two ranks: the embedding is gathered once, and two of the 16 blocks."""
    P, E = 1_235_814_400, 128256 * 2048
    found = passing(PRESETS["Llama-3.2-1B"], plan("--world-size", 2))
    assert found["update"]["gathered blocks"] == 2 * (E + 2 * (P - E) // 16)
    assert found["rollout"]["KV cache"] == 2 * 2 * 16 * 8 * 492 * 8 * 64


def test_main_refuses_more_tokens_than_the_context(capsys):
    for prompt, response in ((1000, 1000), (192, 65)):
        with pytest.raises(UserError, match=f"--prompt {prompt} --response {response}: expected at "
                                            "most 256 tokens together, the context of tiny, got "):
            main(plan("--preset", "tiny", "--prompt", prompt, "--response", response))
    assert capsys.readouterr().out == ""
    main(plan("--preset", "tiny", "--prompt", 192, "--response", 64))


def test_main_plans_half_of_a_context_that_is_too_short_for_the_defaults(capsys):
    main(plan("--preset", "tiny"))
    first, *table = capsys.readouterr().out.splitlines()
    assert first == "--prompt 128 --response 128, because the context of tiny is 256 tokens"
    main(plan("--preset", "tiny", "--prompt", 128, "--response", 128))
    assert capsys.readouterr().out.splitlines() == table


def test_main_prints_the_table_and_refuses_contradictions(capsys):
    main(plan("--preset", "7B", "--card", 141, "--offload"))
    out = capsys.readouterr().out
    assert "6,738,415,616 parameters" in out and "policy weights" in out
    assert "peak of update" in out and "fits 141 GB" in out
    for flags in ((), ("--preset", "8B"), ("--preset", "7B", "--model", "x"),
                  ("--preset", "7B", "--world-size", 2, "--offload"),
                  ("--preset", "7B", "--lora-rank", 8, "--offload")):
        with pytest.raises(UserError, match="expected --"):
            main(plan(*flags))
